"""Images aligned with candidates among the training images that another search found."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from diffmem.features.aligned.geometry import Geometry
from diffmem.features.aligned.pairs import as_tensor
from diffmem.features.aligned.second_stage import against, align
from diffmem.ops.alignment import alignment, native
from diffmem.ops.registry import native_unavailable

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
    neighbors = max(1, candidates.shape[1] - 1)
    factor = min(geometry.working) // COARSE

    def aligned(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores, best columns and residuals of some images at the working size."""
        different, where = np.unique(candidates[rows], return_inverse=True)
        templates = geometry.templates(geometry.reduce(as_tensor(training[different])))
        templates = templates[torch.from_numpy(where.reshape(len(rows), -1))]
        scores, columns, remainders, _, _ = align(
            geometry.reduce(as_tensor(images[rows])), templates, geometry, neighbors
        )
        return scores, columns[:, 0], remainders[:, 0]

    everything = np.arange(len(images))
    if factor < 2:
        return aligned(everything)
    different, where = np.unique(candidates, return_inverse=True)
    scores, best, residuals = _coarse(
        _pooled(images, everything, geometry, factor),
        _pooled(training, different, geometry, factor),
        torch.from_numpy(where.reshape(candidates.shape)),
        neighbors,
    )
    rows = np.flatnonzero(scores <= COARSE_LIMIT)
    if len(rows):
        scores[rows], best[rows], residuals[rows] = aligned(rows)
    return scores, best, residuals


def _pooled(images: np.ndarray, rows: np.ndarray, geometry: Geometry, factor: int) -> torch.Tensor:
    """Means of squares of pixels at the working size, of some of the images [N, C, H, W]: [n, C, h, w]."""
    height, width = geometry.working
    exact = images.dtype == np.uint8 and images.shape[2:] == (height, width)  # sums of bytes are, in any order
    # Those of an index on disk are read as they are asked for, and are no array.
    exact = exact and isinstance(images, np.ndarray) and images.flags.c_contiguous
    if not exact or height % factor or width % factor or native_unavailable("cpu"):
        return F.avg_pool2d(geometry.reduce(as_tensor(images[rows])), factor)
    return native.pool_bytes(images, rows, factor)


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
