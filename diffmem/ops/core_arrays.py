"""The alignment of the compiled core on arrays, without PyTorch. The ops on tensors are `diffmem.ops.alignment` and
`diffmem.ops.affine_alignment`, which say what is computed and check their arguments; here they are taken as right."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diffmem.ops.registry import core_threads, native_kernel_unavailable, native_module

SCALING = 0.5  # what the logarithm of a scaling costs; csrc/affine_alignment/affine_alignment.h has the same


class LineTables(NamedTuple):
    """Which lines the lines of enlarged images are made of: weights lower and upper (float32 [scales, size]) of line
    below (int32 [scales, size], at most size − 2) and the one after it."""

    below: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def alignment_unavailable(device_type: str = "cpu") -> str | None:
    """Why `variants` and `alignment` cannot run on `device_type`, or None."""
    return native_kernel_unavailable(device_type, "alignment", "AVX2 or NEON")


def variants(images: np.ndarray, down: LineTables, across: LineTables) -> np.ndarray:
    """Images as they are and mirrored, enlarged by linear interpolation.

    Args:
        images: float32 [n, C, h, w], h, w >= 2.
        down: How the lines of each scale are made of those of the image, for all h.
        across: The same of its columns, for all w.

    Returns:
        [n, 2·scales, C, h, w]: all scales, then those of the mirror image.
    """
    images, scales = np.ascontiguousarray(images), len(down.below)
    made = np.empty((len(images), 2 * scales, *images.shape[1:]), np.float32)
    if len(images):
        tables = ([each.ctypes.data for each in lines] for lines in (down, across))
        native_module().alignment_variants(
            [*images.shape, scales], images.ctypes.data, *tables, made.ctypes.data, core_threads()
        )
    return made


def alignment(searched: np.ndarray, templates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlations [Q, K] and positions [Q, K] of templates float32 [Q, K, C, h, w] in variants [Q, V, C, H, W]."""
    searched, templates = np.ascontiguousarray(searched), np.ascontiguousarray(templates)
    correlations, positions = np.empty(templates.shape[:2], np.float32), np.empty(templates.shape[:2], np.int64)
    if correlations.size:
        native_module().alignment(
            [*searched.shape, templates.shape[1], *templates.shape[3:]], searched.ctypes.data, templates.ctypes.data,
            correlations.ctypes.data, positions.ctypes.data, core_threads(),
        )  # fmt: skip
    return correlations, positions


def affine_alignment(
    images: np.ndarray, templates: np.ndarray, start: np.ndarray, iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    """Remainders [n] and maps [n, 2, 3] of images float32 [n, C, H, W], templates [n, C, h, w] and first maps."""
    images, templates, start = (np.ascontiguousarray(each) for each in (images, templates, start))
    remainders, maps = np.empty(len(images), np.float32), np.empty((len(images), 2, 3), np.float32)
    if len(images):
        native_module().affine_alignment(
            [*images.shape, *templates.shape[2:]], images.ctypes.data, templates.ctypes.data, start.ctypes.data,
            iterations, remainders.ctypes.data, maps.ctypes.data, core_threads(),
        )  # fmt: skip
    return remainders, maps


def pool_bytes(images: np.ndarray, rows: np.ndarray, factor: int) -> np.ndarray:
    """Means of squares of pixels of some images.

    Args:
        images: uint8 [N, C, h, w], C-contiguous.
        rows: int64 [n], which of them.
        factor: Pixels a side of a square; divides h and w.

    Returns:
        float32 [n, C, h // factor, w // factor].
    """
    _, channels, height, width = images.shape
    pooled = np.empty((len(rows), channels, height // factor, width // factor), np.float32)
    rows = np.ascontiguousarray(rows, np.int64)
    if len(rows):
        native_module().pool_bytes(
            [len(rows), channels, height, width, factor], len(images), images.ctypes.data, rows.ctypes.data,
            pooled.ctypes.data, core_threads(),
        )  # fmt: skip
    return pooled
