"""Where a run's training set comes from, so that what comes after the run finds it again."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffmem.data import ImageSet, load_images
from diffmem.data.subsets import subset
from diffmem.progress import Progress, silent


@dataclass(frozen=True)
class DataSource:
    """A training set by name: read from `path`, brought to one size and color, and cut down to a subset.

    Attributes:
        path: Whatever `diffmem.load_images` reads from a name; a file's becomes absolute.
        size: The class-balanced subset of so many images (the first so many where there are no class numbers).
        resize: N for N×N pixels.
        color: "gray" or "rgb".
        alpha: As for `load_images`.
        key: As for `load_images`.
        layout: As for `load_images`.
        skip_bad: As for `load_images`.

    Example:
        >>> DataSource("builtin:digits", size=20).load()
        ImageSet(builtin:digits: uint8 [20, 1, 8, 8], labels int64 [20])
    """

    path: str
    size: int | None = None
    resize: int | None = None
    color: str | None = None
    alpha: str | None = None
    key: str | None = None
    layout: str | None = None
    skip_bad: bool = False

    def __post_init__(self):
        path = str(self.path)
        object.__setattr__(
            self, "path", path if path.startswith("builtin:") else str(Path(path).expanduser().absolute())
        )

    def load(self, progress: Progress = silent) -> ImageSet:
        """The images. Raises InputError where they cannot be read, or are fewer than `size`."""
        options = {name: value for name, value in self.to_json().items() if name not in ("path", "size")}
        images = load_images(self.path, **options, progress=progress)
        return images if self.size is None else subset(images, self.size)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_data(data: Any, progress: Progress = silent) -> tuple[ImageSet, DataSource | None]:
    """The images of `data`, and how to find them again, where there is a way.

    Args:
        data: A DataSource, an ImageSet, or anything that `load_images` reads.
        progress: Called as `progress(stage, done, total)`.
    """
    if isinstance(data, (str, os.PathLike)):
        data = DataSource(os.fspath(data))
    if isinstance(data, DataSource):
        return data.load(progress), data
    return data if isinstance(data, ImageSet) else load_images(data, progress=progress), None
