"""Copies by any criterion that decides about single images: a `CopyDetector` with another verdict."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmem.data import ImageSet
from diffmem.errors import InputError
from diffmem.features import FeatureSet
from diffmem.memorization.criteria import CRITERIA, Comparison, Points, Searches
from diffmem.memorization.detector import CopyDetector, Detection
from diffmem.memorization.matching import Matches
from diffmem.memorization.second_look import SecondLook
from diffmem.search import TrainingIndex
from diffmem.search.rows import mirror

if TYPE_CHECKING:
    from diffmem.data import ImageSource

DEFAULT = "ratio"


def deciding_criteria() -> tuple[str, ...]:
    """The names of the criteria that say of a single image, by its pixels and the training images, whether it is a
    copy."""
    return tuple(name for name, criterion in CRITERIA.items() if criterion.decides)


def check_criterion(name: str | None) -> str:
    """The criterion's name.

    Args:
        name: Name of a criterion that decides about single images; None is the default, the ratio rule.

    Raises:
        InputError: There is no such criterion, or it does not decide about single images.
    """
    if name is None:
        return DEFAULT
    if name not in deciding_criteria():
        raise InputError(
            f"criterion={name!r} decides about no single image: take one of {', '.join(deciding_criteria())}"
        )
    return name


class CriterionDetector(CopyDetector):
    """A `CopyDetector` of pixels whose `memorized` is the verdict of a criterion of `diffmem.memorization.criteria`.

    Neighbors, `raw_memorized` (by the paper's rule) and scores are those of `CopyDetector`. Each batch is decided by
    itself, so that verdicts do not depend on batches. With `flip` an image is a copy where it is one as it is or
    mirrored.

    Args:
        training: The training images.
        criterion: "ratio", "calibrated_l2", "tile_max", "authenticity" (what is not authentic is a copy), "m3" or
            "three_phases".
        flip: Whether mirrored images are decided about too.
        **options: As of `CopyDetector`, but for features and rule.

    Raises:
        InputError: As `CopyDetector` does, and for a criterion that does not decide about single images.

    Example:
        >>> import diffmem
        >>> digits = diffmem.load_images("builtin:digits")
        >>> detector = CriterionDetector(digits.select(slice(0, 1000)), "calibrated_l2")
        >>> detector.update(digits.images[990:1010]).count
        12
    """

    def __init__(self, training: ImageSource, criterion: str, *, flip: bool = False, **options: Any) -> None:
        self.criterion = CRITERIA[check_criterion(criterion)]
        self._searches: Searches | None = None
        self._points: Points | None = None
        super().__init__(training, flip=flip, **options)
        if self._folder is not None:
            raise InputError(
                f"criterion={criterion!r} compares with training images in memory: give the training set, not its index"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """As of `CopyDetector`, with the criterion."""
        return {**super().identity, "criterion": self.criterion.name}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_searches": None, "_points": None}

    def _decide(self, images: ImageSet | FeatureSet, found: Matches, look: SecondLook | None = None) -> Detection:
        detection = super()._decide(images, found, look)
        assert isinstance(images, ImageSet)  # only pixels are compared
        verdicts = [self._verdict(images.images)]
        if self.flip:
            verdicts.append(self._verdict(mirror(images.images)))
        memorized = np.logical_or.reduce(verdicts)
        # A criterion has its own search, which is exact.
        settled = np.ones(len(memorized), bool)
        return replace(detection, memorized=memorized, near=detection.near & ~memorized, settled=settled)

    def _verdict(self, images: np.ndarray) -> np.ndarray:
        """bool [n]: which images are copies."""
        if not len(images):
            return np.zeros(0, bool)
        assert isinstance(self.training, ImageSet)
        points, searches = self._points, self._searches
        if searches is None or points is None or points.values is not self.training.images:
            points, searches = (
                Points(self.training.images, "training"),
                Searches(str(self._matching.device), self.progress),
            )
            if isinstance(self.index, TrainingIndex):
                searches.give_index(points, self.index)
            self._points, self._searches = points, searches
        comparison = Comparison(
            Points(images, "generated"), points, searches=searches.beside(points), neighbors=self.criterion.neighbors
        )
        assert self.criterion.decides is not None  # `check_criterion` sees to it
        name, copy = self.criterion.decides
        return self.criterion.measure(comparison).per_image[name] == copy
