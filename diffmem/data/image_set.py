"""The one form in which images travel through diffmem: an `ImageSet`."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from diffmem.errors import InputError
from diffmem.progress import Progress, silent


@dataclass(frozen=True)
class SkippedFile:
    """A file that could not be read and was skipped because the caller asked for that (`skip_bad`).

    Attributes:
        name: Name of the file, relative to its source.
        reason: Why it was skipped, in words.
    """

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with their names and labels: the one form in which images travel through diffmem.

    Attributes:
        images: [N, C, H, W] uint8 (gray levels 0–255), or float32 / float64; it may be a memory map and is never
            written to.
        names: N file names relative to the source, or None where the source has none (arrays).
        labels: int64 [N] class indices, float32 [N, L] vectors, or None.
        source: Where they came from, in words fit for a report.
        skipped: Files that were skipped.
        notes: What else a person should know about the reading, one line each.
        sheets: (rows, columns) where the images looked like sheets of so many images in a grid, before they were
            resized; else None.

    Raises:
        InputError: The images have not four axes or another dtype, or there are more or fewer names or labels than
            images.

    Example:
        >>> images = ImageSet(np.zeros((4, 1, 8, 8), np.uint8), labels=np.arange(4))
        >>> len(images), images.image_shape, images.select([0, 2]).labels.tolist()
        (4, (1, 8, 8), [0, 2])
    """

    images: np.ndarray
    names: Sequence[str] | None = None
    labels: np.ndarray | None = None
    source: str = "array"
    skipped: tuple[SkippedFile, ...] = ()
    notes: tuple[str, ...] = ()
    sheets: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4:
            raise InputError(f"{self.source}: images must have 4 axes [N, C, H, W], got shape {self.images.shape}")
        if self.images.dtype not in (np.uint8, np.float32, np.float64):
            raise InputError(f"{self.source}: images must be uint8, float32 or float64, got {self.images.dtype}")
        for what, values in (("names", self.names), ("labels", self.labels)):
            if values is not None and len(values) != len(self.images):
                raise InputError(f"{self.source}: {len(values)} {what} for {len(self.images)} images")

    def __repr__(self) -> str:
        labels = "no labels" if self.labels is None else f"labels {self.labels.dtype} {list(self.labels.shape)}"
        skipped = f", {len(self.skipped)} files skipped" if self.skipped else ""
        return f"ImageSet({self.source}: {self.images.dtype} {list(self.images.shape)}, {labels}{skipped})"

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def dimension(self) -> int:
        """C·H·W, the d of the papers."""
        channels, height, width = self.image_shape
        return channels * height * width

    def name(self, index: int) -> str:
        """What to call image `index` in a report."""
        return self.names[index] if self.names is not None else f"#{index}"

    def select(self, indices: Sequence[int] | np.ndarray | slice) -> ImageSet:
        """The images at `indices`, with their names and labels, in that order.

        Args:
            indices: Row numbers, a boolean mask [N], or a slice.
        """
        rows = np.arange(len(self))[indices]
        return replace(
            self,
            images=self.images[indices],
            names=None if self.names is None else [self.names[row] for row in rows],
            labels=None if self.labels is None else self.labels[rows],
        )

    @cached_property
    def pixel_fingerprint(self) -> str:
        """SHA-256 over the pixels alone, as rows [N, d]: what a search index is recognized by."""
        digest = hashlib.sha256(repr(((len(self), self.dimension), f"torch.{self.images.dtype.name}")).encode())
        for block in range(0, len(self), 4096):
            digest.update(np.ascontiguousarray(self.images[block : block + 4096]).data)
        return digest.hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape, dtype, pixels and labels (not names): equal for equal contents, wherever they lie."""
        digest = hashlib.sha256(repr((self.images.shape, self.images.dtype.str)).encode())
        for block in range(0, len(self), 4096):
            digest.update(np.ascontiguousarray(self.images[block : block + 4096]).data)
        if self.labels is not None:
            digest.update(repr((self.labels.shape, self.labels.dtype.str)).encode())
            digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


class ImageRecipe(ABC):
    """What says how images are made: `load_images` takes one as it takes a path."""

    @abstractmethod
    def load(self, progress: Progress = silent) -> ImageSet:
        """The images.

        Args:
            progress: Called as `progress(stage, done, total)`.
        """
