"""What `conv3x3` and its operators ask of their arguments."""

from __future__ import annotations

from typing import Any

import torch

from diffmem.errors import InputError
from diffmem.ops.arguments import check_number, check_shape, check_tensor

OP = "conv3x3"


def check(x: Any, weight: Any, bias: Any, residual: Any, scale: Any) -> None:
    """Of the public function: dtypes may differ where autocast evens them out."""
    check_tensor(OP, "x", x)
    check_shape(OP, "x", x, (None, None, None, None), "(B, C, H, W)")
    for name, value in (("weight", weight), ("bias", bias), ("residual", residual)):
        if value is None and name != "weight":
            continue
        check_tensor(OP, name, value, like=x)
        if value.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise InputError(f"{OP}: {name} must be {x.dtype} like x, got {value.dtype}")
    _check_sizes(x, weight, bias, residual, transposed=False)
    check_number(OP, "scale", scale)


def check_winograd(x: Any, weight: Any, bias: Any, transposed: bool, residual: Any, scale: Any) -> None:
    """Of the operator `conv3x3_winograd`."""
    for name, value in (("x", x), ("weight", weight), ("bias", bias), ("residual", residual)):
        if value is not None or name in ("x", "weight"):
            check_tensor(OP, name, value, (torch.float32,), like=x if name != "x" else None)
    check_shape(OP, "x", x, (None, None, None, None), "(B, C, H, W)")
    _check_sizes(x, weight, bias, residual, transposed)
    _check_multiples(x.shape[1], weight.shape[1 if transposed else 0])


def check_weight_gradient(x: Any, gradient: Any) -> None:
    """Of the operator `conv3x3_weight_gradient`."""
    check_tensor(OP, "x", x, (torch.float32,))
    check_tensor(OP, "gradient", gradient, (torch.float32,), like=x)
    check_shape(OP, "x", x, (None, None, None, None), "(B, C, H, W)")
    batch, channels, height, width = x.shape
    check_shape(OP, "gradient", gradient, (batch, None, height, width), f"({batch}, O, {height}, {width})")
    _check_multiples(channels, gradient.shape[1])


def _check_sizes(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    transposed: bool,
) -> None:
    batch, channels, height, width = x.shape
    shape = (channels, None, 3, 3) if transposed else (None, channels, 3, 3)
    check_shape(OP, "weight", weight, shape, f"({channels}, O, 3, 3)" if transposed else f"(O, {channels}, 3, 3)")
    outputs = weight.shape[1 if transposed else 0]
    for name, size in (("channels of x", channels), ("outputs of weight", outputs)):
        if size < 1:
            raise InputError(f"{OP}: {name}: there must be at least one, got {size}")
    if bias is not None:
        check_shape(OP, "bias", bias, (outputs,), f"({outputs},)")
    if residual is not None:
        like_y = (batch, outputs, height, width)
        check_shape(OP, "residual", residual, like_y, str(like_y))


def _check_multiples(channels: int, outputs: int) -> None:
    if channels % 8 or outputs % 16 or channels < 8 or outputs < 16:
        raise InputError(
            f"{OP}: Winograd needs channels of x in multiples of 8 and outputs in multiples of 16, got {channels} and "
            f"{outputs}"
        )
