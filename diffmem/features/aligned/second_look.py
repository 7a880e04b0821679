"""Images aligned with candidates among the training images that another search found."""

from __future__ import annotations

import numpy as np
import torch

from diffmem.features.aligned.geometry import Geometry
from diffmem.features.aligned.pairs import as_tensor
from diffmem.features.aligned.second_stage import align


def align_candidates(
    images: np.ndarray, training: np.ndarray, candidates: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which of its candidates each image fits best, and how much better than the others.

    Args:
        images: [n, C, H, W], uint8 or real.
        training: [N, C, h, w] of the same channels; another size is brought to the same working size.
        candidates: int64 [n, k], indices of training images.

    Returns:
        scores: float64 [n], as `AlignedMatcher` gives them, over these candidates: lower = more like a copy.
        best: int64 [n], the column of the best candidate; the first of equals.
        residuals: float64 [n], what then remains, as `AlignedMatcher` gives it.
    """
    geometry = Geometry(*training.shape[2:])
    different, where = np.unique(candidates, return_inverse=True)
    small = geometry.templates(geometry.reduce(as_tensor(training[different])))
    templates = small[torch.from_numpy(where.reshape(candidates.shape))]
    queries = geometry.reduce(as_tensor(images))
    scores, columns, residuals, _, _ = align(queries, templates, geometry, max(1, candidates.shape[1] - 1))
    return scores, columns[:, 0], residuals[:, 0]
