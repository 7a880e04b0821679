"""The second look: images that are not copies by the rule, aligned with their nearest training images.

The nearest training images are the right ones for most disguised copies, though too far for the rule: a copy that was
made brighter, shifted or mirrored resembles its original again once both are brought over one another
(`diffmem.features.aligned`). Such images are "near": to be looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmem.memorization.calibration import Calibration, images_needed
from diffmem.progress import Progress, silent

if TYPE_CHECKING:
    from diffmem.indexes.originals import Originals

BLOCK = 128
LEAST_SIDE = 4  # pixels; smaller images cannot be aligned
# Scores below which an image is near, and is surely a training image. Of 10,000 CIFAR-10 (JPEG) test images 91 % of
# those whose twins people had found are below 0.6, and about 0.3 % of those without one; 82 % and none are below 0.45.
# Small images resemble each other: of 800 handwritten digits of 8 x 8, 12 % are below 0.6, 0.9 % below 0.4.
SMALL, NEAR, NEAR_SMALL, TWIN = 16, 0.6, 0.4, 0.45
LARGEST = 0.7  # near, where a holdout set says what is
SUSPECTS = 256  # images looked at where training images have to be read for it: those with the lowest scores
ORIGINALS_AT_ONCE = 16  # of them, whose candidates are held together
PIECE_BYTES = 2**30  # of tables and arrays that are read piece by piece for it


@dataclass(frozen=True)
class SecondLook:
    """What the second look saw of n images.

    Attributes:
        indices: int64 [n], the training image that fits best once it is aligned.
        residuals: float64 [n], √(1 − correlation) with it: 0 for the same image; NaN where the image was not looked at.
        scores: float64 [n], the residual over that of the next candidates, lower = more like a copy; or NaN.
    """

    indices: np.ndarray
    residuals: np.ndarray
    scores: np.ndarray

    def select(self, rows: np.ndarray) -> SecondLook:
        """What was seen of the images of `rows`."""
        return SecondLook(self.indices[rows], self.residuals[rows], self.scores[rows])

    @classmethod
    def join(cls, parts: Sequence[SecondLook]) -> SecondLook:
        """What was seen of several batches as one."""
        return cls(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)))


@dataclass(frozen=True)
class NearRule:
    """When an image that is not a copy by the rule is near, and when a holdout image is a training image.

    Attributes:
        threshold: Threshold of the second look's score, below which an image is near.
        twin: The score below which an image is surely a training image, moved or recolored; 0: none is.
    """

    threshold: float
    twin: float

    @classmethod
    def of_size(cls, height: int, width: int) -> NearRule:
        """For images of one size, where nothing is known of them."""
        return cls(NEAR_SMALL, 0.0) if min(height, width) < SMALL else cls(NEAR, TWIN)

    def calibrated(self, scores: np.ndarray, alarms: float) -> NearRule:
        """The threshold below which the given share of unseen images lies, where there are enough of them.

        Args:
            scores: Scores of the second look at holdout images.
            alarms: The share.
        """
        scores = scores[~np.isnan(scores)]
        if len(scores) < images_needed(alarms):
            return self
        return NearRule(min(LARGEST, Calibration(scores, alarms).threshold), self.twin)

    def near(self, look: SecondLook) -> np.ndarray:
        """bool [n], which images are near."""
        return look.scores < self.threshold

    def twins(self, look: SecondLook) -> np.ndarray:
        """bool [n], which images are surely a training image, moved or recolored."""
        return look.scores < self.twin


def needs_pytorch(images: Any) -> bool:
    """Whether a comparison and a second look at these images are for PyTorch: all but small images of bytes."""
    if getattr(getattr(images, "images", None), "dtype", None) != np.uint8:
        return True
    from diffmem.features.aligned.byte_images import fit
    from diffmem.features.aligned.geometry import Geometry

    return min(images.image_shape[1:]) >= LEAST_SIDE and not fit(images.images, Geometry(*images.image_shape[1:]))


def look_again(
    images: np.ndarray, training: np.ndarray, candidates: np.ndarray, wanted: np.ndarray, progress: Progress
) -> SecondLook:
    """Aligns images with candidates among the training images.

    Args:
        images: [n, C, H, W].
        training: [N, C, h, w].
        candidates: int64 [n, k], of each image.
        wanted: bool [n], which images to look at.
        progress: A callback.
    """
    from diffmem.features.aligned.second_look import align_candidates, side_by_side

    count = len(images)
    look = SecondLook(candidates[:, 0].copy(), np.full(count, np.nan), np.full(count, np.nan))
    rows = np.flatnonzero(wanted)
    stage = "second look at images that are not copies"
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]

    def aligned(some: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return align_candidates(images[some], training, candidates[some])

    done = 0
    for some, (scores, best, residuals) in zip(blocks, side_by_side(aligned, blocks, images, training), strict=True):
        progress(stage, done, len(rows))
        look.scores[some], look.residuals[some] = scores, residuals
        look.indices[some] = candidates[some, best]
        done += len(some)
    if len(rows):
        progress(stage, len(rows), len(rows))
    return look


def look_at_originals(
    images: np.ndarray, originals: Originals, candidates: np.ndarray, rows: np.ndarray, progress: Progress
) -> SecondLook | None:
    """`look_again` of some images, with candidates that are read from where they lie; None where none can be had.

    An image is looked at where all of its candidates can be read.

    Args:
        images: uint8 [n, C, H, W].
        originals: Reads training images.
        candidates: int64 [n, k], of each image.
        rows: int64, which images to look at.
        progress: A callback.
    """
    look = SecondLook(candidates[:, 0].copy(), np.full(len(images), np.nan), np.full(len(images), np.nan))
    wanted = np.unique(candidates[rows])
    near = wanted[originals.reachable(wanted, PIECE_BYTES)]
    rows = rows[np.isin(candidates[rows], near).all(axis=1)]
    for start in range(0, len(rows), ORIGINALS_AT_ONCE):
        some = rows[start : start + ORIGINALS_AT_ONCE]
        progress("reading training images for the second look", start, len(rows))
        found = originals.read(np.unique(candidates[some]))
        whole = np.array([all(row in found for row in each) for each in candidates[some].tolist()], bool)
        some = some[whole]
        numbers = np.unique(candidates[some])
        shapes = {found[row].shape for row in numbers.tolist()}
        if len(some) == 0 or len(shapes) != 1 or next(iter(shapes))[0] != images.shape[1]:
            continue
        training = np.stack([found[row] for row in numbers.tolist()])
        local = np.searchsorted(numbers, candidates[some])
        seen = look_again(images[some], training, local, np.ones(len(some), bool), silent)
        look.indices[some], look.residuals[some], look.scores[some] = numbers[seen.indices], seen.residuals, seen.scores
    progress("reading training images for the second look", len(rows), len(rows))
    return None if np.isnan(look.scores).all() else look
