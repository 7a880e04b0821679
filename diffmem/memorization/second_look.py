"""The second look: images that are no copies by the rule, aligned with their nearest training images.

The nearest training images are the right ones for most disguised copies, though too far for the rule: a copy that was
made brighter, shifted or mirrored resembles its original again once both are brought over one another
(`diffmem.features.aligned`). Such images are "near": to be looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffmem.memorization.calibration import Calibration, images_needed
from diffmem.progress import Progress

BLOCK = 128
NEAR = 0.5  # score below which an image is near, where no hold-out set says better
TWIN = 0.35  # score below which a hold-out image is a training image, moved or recolored


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
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__annotations__))


@dataclass(frozen=True)
class NearRule:
    """When an image that is no copy by the rule is near.

    Attributes:
        threshold: On the score of the second look.
    """

    threshold: float = NEAR

    @classmethod
    def of(cls, scores: np.ndarray, alarms: float) -> NearRule:
        """The threshold that the given share of unseen images falls below, where there are enough of them.

        Args:
            scores: Of the second look at hold-out images.
            alarms: The share.
        """
        scores = scores[~np.isnan(scores)]
        if len(scores) < images_needed(alarms):
            return cls()
        return cls(min(NEAR, Calibration(scores, alarms).threshold))

    def near(self, look: SecondLook) -> np.ndarray:
        """bool [n], which images are near."""
        return look.scores < self.threshold

    @staticmethod
    def twins(look: SecondLook) -> np.ndarray:
        """bool [n], which images are surely a training image, moved or recolored."""
        return look.scores < TWIN


def look_again(
    images: np.ndarray, training: np.ndarray, candidates: np.ndarray, wanted: np.ndarray, progress: Progress
) -> SecondLook:
    """Aligns images with candidates among the training images.

    Args:
        images: [n, C, H, W].
        training: [N, C, H, W].
        candidates: int64 [n, k], of each image.
        wanted: bool [n], which images to look at.
        progress: A callback.
    """
    from diffmem.features.aligned import align_candidates

    count = len(images)
    look = SecondLook(candidates[:, 0].copy(), np.full(count, np.nan), np.full(count, np.nan))
    rows = np.flatnonzero(wanted)
    stage = "looking again at images that are no copies"
    for start in range(0, len(rows), BLOCK):
        progress(stage, start, len(rows))
        some = rows[start : start + BLOCK]
        scores, best, residuals = align_candidates(images[some], training, candidates[some])
        look.scores[some], look.residuals[some] = scores, residuals
        look.indices[some] = candidates[some, best]
    progress(stage, len(rows), len(rows))
    return look
