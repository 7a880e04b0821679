"""What `group_norm_silu` and its operators ask of their arguments."""

from __future__ import annotations

from typing import Any

import torch

from diffmem.errors import InputError
from diffmem.ops.arguments import check_number, check_shape, check_tensor, check_whole

OP = "group_norm_silu"

# What the operators of all backends take: the arguments of `diffmem.ops.group_norm_silu`, and those of its gradient.
FORWARD = (
    "Tensor x, int num_groups, Tensor weight, Tensor bias, float eps, "
    "Tensor? scale, Tensor? shift, bool silu, Tensor? added"
)
BACKWARD = (
    "Tensor dy, Tensor x, Tensor mean, Tensor rstd, int num_groups, Tensor weight, Tensor bias, "
    "Tensor? scale, Tensor? shift, bool silu, Tensor? added"
)


def check(x: Any, num_groups: Any, weight: Any, bias: Any, eps: Any, scale: Any, shift: Any, added: Any) -> None:
    check_tensor(OP, "x", x)
    check_whole(OP, "num_groups", num_groups, 1)
    check_number(OP, "eps", eps)
    if x.ndim < 2 or x.shape[1] < 1 or x.shape[1] % num_groups:
        raise InputError(f"{OP}: x {tuple(x.shape)} does not split into num_groups = {num_groups} groups of channels")
    batch, channels = x.shape[:2]
    for name, value in (("weight", weight), ("bias", bias)):
        check_tensor(OP, name, value, like=x)
        check_shape(OP, name, value, (channels,), f"({channels},)")
    if (scale is None) != (shift is None):
        raise InputError(f"{OP}: give both scale and shift, or neither")
    for name, value in (("scale", scale), ("shift", shift), ("added", added)):
        if value is not None:
            check_tensor(OP, name, value, like=x)
            rows = None if value.ndim and value.shape[0] == 1 else batch
            check_shape(OP, name, value, (rows, channels), f"({batch}, {channels}) or (1, {channels})")


def check_kernel(unfit: str | None) -> None:
    """unfit: why a kernel cannot take what `check` has let pass, or None."""
    if unfit is not None:
        raise InputError(f"{OP}: x is not supported: {unfit}")


def check_saved(
    dy: Any, x: torch.Tensor, mean: Any, rstd: Any, statistics: tuple[int, ...], dtype: torch.dtype
) -> None:
    """What the backward operators get besides: the gradient, and what forward has kept."""
    check_tensor(OP, "dy", dy, (x.dtype,), like=x)
    check_shape(OP, "dy", dy, tuple(x.shape), str(tuple(x.shape)))
    check_tensor(OP, "mean", mean, (dtype,), like=x)
    check_shape(OP, "mean", mean, statistics, str(statistics))
    check_tensor(OP, "rstd", rstd, (torch.float32,), like=x)
    check_shape(OP, "rstd", rstd, statistics[-2:], str(statistics[-2:]))
