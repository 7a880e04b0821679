"""`DatasetSpec`: a training set by name, with all that makes it: how it is read, and what is taken of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.data.classes import class_indices
from diffmem.data.containers import HF
from diffmem.data.image_set import ImageRecipe, ImageSet
from diffmem.data.image_source import ImageSource
from diffmem.data.load import load_images
from diffmem.data.subsets import RANDOM_LABEL_SEED, DerivedSet, Mix, derive, has_classes, parse_labels
from diffmem.errors import InputError
from diffmem.inert.boundary import short
from diffmem.progress import Progress, silent

# How runs called two fields before they had the names of `derive`.
_EARLIER = {"path": "source", "resize": "resolution"}
_READING = (
    "source", "limit", "color", "resolution", "center_crop", "value_range", "alpha", "key", "layout", "skip_bad",
)  # fmt: skip


@dataclass(frozen=True)
class DatasetSpec(ImageRecipe):
    """A training set by name: what it is read from, in what form, and what is taken of it.

    `load_images`, and so everything that takes images, takes one. All fields but `source` are those of `derive`, which
    says in what order they act.

    Attributes:
        source: What `load_images` reads from a path or a name.
        size: The class-balanced subset of so many images (the first so many where there are no class numbers).
        resolution: Height and width, in pixels.
        color: "gray" or "rgb".
        limit: As for `load_images`.
        center_crop: As for `load_images`.
        value_range: As for `load_images`.
        alpha: As for `load_images`.
        key: As for `load_images`.
        layout: As for `load_images`.
        skip_bad: As for `load_images`.
        only_class: The images of this class alone.
        classes: Only so many classes, the first ones.
        mix: (source, share, class): a share of a class's images replaced by those of another source.
        labels: None, "true", "consecutive", "none", "random:C" or "unique"; see `derive`.
        label_seed: Seed of random labels; None: the sequence of the paper's public code.
        seed: Seed of the subset and the mixture; None takes first images.

    Raises:
        InputError: A value that makes no sense; the message names the field.

    Example:
        >>> spec = DatasetSpec("builtin:digits", size=20, labels="random:2")
        >>> spec.load()
        ImageSet(builtin:digits: uint8 [20, 1, 8, 8], labels int64 [20])
        >>> spec.to_json()
        {'source': 'builtin:digits', 'size': 20, 'labels': 'random:2'}
        >>> DatasetSpec.from_json(spec.to_json()) == spec
        True
    """

    source: str
    size: int | None = None
    resolution: int | None = None
    color: str | None = None
    limit: int | None = None
    center_crop: bool = False
    value_range: tuple[float, float] | None = None
    alpha: str | None = None
    key: str | None = None
    layout: str | None = None
    skip_bad: bool = False
    only_class: int | None = None
    classes: int | None = None
    mix: Mix | None = None
    labels: str | None = None
    label_seed: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if not isinstance(self.source, (str, os.PathLike)):
            raise InputError(f"the source of a data set is a path or a name, not a {type(self.source).__name__}")
        put("source", os.fspath(self.source))
        for name, low in _WHOLE.items():
            value = getattr(self, name)
            if value is not None and (not _is_whole(value) or value < low):
                raise InputError(f"{name} is {short(value)}, but must be a whole number of at least {low}")
            put(name, None if value is None else int(value))
        for name in ("center_crop", "skip_bad"):
            if type(getattr(self, name)) is not bool:
                raise InputError(f"{name} is {short(getattr(self, name))}, but must be true or false")
        put("color", "gray" if self.color == "grey" else self.color)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise InputError(f"{name} is {short(value)}, but must be {' or '.join(choices)}")
        for name in ("key", "labels"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InputError(f"{name} is {short(value)}, but must be text")
        if self.labels is not None:
            parse_labels(self.labels)
        if self.only_class is not None and not _is_whole(self.only_class):
            raise InputError(f"only_class is {short(self.only_class)}, but must be the number of a class")
        if self.value_range is not None:
            put("value_range", _numbers("value_range", self.value_range))
        if self.mix is not None:
            put("mix", _mix(self.mix))

    def absolute(self) -> DatasetSpec:
        """The same with absolute paths, for what is read from another folder later."""
        mix = None if self.mix is None else self.mix._replace(other=_absolute(self.mix.other))
        return replace(self, source=_absolute(self.source), mix=mix)

    def reading(self) -> DatasetSpec:
        """What is read before anything is taken of it: the spec with its reading options alone."""
        return DatasetSpec(**{name: getattr(self, name) for name in _READING})

    def load(self, progress: Progress = silent, read: ImageSet | None = None) -> ImageSet:
        """The images.

        Args:
            progress: Called as `progress(stage, done, total)`.
            read: What `reading().load()` gave, where several sets are made of one source.

        Raises:
            InputError: The source cannot be read, or does not hold what is asked for.
        """
        if self == self.reading():
            return self._read(progress) if read is None else read
        return self.derive(progress, read).images

    def derive(self, progress: Progress = silent, read: ImageSet | None = None) -> DerivedSet:
        """The images with the manifest of how they were made, as `diffmem dataset` writes them.

        Args:
            progress: As for `load`.
            read: As for `load`.
        """
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("source", "mix")}
        options["label_seed"] = RANDOM_LABEL_SEED if self.label_seed is None else self.label_seed
        return derive(self.source if read is None else read, mix=self.mix, **options, progress=progress)

    def limits(self, read: ImageSet | None = None) -> tuple[int, int]:
        """(C, the largest size): the number of classes, of which sizes should be multiples, and the largest such.

        Args:
            read: As for `load`.
        """
        images = replace(self, size=None, mix=None, labels=None).load(read=read)
        if self.labels == "true":
            class_indices(images, "labels='true'")
        if not has_classes(images):
            return 1, len(images)
        _, counts = np.unique(class_indices(images, "a choice of sizes", any_number=True), return_counts=True)
        return len(counts), int(counts.min()) * len(counts)

    def to_json(self) -> dict[str, Any]:
        """The fields that are not left at their defaults, as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values = {f.name: values[f.name] for f in dataclasses.fields(self) if values[f.name] != f.default}
        if self.color == "gray":
            values["color"] = "grey"  # as runs and studies have recorded it, whose keys depend on it
        return json.loads(json.dumps(values))

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> DatasetSpec:
        """The spec that `to_json` gave, or that an earlier version recorded in a run.

        Args:
            values: Plain JSON values.

        Raises:
            InputError: A field is unknown, missing, or makes no sense.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"a data set: must be a mapping of fields, not {short(values)}")
        named = {_EARLIER.get(name, name): value for name, value in values.items()}
        if unknown := set(named) - {f.name for f in dataclasses.fields(DatasetSpec)}:
            raise InputError(f"a data set has no field {', '.join(sorted(map(str, unknown)))}")
        if "source" not in named:
            raise InputError("a data set needs a source")
        return DatasetSpec(**named)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is asked for, as JSON (not of the pixels: that is `ImageSet.fingerprint`)."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _read(self, progress: Progress) -> ImageSet:
        options = {name: getattr(self, name) for name in _READING if name not in ("source", "resolution")}
        return load_images(self.source, resize=self.resolution, **options, progress=progress)


_WHOLE = {"size": 1, "resolution": 1, "limit": 1, "classes": 1, "label_seed": 0, "seed": 0}
_CHOICES = {"color": ("gray", "rgb"), "alpha": ("drop", "white", "black"), "layout": ("NCHW", "NHWC")}


def read_data(data: ImageSource, progress: Progress = silent) -> tuple[ImageSet, DatasetSpec | None]:
    """The images of `data`, and how to find them again, where there is a way.

    Args:
        data: Anything that `load_images` reads.
        progress: Called as `progress(stage, done, total)`.
    """
    if isinstance(data, (str, os.PathLike)):
        data = DatasetSpec(os.fspath(data))
    if isinstance(data, DatasetSpec):
        return data.load(progress), data.absolute()
    return data if isinstance(data, ImageSet) else load_images(data, progress=progress), None


def _absolute(source: Any) -> Any:
    if not isinstance(source, (str, os.PathLike)) or os.fspath(source).startswith("builtin:"):
        return source
    if os.fspath(source).startswith(HF):
        path, mark, query = os.fspath(source).removeprefix(HF).partition("?")
        return f"{HF}{Path(path).expanduser().absolute()}{mark}{query}"
    return str(Path(source).expanduser().absolute())


def _numbers(name: str, values: Any) -> tuple[float, float]:
    if not isinstance(values, (tuple, list)) or len(values) != 2 or not all(_is_number(value) for value in values):
        raise InputError(f"{name} is {short(values)}, but must be two numbers")
    return values[0], values[1]


def _mix(mix: Any) -> Mix:
    """A mixture of a source by name."""
    if not isinstance(mix, (tuple, list)) or len(mix) != 3:
        raise InputError(f"mix is {short(mix)}, but must be (source, share, class)")
    other, share, class_index = mix
    if not isinstance(other, (str, os.PathLike)) or not _is_number(share) or not _is_whole(class_index):
        raise InputError(f"mix is {short(mix)}, but must be (a path or name, a share, the number of a class)")
    return Mix(os.fspath(other), share, int(class_index))


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
