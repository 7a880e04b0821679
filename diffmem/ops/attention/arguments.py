"""What `attention` and its operators ask of their arguments."""

from __future__ import annotations

from typing import Any

import torch

from diffmem.errors import InputError
from diffmem.ops.arguments import check_shape, check_tensor, check_whole

OP = "attention"


def check(qkv: Any, num_heads: Any) -> None:
    check_tensor(OP, "qkv", qkv)
    check_whole(OP, "num_heads", num_heads, 1)
    check_shape(OP, "qkv", qkv, (None, None, None, None), "(B, 3C, H, W)")
    if qkv.shape[1] < 1 or qkv.shape[1] % (3 * num_heads):
        raise InputError(
            f"{OP}: qkv {tuple(qkv.shape)} must be (B, 3C, H, W) with C a multiple of num_heads = {num_heads}"
        )


def check_kernel(unfit: str | None) -> None:
    """unfit: why a kernel cannot take what `check` has let pass, or None."""
    if unfit is not None:
        raise InputError(f"{OP}: qkv is not supported: {unfit}")


def check_saved(dout: Any, qkv: torch.Tensor, out: Any, lse: Any, num_heads: int) -> None:
    """What the backward operator gets besides: the gradient, and what forward has returned."""
    batch, packed, height, width = qkv.shape
    for name, value in (("dout", dout), ("out", out)):
        check_tensor(OP, name, value, (qkv.dtype,), like=qkv)
        shape = (batch, packed // 3, height, width)
        check_shape(OP, name, value, shape, str(shape))
    check_tensor(OP, "lse", lse, (torch.float32,), like=qkv)
    check_shape(OP, "lse", lse, (batch, num_heads, height * width), f"({batch}, {num_heads}, {height * width})")
