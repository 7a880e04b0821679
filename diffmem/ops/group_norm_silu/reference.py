"""GroupNorm, scale and shift, SiLU: the plain formula, fit for float64, which all backends are held against."""

from __future__ import annotations

import math

import torch


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = True,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu((x − mean)/√(var + eps)·weight + bias), see `diffmem.ops.group_norm_silu`."""

    def per_channel(values: torch.Tensor) -> torch.Tensor:
        return values.reshape(*values.shape, *[1] * (x.ndim - 2))

    if added is not None:
        x = x + per_channel(added)
    grouped = x.reshape(len(x), num_groups, x.shape[1] // num_groups, math.prod(x.shape[2:]))
    mean = grouped.mean(dim=(2, 3), keepdim=True)
    variance = (grouped - mean).square().mean(dim=(2, 3), keepdim=True)
    y = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
    y = y * per_channel(weight[None]) + per_channel(bias[None])
    if scale is not None and shift is not None:
        y = y * (1 + per_channel(scale)) + per_channel(shift)
    return y * torch.sigmoid(y) if silu else y
