"""Self-attention over pixels through `scaled_dot_product_attention`, which picks the device's best kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(qkv: torch.Tensor, num_heads: int) -> torch.Tensor:
    """softmax(q·kᵀ/√c)·v per head, see `diffmem.ops.attention`."""
    batch, channels, height, width = qkv.shape
    head_channels = channels // (3 * num_heads)
    # (3, B, heads, pixels, channels): one copy that leaves q, k and v contiguous, as the fused kernels want them.
    packed = qkv.reshape(batch, num_heads, head_channels, 3, height * width)
    q, k, v = packed.permute(3, 0, 1, 4, 2).contiguous().unbind(0)
    attended = F.scaled_dot_product_attention(q, k, v)
    if qkv.is_contiguous():
        return attended.permute(0, 1, 3, 2).reshape(batch, channels // 3, height, width)
    attended = attended.permute(0, 2, 1, 3).reshape(batch, height, width, channels // 3)
    return attended.permute(0, 3, 1, 2)
