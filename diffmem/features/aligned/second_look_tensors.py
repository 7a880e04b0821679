"""The second look at images of every kind and size, on tensors."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from diffmem.features.aligned.geometry import Geometry
from diffmem.features.aligned.pairs import as_tensor
from diffmem.features.aligned.scoring import unrefined
from diffmem.features.aligned.second_stage import align
from diffmem.ops import core_arrays
from diffmem.ops.alignment import alignment
from diffmem.ops.registry import native_unavailable


def aligned(
    images: np.ndarray, training: np.ndarray, candidates: np.ndarray, geometry: Geometry, neighbors: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, best columns and residuals of images at the working size, each with its candidates [n, k]."""
    different, where = np.unique(candidates, return_inverse=True)
    templates = geometry.templates(geometry.reduce(as_tensor(training[different])))
    templates = templates[torch.from_numpy(where.reshape(candidates.shape))]
    scores, columns, remainders, _, _ = align(geometry.reduce(as_tensor(images)), templates, geometry, neighbors)
    return scores, columns[:, 0], remainders[:, 0]


def coarse(
    images: np.ndarray, training: np.ndarray, candidates: np.ndarray, geometry: Geometry, factor: int, neighbors: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same without affine maps, of means of `factor` pixels a side."""
    different, where = np.unique(candidates, return_inverse=True)
    queries = _pooled(images, np.arange(len(images)), geometry, factor)
    small = Geometry(*queries.shape[2:])
    templates = small.templates(_pooled(training, different, geometry, factor))
    templates = templates[torch.from_numpy(where.reshape(candidates.shape))]
    correlations, _ = alignment(small.variants(queries), templates)
    return unrefined(correlations.numpy(), neighbors)


def _pooled(images: np.ndarray, rows: np.ndarray, geometry: Geometry, factor: int) -> torch.Tensor:
    """Means of squares of pixels at the working size, of some of the images [N, C, H, W]: [n, C, h, w]."""
    height, width = geometry.working
    exact = images.dtype == np.uint8 and images.shape[2:] == (height, width)  # sums of bytes are, in any order
    # Those of an index on disk are read as they are asked for, and are no array.
    exact = exact and isinstance(images, np.ndarray) and images.flags.c_contiguous
    if not exact or height % factor or width % factor or native_unavailable("cpu"):
        return F.avg_pool2d(geometry.reduce(as_tensor(images[rows])), factor)
    return torch.from_numpy(core_arrays.pool_bytes(images, rows, factor))
