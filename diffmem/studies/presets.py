"""The paper's factors as studies, at two scales: `cifar10`, with the paper's settings, and `digits`, with built-in data
and networks small enough for a laptop (Gu et al., arXiv 2310.02664).

At the digits scale every run sees the same number of images whatever N is: runs of the paper's length in epochs would
be too short for a small N or too long for a large one. EMA weights follow with a decay of 0.99 per step there, for
a run has a thousand steps only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from diffmem.data import DatasetSpec
from diffmem.errors import InputError
from diffmem.studies.study import EQUIVALENCE, Question, Study, Variant, changed
from diffmem.studies.trial import Setting

SCALES = ("digits", "cifar10")
DIGITS_SOURCE, CIFAR10_SOURCE = "builtin:digits", "cifar10-train.zip"
_DOG, _CAT = 5, 3  # CIFAR-10's class indices

DIGITS = Setting(
    DatasetSpec(DIGITS_SOURCE, resolution=8),
    length={"images": 64_000},
    network={"precond": "edm", "model_channels": 16, "channel_mult": [1, 1], "num_blocks": 1, "dropout": 0.0},
    training={
        "batch": 64,
        "lr": 3e-3,
        "warmup_epochs": 20,
        "weight_decay": 0.0,
        "ema": {"rule": "target", "target": 0.99},
    },
    snapshots=3,
    samples=500,
    sampling={"solver": "unipc", "batch": 250},
)
CIFAR10 = Setting(
    DatasetSpec(CIFAR10_SOURCE, resolution=32),
    length={"duration": 2000},
    network={"precond": "vp", "model_channels": 128, "num_blocks": 2},
    training={"batch": 512, "lr": 2e-4, "weight_decay": 0.0, "ema": {"rule": "compensated"}},
    snapshots=10,
    samples=10_000,
    sampling={"solver": "heun", "batch": 512},
)
_BASES = {"digits": DIGITS, "cifar10": CIFAR10}
_SIZES = {"digits": (20, 30, 40, 50, 70, 100), "cifar10": (1000, 2000, 3000, 4000, 5000)}
_AROUND = {"digits": (30, 50), "cifar10": (1000, 2000)}  # where R_mem of the base is neither 0 nor 1
_REPETITIONS = {"digits": 2, "cifar10": 1}
_DIGITS_NOTE = (
    "Digits scale: scikit-learn's digits, a small network, and runs of the same length in images for every N (the"
    " paper: a fixed number of epochs); see each study's settings for its data."
)


def build(name: str, scale: str = "digits", source: str | None = None, other: str | None = None) -> Study:
    """The study of that name (see NAMES) at a scale. source: the images instead of the scale's own. other: those that
    the study of intra-class diversity mixes in. Raises InputError for unknown names."""
    if name not in _STUDIES:
        raise InputError(f"no study {name!r}: there are {', '.join(NAMES)}, or give a file of your own")
    if scale not in SCALES:
        raise InputError(f"scale {scale!r}: choose from {', '.join(SCALES)}")
    base = _BASES[scale]
    if source is not None:
        base = replace(base, data=replace(base.data, source=source))
    study = _STUDIES[name](scale, base, other)
    notes = (_DIGITS_NOTE,) if scale == "digits" else ()
    return replace(study, notes=notes + study.notes)


def _variant(name: str, base: Setting, changes: dict[str, Any], x: float | None = None, sizes: Any = None) -> Variant:
    return Variant(name, Setting.from_json(changed(base.to_json(), changes)), x, sizes)


def _study(
    name: str,
    scale: str,
    title: str,
    factor: str,
    variants: Sequence[Variant],
    sizes: Sequence[int] | None = None,
    **fields: Any,
) -> Study:
    return Study(
        name,
        title,
        factor,
        tuple(variants),
        tuple(_SIZES[scale] if sizes is None else sizes),
        _REPETITIONS[scale],
        **fields,
    )


def _size(scale: str, base: Setting, other: str | None) -> Study:
    variants = [_variant("reference", base, {})]
    return _study("size", scale, "Memorization against the number of training images", "training images", variants)


def _resolution(scale: str, base: Setting, other: str | None) -> Study:
    levels: dict[int, tuple[int, ...]]
    if scale == "digits":
        levels = dict.fromkeys((8, 4), (20, 30, 50, 100))
    else:
        levels = {32: (500, 1000, 2000, 4000), 16: (1000, 2000, 4000, 8000, 16000), 8: (1000, 2000, 4000, 8000, 16000)}
    variants = [
        _variant(f"{level}×{level}", base, {"data.resolution": level}, level, sizes) for level, sizes in levels.items()
    ]
    high, low = max(levels), min(levels)
    return _study(
        "resolution", scale, "Resolution of the images", "resolution", variants,
        questions=(Question("a lower resolution raises R_mem", f"{low}×{low}", f"{high}×{high}"),),
        published="resolution",
        notes=("Attention stays at half the resolution.",),
    )  # fmt: skip


def _classes(scale: str, base: Setting, other: str | None) -> Study:
    variants = [_variant(f"C = {count}", base, {"data.classes": count}, count) for count in (1, 2, 5, 10)]
    return _study("classes", scale, "Number of classes", "classes", variants, log_axis=True)


def _diversity(scale: str, base: Setting, other: str | None) -> Study:
    shares = (0.0, 0.2, 0.5, 0.8, 1.0)
    if scale == "digits":
        # There is no second set of digits: photographs stand in for it, one of their two labels being the class.
        kinds, source = {"ones": 1}, other or "builtin:patches?n=2000"
        base = replace(base, data=replace(base.data, color="grey"))
        notes = ("Images of the digit 1 are replaced by patches of a photograph, as there is no second set of digits.",)
    else:
        kinds, source = {"dogs": _DOG, "cats": _CAT}, other or "imagenet-32.zip"
        notes = ("The other set must be labeled with CIFAR-10's class indices.",)
    variants = [
        _variant(f"{kind}, α = {share:g}", base, {"data.only_class": index, "data.mix": [source, share, index]}, share)
        for kind, index in kinds.items()
        for share in shares
    ]
    return _study(
        "diversity", scale, "Intra-class diversity: images of the class from another set", "share α", variants,
        _AROUND[scale], axis="factor", notes=notes,
    )  # fmt: skip


def _width(scale: str, base: Setting, other: str | None) -> Study:
    levels = (8, 16, 32) if scale == "digits" else (128, 192, 256, 320)
    variants = [_variant(f"{level} channels", base, {"network.model_channels": level}, level) for level in levels]
    return _study(
        "width", scale, "Width of the network", "channels", variants, _AROUND[scale] if scale == "digits" else None,
        questions=(Question("a wider network memorizes more", f"{levels[-1]} channels", f"{levels[0]} channels"),),
    )  # fmt: skip


def _depth(scale: str, base: Setting, other: str | None) -> Study:
    levels = (1, 2, 3) if scale == "digits" else (2, 4, 6, 8, 10, 12)
    variants = [_variant(f"{level} blocks", base, {"network.num_blocks": level}, level) for level in levels]
    return _study(
        "depth", scale, "Depth: residual blocks per resolution", "blocks", variants, _AROUND[scale], axis="factor",
        notes=("The paper finds no monotone effect of depth.",),
    )  # fmt: skip


def _embedding(scale: str, base: Setting, other: str | None) -> Study:
    depths = (1, 2) if scale == "digits" else (2, 4)
    variants = [
        _variant(f"{kind}, {blocks} blocks", base, {"network.embedding": kind, "network.num_blocks": blocks}, blocks)
        for kind in ("positional", "fourier")
        for blocks in depths
    ]
    return _study("embedding", scale, "Embedding of the noise level", "embedding", variants, _AROUND[scale])


def _skips(scale: str, base: Setting, other: str | None) -> Study:
    if scale == "digits":
        kept = {"all": None, "8×8 only": ["8"], "4×4 only": ["4"], "none": []}
        fine, coarse, sizes = "8×8 only", "4×4 only", (30,)
    else:
        kept = {"all": None, "none": []}
        for resolution in (32, 16, 8):
            kept[f"{resolution}² only"] = [str(resolution)]
            kept |= {f"{resolution}.{index} only": [f"{resolution}.{index}"] for index in range(3)}
        fine, coarse, sizes = "32² only", "8² only", (1000,)
    variants = [
        _variant(name, base, {} if names is None else {"network.skips": names}, position)
        for position, (name, names) in enumerate(kept.items())
    ]
    text = "skip connections at high resolution matter more than those at low resolution"
    return _study(
        "skips", scale, "Skip connections, by resolution", "skip connections kept", variants, sizes, axis="factor",
        questions=(
            Question(text, fine, coarse),
            Question("the skip connections at full resolution are nearly enough", "all", fine, kind=EQUIVALENCE),
        ),
        published="skips",
    )  # fmt: skip


def _batch(scale: str, base: Setting, other: str | None) -> Study:
    reference = base.training["batch"]
    levels = (16, 32, 64, 128) if scale == "digits" else tuple(range(128, 897, 128))
    variants = [
        _variant(
            f"batch {level}",
            base,
            {"training.batch": level, "training.lr": base.training["lr"] * level / reference},
            level,
        )
        for level in levels
    ]
    return _study(
        "batch", scale, "Batch size, with the learning rate scaled accordingly", "batch", variants, _AROUND[scale],
        axis="factor", log_axis=True,
    )  # fmt: skip


def _weight_decay(scale: str, base: Setting, other: str | None) -> Study:
    levels = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1) if scale == "cifar10" else (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
    variants = [_variant(f"{level:g}", base, {"training.weight_decay": level}, level) for level in levels]
    small, large = f"{1e-4:g}", f"{1e-1:g}"
    return _study(
        "weight-decay", scale, "Weight decay", "weight decay", variants, (30,) if scale == "digits" else (1000, 2000),
        axis="factor", log_axis=True,
        questions=(
            Question("a large weight decay lowers R_mem", "0", large),
            Question("a small one does not", "0", small, kind=EQUIVALENCE),
        ),
    )  # fmt: skip


def _ema(scale: str, base: Setting, other: str | None) -> Study:
    if scale == "digits":
        levels, sizes = [0.999, 0.99, 0.9, 0.5, 0.0], [30]
    else:
        levels, sizes = [0.99929, 0.999, 0.99, 0.9, 0.8, 0.5, 0.2, 0.1, 0.0], [1000, 2000]
    variants = [
        _variant(f"{level:g}", base, {"training.ema": {"rule": "target", "target": level}}, level) for level in levels
    ]
    return _study("ema", scale, "EMA weights: final decay", "EMA decay", variants, sizes, axis="factor")


def _conditioning(scale: str, base: Setting, other: str | None) -> Study:
    labels = {"no labels": "none", "true labels": "true", "random labels, C = 10": "random:10"}
    variants = [_variant(name, base, {"data.labels": value}) for name, value in labels.items()]
    return _study(
        "conditioning", scale, "Conditioning on labels", "labels", variants,
        _AROUND[scale] if scale == "digits" else None,
        questions=(
            Question("true labels raise R_mem", "true labels", "no labels"),
            Question("uninformative labels raise R_mem", "random labels, C = 10", "no labels"),
            Question("random labels do as much as true ones", "random labels, C = 10", "true labels", kind=EQUIVALENCE),
        ),
        published="conditioning",
    )  # fmt: skip


def _random_labels(scale: str, base: Setting, other: str | None) -> Study:
    if scale == "digits":
        levels, sizes = [1, 2, 10, 50], [50]
    else:
        levels, sizes = [1, 2, 5, 10, 20, 50, 100, 500, 1000], [1000, 2000, 5000]
    variants = [_variant(f"C = {count}", base, {"data.labels": f"random:{count}"}, count) for count in levels]
    return _study(
        "random-labels", scale, "Random labels of C classes", "classes C", variants, sizes, axis="factor",
        log_axis=True,
        questions=(
            Question("random labels of 10 classes raise R_mem", "C = 10", "C = 1"),
            Question("random labels of more classes raise it further", f"C = {levels[-1]}", "C = 10"),
        ),
        published="random_labels",
    )  # fmt: skip


def _unique_labels(scale: str, base: Setting, other: str | None) -> Study:
    sizes = (50, 100) if scale == "digits" else (50_000,)
    if scale == "cifar10":
        fields = {
            "network.precond": "edm", "network.num_blocks": 4, "length": {"duration": 600}, "training.lr": 1e-3,
            "snapshots": 20,
        }  # fmt: skip
        base = Setting.from_json(changed(base.to_json(), fields))
    variants = [_variant("no labels", base, {}), _variant("unique labels", base, {"data.labels": "unique"})]
    return _study(
        "unique-labels", scale, "A label of its own for every image", "labels", variants, sizes,
        questions=(Question("unique labels raise R_mem", "unique labels", "no labels"),), published="unique_labels",
    )  # fmt: skip


_STUDIES: dict[str, Callable[[str, Setting, str | None], Study]] = {
    "size": _size,
    "resolution": _resolution,
    "classes": _classes,
    "diversity": _diversity,
    "width": _width,
    "depth": _depth,
    "embedding": _embedding,
    "skips": _skips,
    "batch": _batch,
    "weight-decay": _weight_decay,
    "ema": _ema,
    "conditioning": _conditioning,
    "random-labels": _random_labels,
    "unique-labels": _unique_labels,
}
NAMES = tuple(_STUDIES)
