"""Alignment of small images of bytes on arrays, by the compiled core: an audit's second look, and its page's pairs.

The same on tensors, for images of every kind and size, is `second_look_tensors` and `pairs`: what is computed here
equals that (tests/features/test_aligned.py), and needs no PyTorch, whose import takes longer than the second look.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffmem.features.aligned.geometry import SCALES, Geometry, variants_of_array
from diffmem.features.aligned.scoring import ITERATIONS, REFINED, against, unrefined
from diffmem.ops import core_arrays
from diffmem.ops.core_arrays import SCALING

CUBIC = -0.75  # of the bicubic kernel, as PyTorch has it


def fit(images: Any, geometry: Geometry) -> bool:
    """Whether these images can be aligned here: of bytes, in memory, at the size at which they are compared."""
    return (
        isinstance(images, np.ndarray)
        and images.dtype == np.uint8
        and images.shape[2:] == geometry.working
        and images.flags.c_contiguous
        and core_arrays.alignment_unavailable() is None
    )


def aligned(
    images: np.ndarray, training: np.ndarray, candidates: np.ndarray, geometry: Geometry, neighbors: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, best columns and residuals of images at the working size, each with its candidates [n, k]."""
    different, where = np.unique(candidates, return_inverse=True)
    templates = geometry.templates(training[different]).astype(np.float32)[where.reshape(candidates.shape)]
    images = images.astype(np.float32)
    correlations, positions = core_arrays.alignment(variants_of_array(images), templates)
    mirrored, maps = _starts(positions, geometry)
    wide = correlations.astype(np.float64)
    # As the op that follows counts it: scaling costs.
    scaling = np.abs(np.log(maps[..., 0, 0].astype(np.float64) * maps[..., 1, 1].astype(np.float64))) / 2
    residuals = np.minimum(np.sqrt(1 - wide) * np.exp(SCALING * scaling), 1)
    # The best ones may be moved by parts of a pixel, and stretched.
    best = residuals.argsort(axis=1, kind="stable")[:, :REFINED]
    rows = np.arange(len(images))[:, None]
    flipped = mirrored[rows, best]
    sides = np.where(flipped[..., None, None, None], images[:, None, :, :, ::-1], images[:, None])
    remainders, _ = core_arrays.affine_alignment(
        sides.reshape(-1, *images.shape[1:]), templates[rows, best].reshape(-1, *templates.shape[2:]),
        maps[rows, best].reshape(-1, 2, 3), ITERATIONS,
    )  # fmt: skip
    residuals[rows, best] = remainders.reshape(best.shape)
    columns = residuals.argmin(axis=1)
    least = residuals[rows[:, 0], columns]
    return least / against(-np.sort(-wide, axis=1), neighbors), columns, least


def coarse(
    images: np.ndarray, training: np.ndarray, candidates: np.ndarray, geometry: Geometry, factor: int, neighbors: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same without affine maps, of means of `factor` pixels a side."""
    different, where = np.unique(candidates, return_inverse=True)
    queries = core_arrays.pool_bytes(images, np.arange(len(images)), factor)
    small = Geometry(*queries.shape[2:])
    templates = small.templates(core_arrays.pool_bytes(training, different, factor))
    correlations, _ = core_arrays.alignment(variants_of_array(queries), templates[where.reshape(candidates.shape)])
    return unrefined(correlations, neighbors)


def _starts(positions: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """`diffmem.features.aligned.geometry.starts`."""
    down, across = (2 * margin + 1 for margin in geometry.margin)
    variant = positions // (across * down)
    enlarged = np.array(SCALES, np.float32)[variant % len(SCALES)]
    maps = np.zeros((*positions.shape, 2, 3), np.float32)
    maps[..., 0, 0] = maps[..., 1, 1] = 1
    maps[..., 0, 2] = positions % across - geometry.margin[1]
    maps[..., 1, 2] = positions // across % down - geometry.margin[0]
    return variant >= len(SCALES), maps / enlarged[..., None, None]


def pairs(generated: np.ndarray, training: np.ndarray, geometry: Geometry, iterations: int) -> tuple[np.ndarray, ...]:
    """The fields of `Alignments` of pairs of images, in their order."""
    images, goal = generated.astype(np.float32), training.astype(np.float32)
    templates = geometry.templates(goal)
    _, positions = core_arrays.alignment(variants_of_array(images), templates[:, None])
    mirrored, maps = _starts(positions[:, 0], geometry)
    sides = np.where(mirrored[:, None, None, None], images[..., ::-1], images)
    remainders, maps = core_arrays.affine_alignment(sides, templates, maps, iterations)
    brought, covered = _brought(goal, mirrored, maps)
    gain, offset = _colors(brought, images, covered)
    result = np.clip(np.round(brought * gain[..., None, None] + offset[..., None, None]), 0, 255)
    difference = np.abs(images - result)
    scale = np.sqrt(np.maximum(np.linalg.det(maps[:, :, :2]), 0))
    return (
        remainders, mirrored, scale, maps[:, ::-1, 2], maps, gain, offset, result.astype(np.uint8),
        difference.astype(np.uint8),
    )  # fmt: skip


def _brought(images: np.ndarray, mirrored: np.ndarray, maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`diffmem.features.aligned.pairs.bring`: bicubic, beyond the border its nearest pixel."""
    height, width = images.shape[2:]
    y, x = (np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2) for size in (height, width))
    sign = np.where(mirrored, np.float32(-1), np.float32(1))[:, None, None]
    points = np.stack(np.broadcast_arrays(sign * x, y[:, None]), axis=-1) - maps[:, None, None, :, 2]
    grid = np.einsum("nij,nhwj->nhwi", np.linalg.inv(maps[:, :, :2]), points)
    grid *= np.array([2 / width, 2 / height], np.float32)
    covered = (np.abs(grid) <= 1).all(axis=-1)[:, None]
    across, down = (((grid[..., axis] + 1) * size - 1) / 2 for axis, size in enumerate((width, height)))
    left, top = np.floor(across), np.floor(down)
    columns, lines = (
        [np.clip(first + step, 0, size - 1).astype(np.int64) for step in (-1, 0, 1, 2)]
        for first, size in ((left, width), (top, height))
    )
    weights = _cubic(across - left)
    first = np.arange(len(images))[:, None, None] * height
    pixels = np.moveaxis(images, 1, -1).reshape(-1, images.shape[1])  # [n·h·w, C]
    brought = np.zeros((*grid.shape[:3], images.shape[1]), np.float32)
    for line, of_line in zip(lines, _cubic(down - top), strict=True):
        start = (first + line) * width
        row = sum(
            np.take(pixels, start + column, axis=0) * weight[..., None]
            for column, weight in zip(columns, weights, strict=True)
        )
        brought += row * of_line[..., None]
    return np.moveaxis(brought, -1, 1), covered


def _cubic(part: np.ndarray) -> list[np.ndarray]:
    """Weights of the pixel before the one at or below a place, of that, and of the next two; `part` of a pixel on."""

    def near(x: np.ndarray) -> np.ndarray:
        return ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:
        return ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC

    return [far(part + 1), near(part), near(1 - part), far(2 - part)]


def _colors(images: np.ndarray, wanted: np.ndarray, covered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`diffmem.features.aligned.pairs.fit_colors`."""
    weight = covered.astype(np.float32)
    count = np.maximum(weight.sum(axis=(2, 3)), 1)
    mean, target = ((each * weight).sum(axis=(2, 3)) / count for each in (images, wanted))
    centered = (images - mean[..., None, None]) * weight
    variance = np.square(centered).sum(axis=(2, 3))
    covariance = (centered * (wanted - target[..., None, None])).sum(axis=(2, 3))
    gain = np.where(variance > 0, covariance / np.maximum(variance, np.finfo(np.float32).tiny), np.float32(0))
    return gain, target - gain * mean
