"""From options to a run's configuration: the one way for `train`, `emm` and studies.

Options have flat names (`OPTIONS`), those of the command line. `training_parts` sorts them into the parts of a
configuration, on top of a preset; what nobody asked for is as `TrainingConfig` and `EMA` have it. `training_config`
puts parts and images together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffmem.data import ImageSet
from diffmem.data.classes import label_dim as label_dim_of
from diffmem.errors import InputError
from diffmem.training.augmentation import LABELS
from diffmem.training.config import TrainingConfig, images_of
from diffmem.training.ema import EMA
from diffmem.training.factors import denoiser_config
from diffmem.training.presets import PROTOCOL, fitting_preset, training_preset

# Each option's part of the configuration, and the name of its field there.
OPTIONS: dict[str, tuple[str, str]] = {
    **{name: ("network", name) for name in (
        "arch", "precond", "model_channels", "channel_mult", "num_blocks", "embedding", "attn_resolutions", "skips",
        "dropout",
    )},
    **{name: ("training", name) for name in (
        "batch", "optimizer", "lr", "warmup_epochs", "weight_decay", "momentum", "window", "xflip", "augment",
        "tikhonov", "precision",
    )},
    "ema_rule": ("ema", "rule"),
    "ema_target": ("ema", "target"),
    "ema_halflife": ("ema", "halflife_images"),
    "ema_protocol": ("ema", "protocol"),
    **{name: ("length", name) for name in ("images", "epochs", "duration")},
}  # fmt: skip
LENGTHS = tuple(name for name, (part, _) in OPTIONS.items() if part == "length")
# What parts may name of TrainingConfig: the rest follows from images, length and seed.
TRAINING_FIELDS = {field.name for field in dataclasses.fields(TrainingConfig)} - {"denoiser", "images", "seed"}
# Newer than the studies whose keys are made of all other fields: named only where they are asked for.
_NEWER = {("training", "precision"): TrainingConfig.precision, ("ema", "protocol"): EMA.protocol}


@dataclass(frozen=True)
class TrainingParts:
    """The parts of a configuration, all but the images.

    Attributes:
        preset: The name of the preset that was chosen.
        network: Arguments of `denoiser_config`.
        training: Fields of `TrainingConfig`, `ema` as those of `EMA`.
        length: Arguments of `images_of`.
    """

    preset: str
    network: dict[str, Any]
    training: dict[str, Any]
    length: dict[str, float]


def training_parts(resolution: int, preset: str | None = None, **options: Any) -> TrainingParts:
    """The parts that options ask for, for images of that size.

    Args:
        resolution: Height and width of the images, pixels.
        preset: See `training_preset`; None: by the images' size, the protocol's where an `arch` is asked for.
        **options: See `OPTIONS`; None asks for nothing.

    Raises:
        InputError: There is no such option or preset.

    Example:
        >>> parts = training_parts(8, epochs=10, lr=1e-3)
        >>> parts.preset, parts.training["batch"], parts.training["lr"], parts.length
        ('small_8', 64, 0.001, {'epochs': 10})
    """
    if unknown := set(options) - set(OPTIONS):
        raise InputError(f"there is no option {', '.join(sorted(unknown))}: there are {', '.join(OPTIONS)}")
    asked: dict[str, dict[str, Any]] = {"network": {}, "training": {}, "ema": {}, "length": {}}
    for name, value in options.items():
        place = OPTIONS[name]
        if value is not None and not (place in _NEWER and value == _NEWER[place]):
            asked[place[0]][place[1]] = value
    preset = preset or (PROTOCOL if "arch" in asked["network"] else fitting_preset(resolution))
    base = training_preset(preset)
    ema = _defaults("ema", EMA)
    if not asked["ema"]:
        ema |= base.training.get("ema", {})
    else:  # the preset's rule has its target, and goes with it
        ema |= {"rule": "target"} if "target" in asked["ema"] else {}
        ema |= asked["ema"]
    training = {**_defaults("training", TrainingConfig), **base.training, **asked["training"], "ema": ema}
    return TrainingParts(preset, {**base.network, **asked["network"]}, training, asked["length"])


def training_config(
    images: ImageSet,
    *,
    length: Mapping[str, float],
    network: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    conditional: bool = False,
    label_dim: int | None = None,
    seed: int = 0,
) -> TrainingConfig:
    """The configuration of a run on `images`.

    Args:
        images: The training set: it decides sizes, classes, and the length in epochs.
        length: Exactly one of images, epochs and duration; see `images_of`.
        network: Arguments of `denoiser_config`, but for those that follow from the images.
        training: Fields of `TrainingConfig`, but for denoiser, images and seed; `ema` as fields of `EMA`.
        conditional: A class-conditional model, on the labels of the images.
        label_dim: Number of its classes; None: by the labels.
        seed: Seed of the run.

    Raises:
        InputError: A field is unknown or makes no sense; the message names it.

    Example:
        >>> from diffmem.data import load_images
        >>> digits = load_images("builtin:digits", limit=100)
        >>> config = training_config(digits, length={"epochs": 2}, training={"batch": 50})
        >>> config.images, config.batch, config.denoiser.network.resolution
        (200, 50, 8)
    """
    network, training = dict(network or {}), dict(training or {})
    check_parts(length, training)
    if label_dim is None:
        label_dim = label_dim_of(images, "conditional=True") if conditional else 0
    try:
        ema = EMA(**training.pop("ema", {}))
    except TypeError as error:
        raise InputError(f"ema: a field is unknown ({error})") from None
    denoiser = denoiser_config(
        images.image_shape[1],
        images.image_shape[0],
        label_dim=label_dim,
        augment_dim=LABELS if training.get("augment") else 0,
        **network,
    )
    seen = images_of(items_per_epoch(images, bool(training.get("xflip"))), **dict[str, Any](length))
    return TrainingConfig(denoiser, seen, seed=seed, ema=ema, **training)


def check_parts(length: Mapping[str, float], training: Mapping[str, Any]) -> None:
    """Raises InputError unless `length` and `training` are as `training_config` takes them, as far as names go."""
    if unknown := set(length) - set(LENGTHS):
        raise InputError(
            f"the length of training is one of {', '.join(LENGTHS)}, not {', '.join(sorted(map(str, unknown)))}"
        )
    if unknown := set(training) - TRAINING_FIELDS:
        raise InputError(
            f"training has no field {', '.join(sorted(unknown))}: there are {', '.join(sorted(TRAINING_FIELDS))}"
        )


def items_per_epoch(images: ImageSet, xflip: bool) -> int:
    """Images of an epoch: with `xflip` the mirrored ones count too."""
    return len(images) * (2 if xflip else 1)


def _defaults(part: str, kind: type) -> dict[str, Any]:
    """What the options of a part are where nobody asks, by field."""
    fields = [place[1] for place in OPTIONS.values() if place[0] == part and place not in _NEWER]
    return {name: getattr(kind, name) for name in fields}
