"""3×3 convolution as nine shifted matrix products: the plain formula, fit for float64."""

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
    """Σ over the nine taps of weight[:, :, i, j]·(x shifted by (i − 1, j − 1)), see `diffmem.ops.conv3x3`."""
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    y = sum(
        torch.einsum("oc,bchw->bohw", weight[:, :, i, j], padded[:, :, i : i + height, j : j + width])
        for i in range(3)
        for j in range(3)
    )
    if bias is not None:
        y = y + bias.reshape(1, -1, 1, 1)
    return (y if residual is None else y + residual) * scale  # type: ignore[return-value] # not 0: a sum of nine
