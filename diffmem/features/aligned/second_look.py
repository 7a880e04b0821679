"""Images aligned with candidates among the training images that another search found."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from diffmem.features.aligned.geometry import Geometry
from diffmem.features.aligned.pairs import as_tensor
from diffmem.features.aligned.second_stage import against, align
from diffmem.ops.alignment import alignment

COARSE = 16  # side at which pairs are looked at first
# Coarse score up to which a pair is looked at again: 14 % of 10,000 CIFAR-10 (JPEG) test images are, and 99.6 % of
# those whose score is below 0.6.
COARSE_LIMIT = 0.72


def align_candidates(
    images: np.ndarray, training: np.ndarray, candidates: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which of its candidates each image fits best, and how much better than the others.

    Images are aligned at half the working size first; those that fit no candidate there are not looked at again.

    Args:
        images: [n, C, H, W], uint8 or real.
        training: [N, C, h, w] of the same channels; another size is brought to the same working size.
        candidates: int64 [n, k], indices of training images.

    Returns:
        scores: float64 [n], as `AlignedMatcher` gives them, over these candidates: lower = more like a copy; above
            `COARSE_LIMIT` the coarse one.
        best: int64 [n], the column of the best candidate; the first of equals.
        residuals: float64 [n], what then remains, as `AlignedMatcher` gives it.
    """
    geometry = Geometry(*training.shape[2:])
    different, where = np.unique(candidates, return_inverse=True)
    some = geometry.reduce(as_tensor(training[different]))
    queries = geometry.reduce(as_tensor(images))
    where = torch.from_numpy(where.reshape(candidates.shape))
    neighbors = max(1, candidates.shape[1] - 1)
    factor = min(geometry.working) // COARSE
    if factor < 2:
        scores, columns, remainders, _, _ = align(queries, geometry.templates(some)[where], geometry, neighbors)
        return scores, columns[:, 0], remainders[:, 0]
    scores, best, residuals = _coarse(
        *(_pooled(*each, factor) for each in ((queries, images), (some, training))), where, neighbors
    )
    rows = np.flatnonzero(scores <= COARSE_LIMIT)
    if len(rows):
        templates = geometry.templates(some)[where[rows]]
        scores[rows], columns, remainders, _, _ = align(queries[rows], templates, geometry, neighbors)
        best[rows], residuals[rows] = columns[:, 0], remainders[:, 0]
    return scores, best, residuals


def _pooled(reduced: torch.Tensor, images: np.ndarray, factor: int) -> torch.Tensor:
    """Means of squares of pixels, [n, C, h, w] to [n, C, h // factor, w // factor].

    Sums of bytes are exact in any order: two products take half the time of PyTorch's pooling, and give the same.
    """
    (height, width), exact = reduced.shape[2:], images.dtype == np.uint8 and images.shape[2:] == reduced.shape[2:]
    if not exact or height % factor or width % factor:
        return F.avg_pool2d(reduced, factor)
    columns = torch.arange(width)
    ones = torch.zeros(width, width // factor)
    ones[columns, columns // factor] = 1
    lines = (reduced.reshape(-1, width) @ ones).view(*reduced.shape[:2], height // factor, factor, -1)
    return lines.sum(dim=3).div_(factor * factor)


def _coarse(
    queries: torch.Tensor, some: torch.Tensor, where: torch.Tensor, neighbors: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, best columns and residuals without refinement."""
    geometry = Geometry(*queries.shape[2:])
    found, _ = alignment(geometry.variants(queries), geometry.templates(some)[where])
    correlations = found.double().numpy()
    ordered = np.minimum(-np.sort(-correlations, axis=1), 1)
    residuals = np.sqrt(1 - ordered[:, 0])
    return residuals / against(ordered, neighbors), correlations.argmax(axis=1), residuals
