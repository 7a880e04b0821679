"""GroupNorm, scale and shift, SiLU out of PyTorch's own operations, which `torch.compile` fuses into two passes.

Plain operations on purpose: an opaque custom op would stop Inductor from fusing the neighbors (bias, residual, cast).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
    extra = [1] * (x.ndim - 2)
    if added is not None:
        x = (x + added.reshape(*added.shape, *extra)).to(x.dtype)
    if _cancels(x):
        if weight.requires_grad and not x.requires_grad:
            # F.group_norm's backward ends the process where only the weights of a channels_last tensor want a gradient.
            x = x.contiguous()
        else:
            x = x - _group_means(x.detach(), num_groups)
    y = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        y = torch.addcmul(shift.reshape(*shift.shape, *extra), y, 1 + scale.reshape(*scale.shape, *extra))
    return F.silu(y) if silu else y


def _cancels(x: torch.Tensor) -> bool:
    """Whether F.group_norm would take E[x²] − E[x]², which loses all digits where the mean is far from zero.

    It does so eagerly on the CPU for channels_last tensors (error 5 at mean 1000 and deviation 1). Removing the mean
    first, of which the result is independent, costs one pass. Half precision is accumulated in float32 and left alone.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.ndim == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
    )


def _group_means(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(B, C, 1, 1): each channel's mean over its group."""
    batch, channels = x.shape[:2]
    means = x.mean(dim=(2, 3)).reshape(batch, num_groups, -1).mean(dim=2, keepdim=True)
    return means.expand(batch, num_groups, channels // num_groups).reshape(batch, channels, 1, 1)
