"""GroupNorm, scale and shift, SiLU out of PyTorch's own operations, which `torch.compile` fuses into two passes.

Kept a composite on purpose: an opaque custom op would stop Inductor from fusing the neighbours (bias, residual, cast).
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
) -> torch.Tensor:
    """silu((x − mean)/√(var + eps)·weight + bias), see `diffmem.ops.group_norm_silu`."""
    if _eager_channels_last(x):
        y = _group_norm_channels_last(x, num_groups, weight, bias, eps)
    else:
        y = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None:
        extra = [1] * (x.ndim - 2)
        y = torch.addcmul(shift.reshape(*shift.shape, *extra), y, 1 + scale.reshape(*scale.shape, *extra))
    return F.silu(y) if silu else y


def _eager_channels_last(x: torch.Tensor) -> bool:
    """Whether PyTorch's own GroupNorm is to be avoided.

    Eager F.group_norm takes E[x²] − E[x]² of channels_last tensors on the CPU, which loses all digits where the mean is far
    from zero (error 5 at mean 1000 and deviation 1), and copies them to NCHW on GPUs. Inductor's decomposition has neither
    flaw; half precision is left to F.group_norm, which accumulates it in float32.
    """
    return (
        not torch.compiler.is_compiling()
        and x.ndim == 4
        and x.dtype in (torch.float32, torch.float64)
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def _group_norm_channels_last(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """GroupNorm as one multiply-add, with statistics per channel (Welford, no cancellation) merged into those of groups."""
    batch, channels = x.shape[:2]
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)
    variance, mean = (values.reshape(batch, num_groups, -1) for values in (variance, mean))
    group_mean = mean.mean(dim=2, keepdim=True)
    group_variance = (variance + (mean - group_mean).square()).mean(dim=2, keepdim=True)
    gain = weight.reshape(num_groups, -1) * (group_variance + eps).rsqrt()
    offset = bias.reshape(num_groups, -1) - group_mean * gain
    return torch.addcmul(offset.reshape(batch, channels, 1, 1), x, gain.reshape(batch, channels, 1, 1))
