"""The paper's factors as studies, at four scales (Gu et al., arXiv 2310.02664): `cifar10`, with the paper's settings;
`cifar16`, CIFAR-10 at 16×16 with a network that one core can train; and with built-in images of digits `digits` and
`digits-fast`.

At `cifar16` and `digits` lengths are in epochs, as the paper's are, and a run ends earlier once its R_mem has leveled
off (`diffmem.studies.leveling`). There most networks copy nearly everything, so that factors could hardly raise it any
more: at `digits` questions are about R_mem at a shorter length, the same for all runs, at which that of the reference
is in the middle, and the highest R_mem stands beside it. At `digits-fast` every run sees the same number of images
whatever N is, in a minute of one core: too few for R_mem to level off, so that it tells how fast a network memorizes
rather than how much it can hold. At these scales EMA weights follow with a decay of 0.99 per step, for a run has some
thousand steps only. Most factors are studied at one N, at which R_mem of the reference is neither near 0 nor near 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from diffmem.data import DatasetSpec
from diffmem.errors import InputError
from diffmem.studies.study import EQUIVALENCE, TREND, Question, Study, Variant, changed
from diffmem.studies.trial import OCCUPIED, Setting
from diffmem.text import counted
from diffmem.training import images_of

DIGITS_SOURCE, CIFAR10_SOURCE = "builtin:digits", "cifar10-train.zip"
NO_IMAGES = "none"  # as the source of a study without
WITHOUT_IMAGES = ("crossover",)
_MIXTURE_SECONDS = 6e-6  # of one core, per noisy sample
_DOG, _CAT = 5, 3  # CIFAR-10's class indices

_SMALL_TRAINING = {
    "batch": 64,
    "lr": 3e-3,
    "warmup_epochs": 20,
    "weight_decay": 0.0,
    "ema": {"rule": "target", "target": 0.99},
}
DIGITS = Setting(
    DatasetSpec(DIGITS_SOURCE, resolution=8),
    length={"epochs": 5600},
    network={"precond": "edm", "model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "dropout": 0.0},
    training=_SMALL_TRAINING,
    snapshots=7,
    samples=500,
    sampling={"solver": "unipc", "batch": 250},
    level_off=1.0,
)
DIGITS_FAST = replace(
    DIGITS,
    length={"images": 64_000},
    network={**DIGITS.network, "model_channels": 16},
    snapshots=3,
    level_off=None,
)
CIFAR16 = Setting(
    DatasetSpec(CIFAR10_SOURCE, resolution=16, color="gray"),
    length={"epochs": 1500},
    network={"precond": "edm", "model_channels": 16, "channel_mult": [1, 2, 2], "num_blocks": 1, "dropout": 0.0},
    training=_SMALL_TRAINING,
    snapshots=6,
    samples=300,
    sampling={"solver": "unipc", "batch": 100},
    level_off=1.0,
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
# Runs that are watched until memorization is well under way. An EMA or a warm-up that is long beside the shortest of
# them, or grows with N, would bend a law, and 8 channels might not hold the largest N. A repetition of the six sizes is
# about 10,000 steps, seven minutes of one core with digits.
_WATCHED: dict[str, Any] = {
    "network.model_channels": 16,
    "length": {"images": 524_288},
    "snapshots": 16,
    "samples": 300,
    "level_off": None,
    "training.ema": {"rule": "target", "target": 0.9},
    "training.warmup_epochs": 0,
    "watch": {"holdout": 400, "stop_at": 0.6, "stop_after": 32_000},
}
# Two networks at six sizes: 12,000 steps a repetition.
_HALF: dict[str, Any] = {"length": {"images": 64_000}, "network.model_channels": 16, "samples": 300}
Resolutions = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class _Scale:
    """What the studies of a scale are made of.

    Attributes:
        base: The reference setting.
        sizes: Of the study of N.
        around: The N at which most factors are studied.
        curves: Those of the studies of width and of labels.
        few: Those of weight decay and EMA; skip connections are studied at the first of them.
        repetitions: Runs per cell.
        seconds: Of one core, per training image seen, for the reference; None where it needs a GPU.
        resolutions: Sizes by resolution.
        widths: Channels.
        depths: Blocks per resolution.
        embedding_depths: Blocks per resolution of the study of embeddings.
        skips: Resolutions of the network's levels.
        single_skips: Those of a resolution's skip connections that are also kept alone.
        batches: Batch sizes.
        weight_decays: From 0, with 1e-4 and 1e-1.
        emas: Final decays, 0.99 and 0 among them.
        shares: Of images from another set.
        random_labels: Numbers of classes.
        random_sizes: N of the study of random labels.
        unique_sizes: N of that of unique labels.
        kinds: The classes whose diversity is studied, by name.
        other: The images mixed into them.
        notes: What a reader should know.
        law_sizes: N of the runs off which laws of the field are read.
        law: In what these runs differ from the reference, as dotted names.
        half_sizes: N of the pairs of networks on disjoint halves.
        half: In what these differ from the reference, as dotted names.
        read_at: The training length, in epochs, at which R_mem is read; None: the highest of a run.
    """

    base: Setting
    sizes: tuple[int, ...]
    around: tuple[int, ...]
    curves: tuple[int, ...]
    few: tuple[int, ...]
    repetitions: int
    seconds: float | None
    resolutions: Resolutions
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    embedding_depths: tuple[int, ...]
    skips: tuple[int, ...]
    single_skips: tuple[int, ...]
    batches: tuple[int, ...]
    weight_decays: tuple[float, ...]
    emas: tuple[float, ...]
    shares: tuple[float, ...]
    random_labels: tuple[int, ...]
    random_sizes: tuple[int, ...]
    unique_sizes: tuple[int, ...]
    kinds: Mapping[str, int]
    other: str
    notes: tuple[str, ...] = ()
    law_sizes: tuple[int, ...] = (10, 20, 30, 40, 80, 160)
    law: Mapping[str, Any] = field(default_factory=lambda: _WATCHED)
    half_sizes: tuple[int, ...] = (20, 50, 100, 200, 400, 800)
    half: Mapping[str, Any] = field(default_factory=lambda: _HALF)
    read_at: float | None = None


_DIGITS = _Scale(
    base=DIGITS,
    sizes=(20, 30, 50, 70),
    around=(20,),
    curves=(20,),
    few=(20,),
    repetitions=4,
    seconds=0.0005,
    read_at=2100,
    resolutions=dict.fromkeys((8, 4), (20, 50)),
    widths=(4, 8, 16),
    depths=(1, 2, 3),
    embedding_depths=(1,),
    skips=(8, 4),
    single_skips=(),
    batches=(32, 64, 128),
    weight_decays=(0.0, 1e-4, 1e-1),
    emas=(0.99, 0.9, 0.0),
    shares=(0.0, 0.5, 1.0),
    random_labels=(1, 10, 50),
    random_sizes=(20,),
    unique_sizes=(20,),
    kinds={"ones": 1},
    other="builtin:patches?n=2000",
    notes=("Digits: scikit-learn's, and a small network; see each study's settings for its data.",),
)
_SCALES = {
    "digits": _DIGITS,
    "digits-fast": replace(
        _DIGITS,
        base=DIGITS_FAST,
        seconds=0.0007,
        read_at=None,
        widths=(8, 16, 32),
        sizes=(20, 30, 40, 50, 70, 100),
        around=(30, 50),
        curves=(30, 50),
        few=(30,),
        resolutions=dict.fromkeys((8, 4), (20, 30, 50, 100)),
        embedding_depths=(1, 2),
        batches=(16, 32, 64, 128),
        weight_decays=(0.0, 1e-4, 1e-3, 1e-2, 1e-1),
        emas=(0.999, 0.99, 0.9, 0.5, 0.0),
        shares=(0.0, 0.2, 0.5, 0.8, 1.0),
        random_labels=(1, 2, 10, 50),
        random_sizes=(50,),
        unique_sizes=(50, 100),
        notes=(*_DIGITS.notes, "All runs have the same length in images, whatever N is (the paper: in epochs)."),
    ),
    "cifar16": _Scale(
        base=CIFAR16,
        sizes=(20, 50, 100, 200),
        around=(200,),
        curves=(200,),
        few=(200,),
        repetitions=3,
        seconds=0.0026,
        resolutions=dict.fromkeys((16, 8), (200,)),
        widths=(8, 16, 24),
        depths=(1, 2, 3),
        embedding_depths=(1,),
        skips=(16, 8, 4),
        single_skips=(),
        batches=(32, 64, 128),
        weight_decays=(0.0, 1e-4, 1e-1),
        emas=(0.99, 0.9, 0.0),
        shares=(0.0, 0.5, 1.0),
        random_labels=(1, 10, 200),
        random_sizes=(200,),
        unique_sizes=(200,),
        kinds={"dogs": _DOG},
        other="imagenet-32.zip",
        notes=("CIFAR-10 at 16×16, unless said otherwise in gray levels, and a network of 0.3 million parameters.",),
    ),
    "cifar10": _Scale(
        base=CIFAR10,
        sizes=(1000, 2000, 3000, 4000, 5000),
        around=(1000, 2000),
        curves=(1000, 2000, 3000, 4000, 5000),
        few=(1000, 2000),
        repetitions=1,
        seconds=None,
        resolutions={
            32: (500, 1000, 2000, 4000),
            16: (1000, 2000, 4000, 8000, 16000),
            8: (1000, 2000, 4000, 8000, 16000),
        },
        widths=(128, 192, 256, 320),
        depths=(2, 4, 6, 8, 10, 12),
        embedding_depths=(2, 4),
        skips=(32, 16, 8),
        single_skips=(0, 1, 2),
        batches=tuple(range(128, 897, 128)),
        weight_decays=(0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
        emas=(0.99929, 0.999, 0.99, 0.9, 0.8, 0.5, 0.2, 0.1, 0.0),
        shares=(0.0, 0.2, 0.5, 0.8, 1.0),
        random_labels=(1, 2, 5, 10, 20, 50, 100, 500, 1000),
        random_sizes=(1000, 2000, 5000),
        unique_sizes=(50_000,),
        kinds={"dogs": _DOG, "cats": _CAT},
        other="imagenet-32.zip",
        law_sizes=(250, 500, 1000, 2000, 4000),
        half_sizes=(500, 2000, 8000, 25_000),
        half={"length": {"images": 40_000_000}, "samples": 2000},
        law={
            **_WATCHED,
            "network.model_channels": 128,
            "length": {"images": 80_000_000},
            "snapshots": 20,
            "samples": 2000,
            "training.ema": {"rule": "target", "target": 0.999},
            "watch": {"holdout": 2000, "stop_at": 0.6, "stop_after": 8_000_000},
        },
    ),
}
SCALES = tuple(_SCALES)


def build(
    name: str, scale: str = "digits", source: str | None = None, other: str | None = None, color: str | None = None
) -> Study:
    """The study of that name at a scale.

    Args:
        name: One of NAMES.
        scale: One of SCALES.
        source: The images instead of the scale's own.
        other: Those that the study of intra-class diversity mixes in, instead of the scale's own.
        color: "gray" or "rgb", as for `diffmem.data.derive`, instead of the scale's own.

    Raises:
        InputError: For unknown names, and for images where the study takes none.
    """
    if name not in _STUDIES:
        near = get_close_matches(name, NAMES, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"no study {name!r}: {meant}There are {', '.join(NAMES)}, or give a file of your own")
    if name in WITHOUT_IMAGES and not (source is None and other is None and color is None):
        raise InputError(f"study {name} is about data of its own, not images: leave out data, other and color")
    if scale not in SCALES:
        raise InputError(f"scale {scale!r}: choose from {', '.join(SCALES)}")
    made = _SCALES[scale]
    data = made.base.data
    if source is not None:
        data = replace(data, source=source)
    if color is not None:
        data = replace(data, color=color)
    made = replace(made, base=replace(made.base, data=data), other=made.other if other is None else other)
    study = _STUDIES[name](made)
    return study if name in WITHOUT_IMAGES else replace(study, notes=made.notes + study.notes)


def core_seconds(study: Study, scale: str) -> float | None:
    """What a study costs on one core at most, about: its training images, at the cost of the scale's reference network.
    None at a scale that needs a GPU. `diffmem study show --plan` measures it."""
    seconds = _MIXTURE_SECONDS if study.name in WITHOUT_IMAGES else _SCALES[scale].seconds
    if seconds is None:
        return None
    return sum(seconds * _images(trial.setting, trial.size) for trial in study.trials())


def _images(setting: Setting, size: int) -> int:
    """Images that a run sees, both networks of a pair together."""
    return images_of(size, **dict[str, Any](setting.length)) * (2 if setting.halves == "both" else 1)


def _variant(name: str, base: Setting, changes: dict[str, Any], x: float | None = None, sizes: Any = None) -> Variant:
    return Variant(name, Setting.from_json(changed(base.to_json(), changes)), x, sizes)


def _study(
    name: str,
    scale: _Scale,
    title: str,
    factor: str,
    variants: Iterable[Variant],
    sizes: Sequence[int] | None = None,
    **fields: Any,
) -> Study:
    variants, sizes = tuple(variants), tuple(scale.around if sizes is None else sizes)
    if len({size for variant in variants for size in variant.sizes or sizes}) == 1:
        fields["axis"] = "factor"  # a single point is no curve
    if "law" not in fields:
        fields["read_at"] = scale.read_at
    return Study(name, title, factor, variants, sizes, scale.repetitions, **fields)


def _size(scale: _Scale) -> Study:
    return _study(
        "size", scale, "Memorization against the number of training images", "training images",
        [_variant("reference", scale.base, {})], scale.sizes,
        questions=(Question("R_mem falls with the number of training images", kind=TREND, over="size", falls=True),),
    )  # fmt: skip


def _resolution(scale: _Scale) -> Study:
    variants = [
        _variant(f"{level}×{level}", scale.base, {"data.resolution": level}, level, sizes)
        for level, sizes in scale.resolutions.items()
    ]
    high, low = max(scale.resolutions), min(scale.resolutions)
    return _study(
        "resolution", scale, "Resolution of the images", "resolution", variants,
        questions=(Question("a lower resolution raises R_mem", f"{low}×{low}", f"{high}×{high}"),),
        published="resolution",
        notes=("Attention stays at half the resolution.",),
    )  # fmt: skip


def _classes(scale: _Scale) -> Study:
    every = 10  # that there are: all of them is the reference
    variants = [
        _variant(f"C = {count}", scale.base, {} if count == every else {"data.classes": count}, count)
        for count in (1, 2, 5, every)
    ]
    return _study(
        "classes", scale, "Number of classes", "classes", variants, scale.curves, axis="factor", log_axis=True,
        questions=(Question("R_mem falls as there are more classes", kind=TREND, falls=True),),
    )  # fmt: skip


def _diversity(scale: _Scale) -> Study:
    base, notes = scale.base, ("The other set must be labeled with CIFAR-10's class indices.",)
    if "ones" in scale.kinds:
        # There is no second set of digits: photographs stand in for it, one of their two labels being the class.
        base = replace(base, data=replace(base.data, color="gray"))
        notes = ("Images of the digit 1 are replaced by patches of a photograph, as there is no second set of digits.",)
    variants = [
        _variant(
            f"{kind}, α = {share:g}", base, {"data.only_class": index, "data.mix": [scale.other, share, index]}, share
        )
        for kind, index in scale.kinds.items()
        for share in scale.shares
    ]
    kind = next(iter(scale.kinds))
    levels = tuple(f"{kind}, α = {share:g}" for share in scale.shares)
    asked = f"R_mem of {kind} falls with intra-class diversity, the share α from another set"
    return _study(
        "diversity", scale, "Intra-class diversity: images of the class from another set", "share α", variants,
        axis="factor", notes=notes,
        questions=(Question(asked, kind=TREND, variants=levels, falls=True),),
    )  # fmt: skip


def _width(scale: _Scale) -> Study:
    levels = scale.widths
    variants = [_variant(f"{level} channels", scale.base, {"network.model_channels": level}, level) for level in levels]
    return _study(
        "width", scale, "Width of the network", "channels", variants, scale.curves,
        questions=(Question("a wider network memorizes more", f"{levels[-1]} channels", f"{levels[0]} channels"),),
    )  # fmt: skip


def _depth(scale: _Scale) -> Study:
    variants = [
        _variant(counted(level, "block"), scale.base, {"network.num_blocks": level}, level) for level in scale.depths
    ]
    return _study(
        "depth", scale, "Depth: residual blocks per resolution", "blocks", variants, axis="factor",
        questions=(Question("R_mem rises with the number of blocks", kind=TREND),),
        notes=("The paper finds no monotone effect of depth: it would say equivalent, or undecided.",),
    )  # fmt: skip


def _embedding(scale: _Scale) -> Study:
    depths = scale.embedding_depths
    variants = [
        _variant(
            f"{kind}, {counted(blocks, 'block')}", scale.base, {"network.embedding": kind, "network.num_blocks": blocks}
        )
        for kind in ("positional", "fourier")
        for blocks in depths
    ]
    return _study(
        "embedding", scale, "Embedding of the noise level", "embedding", variants, axis="factor",
        questions=tuple(
            Question(
                f"the positional embedding memorizes more than the Fourier one, {counted(blocks, 'block')}",
                f"positional, {counted(blocks, 'block')}", f"fourier, {counted(blocks, 'block')}",
            )
            for blocks in depths
        ),
    )  # fmt: skip


def _skips(scale: _Scale) -> Study:
    levels = scale.skips
    kept: dict[str, list[str] | None] = {"all": None, "none": []}
    for level in levels:
        kept[f"{level}×{level} only"] = [str(level)]
        kept |= {f"{level}.{index} only": [f"{level}.{index}"] for index in scale.single_skips}
    fine, coarse = f"{levels[0]}×{levels[0]} only", f"{levels[-1]}×{levels[-1]} only"
    variants = [
        _variant(name, scale.base, {} if names is None else {"network.skips": names}, position)
        for position, (name, names) in enumerate(kept.items())
    ]
    text = "skip connections at high resolution matter more than those at low resolution"
    return _study(
        "skips", scale, "Skip connections, by resolution", "skip connections kept", variants, scale.few[:1],
        axis="factor",
        questions=(
            Question(text, fine, coarse),
            Question("the skip connections at full resolution are nearly enough", "all", fine, kind=EQUIVALENCE),
        ),
        published="skips",
    )  # fmt: skip


def _batches(scale: _Scale, same_steps: bool = False) -> list[Variant]:
    """Batches with their learning rates. same_steps: the larger the batch, the longer the run, up to the scale's."""
    reference, lr = scale.base.training["batch"], scale.base.training["lr"]
    ((unit, longest),) = scale.base.length.items()
    variants = []
    for level in scale.batches:
        changes: dict[str, Any] = {"training.batch": level, "training.lr": lr * level / reference}
        if same_steps and level < max(scale.batches):
            changes["length"] = {unit: longest * level / max(scale.batches)}
        variants.append(_variant(f"batch {level}", scale.base, changes, level))
    return variants


def _batch(scale: _Scale) -> Study:
    return _study(
        "batch", scale, "Batch size, with the learning rate scaled accordingly", "batch", _batches(scale),
        axis="factor", log_axis=True,
        questions=(Question("R_mem rises with batch size and learning rate", kind=TREND),),
    )  # fmt: skip


def _batch_steps(scale: _Scale) -> Study:
    study = _study(
        "batch-steps", scale, "Batch size at the same number of steps, with the learning rate scaled accordingly",
        "batch", _batches(scale, same_steps=True), axis="factor", log_axis=True,
        notes=("Lengths in epochs are in proportion to the batch, so that all runs have as many steps.",),
        questions=(Question("at the same number of steps R_mem rises with batch size and learning rate", kind=TREND),),
    )  # fmt: skip
    return replace(study, read_at=None)  # the end of each run


def _weight_decay(scale: _Scale) -> Study:
    variants = [
        _variant(f"{level:g}", scale.base, {"training.weight_decay": level}, level) for level in scale.weight_decays
    ]
    small, large = f"{1e-4:g}", f"{1e-1:g}"
    return _study(
        "weight-decay", scale, "Weight decay", "weight decay", variants, scale.few, axis="factor", log_axis=True,
        questions=(
            Question("a large weight decay lowers R_mem", "0", large),
            Question("a small weight decay makes no difference", "0", small, kind=EQUIVALENCE),
        ),
    )  # fmt: skip


def _ema(scale: _Scale) -> Study:
    variants = [
        _variant(f"{level:g}", scale.base, {"training.ema": {"rule": "target", "target": level}}, level)
        for level in scale.emas
    ]
    return _study(
        "ema", scale, "EMA weights: final decay", "EMA decay", variants, scale.few, axis="factor",
        questions=(
            Question("EMA weights and the last weights memorize alike", f"{0.99:g}", "0", kind=EQUIVALENCE),
        ),
    )  # fmt: skip


def _conditioning(scale: _Scale) -> Study:
    labels = {"no labels": "none", "true labels": "true", "random labels, C = 10": "random:10"}
    return _study(
        "conditioning", scale, "Conditioning on labels", "labels",
        [_variant(name, scale.base, {"data.labels": value}) for name, value in labels.items()], scale.curves,
        questions=(
            Question("true labels raise R_mem", "true labels", "no labels"),
            Question("uninformative labels raise R_mem", "random labels, C = 10", "no labels"),
            Question("random labels do as much as true ones", "random labels, C = 10", "true labels", kind=EQUIVALENCE),
        ),
        published="conditioning",
    )  # fmt: skip


def _random_labels(scale: _Scale) -> Study:
    variants = [
        _variant(f"C = {count}", scale.base, {"data.labels": f"random:{count}"}, count) for count in scale.random_labels
    ]
    most = scale.random_labels[-1]
    last, occupied = f"C = {most}", f"C = {most}, occupied"
    # Where there are many more images than classes, hardly any class is without.
    sparse = tuple(size for size in scale.random_sizes if size <= 2 * most)
    changes = {"data.labels": f"random:{most}", "sampling.classes": OCCUPIED}
    variants.append(_variant(occupied, scale.base, changes, most, sparse))
    return _study(
        "random-labels", scale, "Random labels of C classes", "classes C", variants, scale.random_sizes, axis="factor",
        log_axis=True,
        questions=(
            Question("random labels of 10 classes raise R_mem", "C = 10", "C = 1"),
            Question("random labels of more classes raise R_mem further", last, "C = 10"),
            Question("classes without images lower R_mem", occupied, last),
            Question("more classes raise R_mem further where only those with images are sampled", occupied, "C = 10"),
        ),
        published="random_labels",
        notes=(
            "Of C random classes a share of about exp(−N/C) has no image, and images are sampled from those too;"
            " “occupied”: classes are drawn among those that have images, all other images are the same.",
        ),
    )  # fmt: skip


def _unique_labels(scale: _Scale) -> Study:
    base = scale.base
    if base.length == CIFAR10.length:
        fields = {
            "network.precond": "edm", "network.num_blocks": 4, "length": {"duration": 600}, "training.lr": 1e-3,
            "snapshots": 20,
        }  # fmt: skip
        base = Setting.from_json(changed(base.to_json(), fields))
    variants = [_variant("no labels", base, {}), _variant("unique labels", base, {"data.labels": "unique"})]
    return _study(
        "unique-labels", scale, "A label of its own for every image", "labels", variants, scale.unique_sizes,
        questions=(Question("unique labels raise R_mem", "unique labels", "no labels"),), published="unique_labels",
    )  # fmt: skip


def _law(name: str, title: str) -> Callable[[_Scale], Study]:
    """A law of the field (see `diffmem.studies.laws`); all of them are read off the same runs."""

    def study(scale: _Scale) -> Study:
        return _study(
            name, scale, title, "training images", [_variant("reference", scale.base, dict(scale.law))],
            scale.law_sizes, law=name, notes=("The runs of onset, early-warning and spurious are the same.",),
        )  # fmt: skip

    return study


def _halves(scale: _Scale) -> Study:
    changes = {"halves": "both", "level_off": None, "snapshots": 1, **scale.half}
    return _study(
        "halves", scale, "Two networks on disjoint halves: copying or agreeing", "training images of each half",
        [_variant("pairs", scale.base, changes)], scale.half_sizes, law="halves",
        notes=("Both networks are trained for as many images, whatever N is.",),
    )  # fmt: skip


def _crossover(scale: _Scale) -> Study:
    """Of mixtures, without images: the same at every scale."""
    base = Setting(DatasetSpec(NO_IMAGES), {"images": 260_000}, snapshots=1, samples=500, mixture={"share": 1.0})
    variants = [
        _variant(f"M = {share:g} N", base, {"mixture.share": share}, share) for share in (0.4, 0.6, 0.7, 0.8, 0.9, 1.0)
    ]
    return Study(
        "crossover", "Mixtures trained on mixtures: from generalizing to copying", "components M / samples N",
        tuple(variants), (50, 100, 200), 4, axis="factor", law="crossover",
        notes=(
            "Mixtures of M Gaussians trained on N samples of a mixture, without images: the same at every scale; "
            "lengths are in noisy samples.",
        ),
    )  # fmt: skip


_STUDIES: dict[str, Callable[[_Scale], Study]] = {
    "size": _size,
    "resolution": _resolution,
    "classes": _classes,
    "diversity": _diversity,
    "width": _width,
    "depth": _depth,
    "embedding": _embedding,
    "skips": _skips,
    "batch": _batch,
    "batch-steps": _batch_steps,
    "weight-decay": _weight_decay,
    "ema": _ema,
    "conditioning": _conditioning,
    "random-labels": _random_labels,
    "unique-labels": _unique_labels,
    "onset": _law("onset", "Onset of memorization against the number of training images"),
    "early-warning": _law("early-warning", "Early warning: the loss gap before there are copies"),
    "spurious": _law("spurious", "Between copying and generalizing: spurious images"),
    "crossover": _crossover,
    "halves": _halves,
}
NAMES = tuple(_STUDIES)
