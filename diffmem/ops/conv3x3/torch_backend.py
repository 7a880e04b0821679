"""3×3 convolution, residual and scale out of PyTorch's own operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """(conv2d + residual)·scale, see `diffmem.ops.conv3x3`."""
    y = F.conv2d(x, weight, bias, padding=1)
    if residual is not None:
        y = y + residual
    return y if scale == 1 else y * scale
