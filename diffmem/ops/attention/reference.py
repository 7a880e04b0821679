"""Self-attention over pixels: the plain formula, fit for float64, which every implementation is tested against."""

from __future__ import annotations

import torch


def attention(qkv: torch.Tensor, num_heads: int) -> torch.Tensor:
    """softmax(q·kᵀ/√c)·v per head, see `diffmem.ops.attention`."""
    batch, channels, height, width = qkv.shape
    q, k, v = qkv.reshape(batch, 3, num_heads, channels // (3 * num_heads), height * width).unbind(1)
    weights = torch.einsum("nhcq,nhck->nhqk", q, k / q.shape[2] ** 0.5).softmax(dim=-1)
    return torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(batch, channels // 3, height, width)
