"""What the op `affine_alignment` asks of its arguments, and the numbers that all its backends share."""

from __future__ import annotations

from typing import Any

import torch

from diffmem.errors import InputError
from diffmem.ops.arguments import check_shape, check_tensor, check_whole

OP_NAME = "affine_alignment"
REAL = (torch.float32, torch.float64)
MOST_ITERATIONS = 1000

# csrc/affine_alignment/affine_alignment.h has the same.
DEFORMATION = 3.0  # what the logarithm of a deformation costs; of a scaling: SCALING
DAMPING = 1e-2  # of the normal equations, relative to their diagonal
LONGEST_SHIFT, LONGEST_STEP = 1.0, 0.1  # of one iteration: of b in pixels, of A
FLAT = 1e-6  # Σ(x − mean)² is at most this share of Σx²: no variance


def check(images: Any, templates: Any, start: Any, iterations: Any) -> None:
    """Raises InputError where they do not fit together, TypeError for what is not a tensor or no whole number."""
    check_tensor(OP_NAME, "images", images, REAL)
    check_shape(OP_NAME, "images", images, [None] * 4, "[n, C, H, W]")
    pairs, channels = images.shape[:2]
    for name, value in (("templates", templates), ("start", start)):
        check_tensor(OP_NAME, name, value, (images.dtype,), like=images)
    check_shape(OP_NAME, "templates", templates, (pairs, channels, None, None), "[n, C, h, w]")
    check_shape(OP_NAME, "start", start, (pairs, 2, 3), "[n, 2, 3]")
    check_whole(OP_NAME, "iterations", iterations, 0)
    if iterations > MOST_ITERATIONS:
        raise InputError(f"{OP_NAME}: iterations must be at most {MOST_ITERATIONS}, got {iterations}")
    if min(channels, *images.shape[2:], *templates.shape[2:]) < 1:
        raise InputError(
            f"{OP_NAME}: there must be at least one channel and pixel, got images {tuple(images.shape)} and templates "
            f"{tuple(templates.shape)}"
        )


def check_kernel(unfit: str | None) -> None:
    """unfit: why a kernel cannot take what `check` has let pass, or None."""
    if unfit is not None:
        raise InputError(f"{OP_NAME}: images are not supported: {unfit}")
