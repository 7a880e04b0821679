"""A trial: one training run with its audits, named by the hash of all that decides its result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.data import DatasetSpec, ImageSet
from diffmem.data.classes import class_indices
from diffmem.data.classes import label_dim as label_dim_of
from diffmem.data.subsets import RANDOM_LABEL_SEED, parse_labels
from diffmem.errors import InputError
from diffmem.memorization import check_criterion
from diffmem.sampling import SamplerConfig
from diffmem.studies.leveling import audit_steps
from diffmem.studies.mixture import Mixture
from diffmem.studies.watch import Watch
from diffmem.training import TrainingConfig, images_of, training_config
from diffmem.training.configure import check_parts

OCCUPIED = "occupied"
SECOND_SEED = 1_000_000  # of the second network: it shares neither its first weights nor its noise with the first
_SAMPLING = {f.name for f in dataclasses.fields(SamplerConfig)} - {"precision", "class_index"}


@dataclass(frozen=True)
class Setting:
    """What memorization is studied of, but for the number of images and the repetition: P, M and T of EMM(P, M, T).

    Attributes:
        data: P, the distribution of training images: a recipe without size and seeds. Its labels None count as "none":
            other labels make the model conditional on them.
        length: One of images, epochs, duration (see `images_of`).
        network: M, arguments of `diffmem.training.denoiser_config`.
        training: T, fields of `TrainingConfig`, `ema` as those of `EMA`.
        snapshots: R_mem is the highest over so many, evenly spaced.
        samples: Images generated per snapshot at most.
        sampling: Fields of `SamplerConfig`, all but precision and class_index. classes "occupied": those that the
            run's training images have; random labels leave some without any.
        threads: On the CPU, of every run, wherever it is made, for sums are rounded in an order that depends on their
            number; None: one.
        criterion: By which images are copies, in place of the ratio rule, as for `diffmem.evaluation.trajectory`.
        level_off: The run ends once R_mem has leveled off, at the latest after `length`: the number of standard errors
            that R_mem may rise over a doubling of the length and still count as level (see `leveling`). Its audits, at
            most `snapshots`, stand at lengths a factor of √2 apart. None: the run has its whole length, and audits are
            evenly spaced.
        watch: Fields of `diffmem.studies.watch.Watch`: what is measured of every snapshot beside its copies, and when
            the run ends by it; audits then stand at lengths a factor of √2 apart, too.
        mixture: Fields of `diffmem.studies.mixture.Mixture`, which is then trained on data of its own, without images:
            `data`, `network`, `training` and `sampling` say nothing, `length` is in its noisy samples.
        halves: "both": two networks are trained, each on N images of its own (see `diffmem.studies.laws.halves`).
            "first" or "second": one of them, by itself. The first one's images are those of a run without halves.
    """

    data: DatasetSpec
    length: Mapping[str, float]
    network: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    snapshots: int = 10
    samples: int = 10_000
    sampling: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None
    criterion: str | None = None
    level_off: float | None = None
    watch: Mapping[str, Any] | None = None
    mixture: Mapping[str, Any] | None = None
    halves: str | None = None

    def __post_init__(self) -> None:
        for name in ("size", "seed", "label_seed"):
            if getattr(self.data, name) is not None:
                raise InputError(
                    f"the data of a setting must not have a {name}: the size and repetition of each run set it"
                )
        if self.data.labels is None:
            object.__setattr__(self, "data", replace(self.data, labels="none"))
        check_parts(self.length, self.training)
        images_of(1000, **dict[str, Any](self.length))  # raises unless it is exactly one
        # 3000.0 epochs, as a command line gives them, are the 3000 of a preset: one trial with one key.
        lengths = {name: int(value) if float(value).is_integer() else value for name, value in self.length.items()}
        object.__setattr__(self, "length", lengths)
        for name in ("snapshots", "samples", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.level_off is not None and not (self.level_off >= 0 and self.snapshots >= 4):
            raise InputError(
                f"level_off is {self.level_off} with {self.snapshots} snapshots, but must be at least 0, with 4 or more"
            )
        if self.watch is not None:
            Watch.of(self.watch)
            if self.level_off is not None or (self.data.labels or "none") == "unique":
                raise InputError("watch: goes with neither level_off nor a label of its own for every image")
        if self.mixture is not None:
            Mixture.of(self.mixture)
            if self.level_off is not None or self.watch is not None or self.criterion not in (None, "ratio"):
                raise InputError("mixture: goes with neither level_off, watch nor a criterion other than ratio")
        if self.halves not in (None, "both", "first", "second"):
            raise InputError(f"halves is {self.halves!r}, but must be 'both', 'first' or 'second'")
        if self.halves is not None and any(each is not None for each in (self.mixture, self.watch, self.level_off)):
            raise InputError("halves: goes with neither mixture, watch nor level_off")
        if check_criterion(self.criterion) == "ratio":  # the default, under which results were stored without its name
            object.__setattr__(self, "criterion", None)
        self.sample_settings()

    def dataset(self, size: int, repetition: int = 0) -> DatasetSpec:
        """What the `size` training images of a repetition are. Those of a smaller size are among them, up to the
        remainder that the last class takes (see `class_balanced`); repetition 0 takes the first images of each class,
        others take them in an order of their own.
        """
        if repetition == 0:
            return replace(self.data, size=size)
        return replace(self.data, size=size, seed=repetition, label_seed=RANDOM_LABEL_SEED + repetition)

    def training_set(self, size: int, repetition: int = 0) -> ImageSet:
        """The images of `dataset`, whose source is read once for all sizes; raises InputError as `derive` does."""
        read = self._source()
        images = self.dataset(size, repetition).load(read=read)
        if self.halves != "second":
            return images
        both = self.dataset(2 * size, repetition).load(read=read)
        taken, rest = Counter(image.tobytes() for image in images.images), []
        for row, image in enumerate(both.images):
            if taken[image.tobytes()] > 0:
                taken[image.tobytes()] -= 1
            else:
                rest.append(row)
        if len(rest) != size:
            raise InputError(
                f"{self.data.source}: {size:,} images are not half of {2 * size:,} with as many of each class: choose "
                f"a multiple of {self.limits()[0]}"
            )
        return both.select(np.array(rest))

    def pool(self) -> ImageSet:
        """All images that training sets are taken from."""
        return replace(self.data, labels="none").load(read=self._source())

    def _source(self) -> ImageSet:
        """All images of the source, read once."""
        return _read(self.data.reading(), _changed(self.data.source))

    def unseen(self, size: int, repetition: int = 0) -> ImageSet | None:
        """The images that `watch` keeps from the runs of a repetition, the same ones for all sizes; None where nothing
        is watched. Raises InputError where `size` leaves too few."""
        if self.watch is None:
            return None
        count = Watch.of(self.watch).holdout
        classes, most = self.limits()
        rest = (most - count) // classes * classes
        if size > rest:
            raise InputError(
                f"{self.data.source}: N = {size:,} leaves fewer than {count:,} images unseen: the largest size is "
                f"{rest:,}"
            )
        everything, trained = (self.training_set(each, repetition) for each in (most, rest))
        seen = {image.tobytes() for image in trained.images}
        return everything.select(
            np.array([row for row, each in enumerate(everything.images) if each.tobytes() not in seen])
        )

    @property
    def spread_audits(self) -> bool:
        """Whether audits stand at lengths a factor of √2 apart."""
        return self.level_off is not None or self.watch is not None

    def audit_interval(self, images: int, batch: int) -> int:
        """From one snapshot to the next, in images, of a run of so many; audits stand at multiples of it."""
        steps = math.ceil(images / batch)
        last = audit_steps(self.snapshots)[-1] if self.spread_audits else self.snapshots
        return math.ceil(steps / last) * batch

    def audit_epochs(self, size: int) -> list[float]:
        """After how many epochs a run of N = `size` is audited, if nothing ends it before."""
        batch = int(self.training.get("batch", TrainingConfig.batch))
        images = images_of(size, **dict[str, Any](self.length))
        interval = self.audit_interval(images, batch)
        places = audit_steps(self.snapshots) if self.spread_audits else range(1, self.snapshots + 1)
        end = math.ceil(images / batch) * batch
        return [place / size for place in sorted({min(place * interval, end) for place in places})]

    def limits(self) -> tuple[int, int]:
        """(number of classes, of which sizes should be multiples; the largest size that is one)."""
        return self.data.limits(self._source())

    def sample_settings(self, training: ImageSet | None = None) -> SamplerConfig:
        """How images are sampled.

        Args:
            training: The run's training set, whose labels say which classes are occupied; None: before it is known,
                all of them count as such.

        Raises:
            InputError: For unknown fields.
        """
        if unknown := set(self.sampling) - _SAMPLING:
            raise InputError(f"sampling has no field {', '.join(sorted(unknown))}: there are {', '.join(_SAMPLING)}")
        values = dict(self.sampling)
        if values.get("classes") == OCCUPIED:
            values["classes"] = None if training is None else self._occupied(training)
        return SamplerConfig(**values)

    def _occupied(self, training: ImageSet) -> tuple[int, ...] | None:
        """The classes of a run's training images; None where the model has none."""
        if self.data.labels == "none":
            return None
        return tuple(np.unique(class_indices(training, f"sampling classes='{OCCUPIED}'")).tolist())

    def config(self, images: ImageSet, repetition: int = 0) -> TrainingConfig:
        """The training run on `images`."""
        kind, classes = parse_labels(self.data.labels or "none")
        if kind not in ("none", "random"):
            classes = label_dim_of(images, f"labels='{kind}'")
        return training_config(
            images,
            length=self.length,
            network=self.network,
            training=self.training,
            label_dim=classes or 0,
            seed=repetition + (SECOND_SEED if self.halves == "second" else 0),
        )

    def to_json(self) -> dict[str, Any]:
        """The setting as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.loads(json.dumps({**values, "data": self.data.to_json()}))

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Setting:
        """The setting that `to_json` gave; raises InputError naming what is missing or unknown."""
        try:
            return Setting(**{**values, "data": DatasetSpec.from_json(values["data"])})
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

    def __post_init__(self) -> None:
        if self.size < 2 or self.repetition < 0:
            raise InputError(
                f"a run on {self.size} images, repetition {self.repetition}: size must be at least 2 and "
                "repetition at least 0"
            )
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
def _read(spec: DatasetSpec, changed: int) -> ImageSet:
    """The images of a source, read once for all the trials of a study."""
    return spec.load()


def _changed(source: str) -> int:
    """When the file or folder `source` was changed last."""
    path = Path(source).expanduser()
    return path.stat().st_mtime_ns if path.exists() else 0


def _without_none(values: Any) -> Any:
    """What is None is as if it were not there: a field that is added later changes no key."""
    if isinstance(values, Mapping):
        return {name: _without_none(value) for name, value in values.items() if value is not None}
    return values
