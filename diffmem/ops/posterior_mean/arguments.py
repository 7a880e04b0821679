"""What `posterior_mean` and `PosteriorRows` ask of their arguments."""

from __future__ import annotations

from typing import Any

import torch

from diffmem.errors import InputError
from diffmem.ops.arguments import FLOATS, check_number, check_shape, check_tensor

OP = "posterior_mean"
ROWS = (torch.uint8, torch.float32, torch.float64)
BAD_X, BAD_SIGMA = "x: holds NaN or infinity", "sigma: noise levels must be positive and finite"
REAL = (*FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_rows(training: Any) -> None:
    check_tensor(OP, "training", training, ROWS)
    check_shape(OP, "training", training, (None, None), "[N, d]")
    if min(training.shape) < 1:
        raise InputError(f"{OP}: training must be [N, d], N > 0 and d > 0, got {list(training.shape)}")


def check_queries(x: Any, sigma: Any, tolerance: Any, dimension: int, device: torch.device) -> None:
    """Metadata only: on a GPU a look at values would wait for it."""
    check_tensor(OP, "x", x, REAL)
    check_shape(OP, "x", x, (None, dimension), f"[B, {dimension}]")
    if x.device.type != device.type:
        raise InputError(f"{OP}: x must be on {device}, got {x.device}")
    check_tensor(OP, "sigma", sigma, REAL, like=x)
    check_shape(OP, "sigma", sigma, (len(x),), f"[{len(x)}], one noise level for each query")
    check_number(OP, "tolerance", tolerance)
    if not 0 < tolerance < 1:
        raise InputError(f"{OP}: tolerance must lie between 0 and 1, got {tolerance}")


def check_values(x: torch.Tensor, sigma: torch.Tensor) -> None:
    if not bool(x.isfinite().all()):
        raise InputError(f"{OP}: x must be finite, but holds NaN or infinity")
    if not bool(((sigma > 0) & sigma.isfinite()).all()):
        raise InputError(f"{OP}: sigma must be positive and finite")


def check_images(images: Any, count: int) -> None:
    """A range of rows (start, stop), or a list of rows, int64."""
    if isinstance(images, torch.Tensor):
        check_tensor(OP, "images", images, (torch.int64,))
        check_shape(OP, "images", images, (None,), "[n]")
        if images.device.type != "cpu" and len(images):  # PyTorch checks indices there, without waiting
            return
        low, high = (int(images.min()), int(images.max())) if len(images) else (0, -1)
        if not 0 <= low <= high < count:
            raise InputError(f"{OP}: images must be one row or more of 0 … {count - 1}, got {low} … {high}")
        return
    if not isinstance(images, tuple | list) or len(images) != 2:
        raise TypeError(f"{OP}: images must be (start, stop) or a tensor of rows, not {type(images).__name__}")
    start, stop = images
    if not 0 <= start < stop <= count:
        raise InputError(f"{OP}: images must be a range within 0 … {count}, got {start} … {stop}")
