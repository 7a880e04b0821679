"""What every op asks of its arguments before an address is passed on: kinds, dtypes, layouts, devices and shapes.

Checks are made by the public functions, and again by the operators in `torch.ops.diffmem` (real and fake), which can be
called by themselves. Each names the op and the parameter: TypeError for what is not a tensor or no number, InputError
(a ValueError) for the rest. Only metadata is looked at, so that `torch.compile` can trace them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from diffmem.errors import InputError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(
    op: str, name: str, value: Any, dtypes: Sequence[torch.dtype] = FLOATS, like: torch.Tensor | None = None
) -> None:
    """`value` is a dense tensor of one of these dtypes, on the device of `like`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, not {type(value).__name__}")
    if value.layout != torch.strided:
        raise InputError(f"{op}: {name} must be a dense tensor, not {value.layout}")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(f"{op}: {name} must be {wanted}, got {value.dtype}")
    if like is not None and value.device != like.device:
        raise InputError(f"{op}: {name} must be on {like.device}, got {value.device}")


def check_shape(op: str, name: str, value: torch.Tensor, shape: Sequence[int | None], text: str) -> None:
    """`value` has this shape; None stands for any size. text: the shape as its docstring has it."""
    fits = value.ndim == len(shape)
    if fits:
        for size, wanted in zip(value.shape, shape, strict=True):
            if wanted is not None and size != wanted:
                fits = False
    if not fits:
        raise InputError(f"{op}: {name} must be {text}, got {tuple(value.shape)}")


def check_whole(op: str, name: str, value: Any, low: int) -> None:
    """`value` is a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):  # 2.6 traces no union
        raise TypeError(f"{op}: {name} must be a whole number, not {type(value).__name__}")
    if value < low:
        raise InputError(f"{op}: {name} must be at least {low}, got {value}")


def check_number(op: str, name: str, value: Any, low: float = 0.0) -> None:
    """`value` is a finite number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be a number, not {type(value).__name__}")
    if not (math.isfinite(value) and value >= low):
        raise InputError(f"{op}: {name} must be finite and at least {low:g}, got {value}")
