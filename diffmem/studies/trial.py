"""A trial: one training run with its audits, named by the hash of all that decides its result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.data import ImageSet, Mix, derive, load_images
from diffmem.data.classes import class_indices
from diffmem.data.classes import label_dim as label_dim_of
from diffmem.data.subsets import RANDOM_LABEL_SEED, has_classes, parse_labels
from diffmem.errors import InputError
from diffmem.sampling import SamplerConfig
from diffmem.training import EMA, TrainingConfig, denoiser_config, images_of

# Fields of TrainingConfig that a setting may name; the others follow from the data, the length and the repetition.
_TRAINING = {f.name for f in dataclasses.fields(TrainingConfig)} - {"denoiser", "images", "seed"}
_LENGTHS = ("images", "epochs", "duration")
_SAMPLING = {f.name for f in dataclasses.fields(SamplerConfig)} - {"precision", "class_index"}


@dataclass(frozen=True)
class DataRecipe:
    """Where the training images come from, all but how many: the P of EMM(P, M, T).

    Attributes:
        source: What `diffmem.load_images` reads from a path or name.
        color: As for `diffmem.data.derive`.
        resolution: As for `diffmem.data.derive`.
        classes: As for `diffmem.data.derive`.
        only_class: The images of this class alone.
        labels: As for `diffmem.data.derive`; labels other than "none" make the model conditional on them.
        mix: (source, share, class): a share of a class's images replaced by those of another source.
    """

    source: str
    color: str | None = None
    resolution: int | None = None
    classes: int | None = None
    only_class: int | None = None
    labels: str = "none"
    mix: tuple[str, float, int] | None = None

    def __post_init__(self):
        if not isinstance(self.source, str):
            raise InputError(f"the source of a study's images is a path or a name, not a {type(self.source).__name__}")
        parse_labels(self.labels)
        if self.mix is not None:
            object.__setattr__(self, "mix", tuple(self.mix))

    def training_set(self, size: int, repetition: int = 0) -> ImageSet:
        """The `size` training images of a repetition. Those of a smaller size are among them, up to the remainder that
        the last class takes (see `class_balanced`); repetition 0 takes the first images of each class, others take
        them in an order of their own. Raises InputError as `derive` does.
        """
        return derive(
            self._images(),
            color=self.color,
            resolution=self.resolution,
            classes=self.classes,
            size=size,
            mix=None if self.mix is None else Mix(*self.mix),
            labels=self.labels,
            label_seed=RANDOM_LABEL_SEED + repetition,
            seed=None if repetition == 0 else repetition,
        ).images

    def limits(self) -> tuple[int, int]:
        """(number of classes, of which sizes should be multiples; the largest size that is one)."""
        _, counts = np.unique(self._images().labels, return_counts=True)
        counts = counts[: self.classes]
        return len(counts), int(counts.min()) * len(counts)

    def _images(self) -> ImageSet:
        """What the training sets are taken from, with class indices."""
        images = _loaded(self.source, Path(self.source).stat().st_mtime_ns if Path(self.source).exists() else 0)
        if self.labels == "true":
            class_indices(images, "labels='true'")
        elif self.classes is not None or self.only_class is not None:
            class_indices(images, "a choice of classes", any_number=True)
        if not has_classes(images):
            # Without classes to balance, all images are of one.
            return replace(images, labels=np.zeros(len(images), np.int64))
        if self.only_class is None:
            return images
        chosen = np.flatnonzero(images.labels == self.only_class)
        if not len(chosen):
            raise InputError(f"{images.source}: no image has class {self.only_class}")
        return images.select(chosen)


@dataclass(frozen=True)
class Setting:
    """What memorization is studied of, but for the number of images and the repetition: P, M and T of EMM(P, M, T).

    Attributes:
        data: P, the distribution of training images.
        length: One of images, epochs, duration (see `images_of`).
        network: M, arguments of `diffmem.training.denoiser_config`.
        training: T, fields of `TrainingConfig`, `ema` as those of `EMA`.
        snapshots: R_mem is the highest over so many, evenly spaced.
        samples: Images generated per snapshot at most.
        sampling: Fields of `SamplerConfig`, all but precision and class_index.
        threads: On the CPU, of every run, wherever it is made, for sums are rounded in an order that depends on their
            number; None: one.
    """

    data: DataRecipe
    length: Mapping[str, float]
    network: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    snapshots: int = 10
    samples: int = 10_000
    sampling: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None

    def __post_init__(self):
        if len(self.length) != 1 or set(self.length) - set(_LENGTHS):
            raise InputError(f"the length of training is one of {', '.join(_LENGTHS)}, not {dict(self.length)}")
        if unknown := set(self.training) - _TRAINING:
            raise InputError(f"training has no field {', '.join(sorted(unknown))}: there are {', '.join(_TRAINING)}")
        for name in ("snapshots", "samples", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, but must be at least 1")
        self.sample_settings()

    def sample_settings(self) -> SamplerConfig:
        """How images are sampled; raises InputError for unknown fields."""
        if unknown := set(self.sampling) - _SAMPLING:
            raise InputError(f"sampling has no field {', '.join(sorted(unknown))}: there are {', '.join(_SAMPLING)}")
        return SamplerConfig(**self.sampling)

    def config(self, images: ImageSet, repetition: int = 0) -> TrainingConfig:
        """The training run on `images`."""
        label_dim = 0
        if self.data.labels != "none":
            kind, classes = parse_labels(self.data.labels)
            label_dim = classes if kind == "random" else label_dim_of(images, "a conditional model")
        training = {name: value for name, value in self.training.items() if name != "ema"}
        items = len(images) * (2 if training.get("xflip") else 1)
        denoiser = denoiser_config(
            images.image_shape[1],
            images.image_shape[0],
            label_dim=label_dim,
            augment_dim=9 if training.get("augment") else 0,
            **self.network,
        )
        return TrainingConfig(
            denoiser,
            images_of(items, **self.length),
            seed=repetition,
            ema=EMA(**self.training.get("ema", {})),
            **training,
        )

    def to_json(self) -> dict[str, Any]:
        """The setting as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Setting:
        """The setting that `to_json` gave; raises InputError naming what is missing or unknown."""
        try:
            return Setting(**{**values, "data": DataRecipe(**values["data"])})
        except (TypeError, KeyError) as error:
            raise InputError(f"a setting: a field is missing, unknown or of the wrong type ({error})") from None


@dataclass(frozen=True)
class Trial:
    """One training run of a setting, with its audits.

    Attributes:
        setting: What is trained.
        size: N, training images.
        repetition: Decides the subset and the run's seed.
        at_least: Where given, the run ends as soon as it is decided whether R_mem reaches this; else R_mem is measured
            with all samples.
    """

    setting: Setting
    size: int
    repetition: int = 0
    at_least: float | None = None

    def __post_init__(self):
        if self.size < 2 or self.repetition < 0:
            raise InputError(f"a run on {self.size} images, repetition {self.repetition}: at least 2, and 0")
        if self.at_least is not None and not 0 < self.at_least <= 1:
            raise InputError(f"at_least is {self.at_least}, but must be a share above 0")

    @property
    def key(self) -> str:
        """16 hexadecimal digits that stand for all of the above."""
        text = json.dumps(_without_none(self.to_json()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """The trial as plain JSON values."""
        return {
            "setting": self.setting.to_json(),
            "size": self.size,
            "repetition": self.repetition,
            "at_least": self.at_least,
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Trial:
        """The trial that `to_json` gave."""
        return Trial(**{**values, "setting": Setting.from_json(values["setting"])})


@lru_cache(maxsize=1)
def _loaded(source: str, changed: int) -> ImageSet:
    """The images of a source, read once for all the trials of a study."""
    return load_images(source)


def _without_none(values: Any) -> Any:
    """What is None is as if it were not there: a field that is added later changes no key."""
    if isinstance(values, Mapping):
        return {name: _without_none(value) for name, value in values.items() if value is not None}
    return values
