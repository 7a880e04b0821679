"""Self-attention over pixels through `scaled_dot_product_attention`, which picks the device's best kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(qkv: torch.Tensor, num_heads: int) -> torch.Tensor:
    """softmax(q·kᵀ/√c)·v per head, see `diffmem.ops.attention`.

    Of a channels_last map q, k and v are views with contiguous channels, as the fused kernels want them, and so is the
    result; the three gradients are put side by side by one copy. Of a contiguous map one copy comes before them.
    """
    batch, channels, height, width = qkv.shape
    contiguous = qkv.is_contiguous()
    # Of a channels_last map a view; unbound here, since the gradient of `unbind` is a stack in this order of memory.
    tokens = qkv.permute(0, 2, 3, 1).reshape(batch, height * width, 3, num_heads, channels // (3 * num_heads))
    q, k, v = (part.transpose(1, 2) for part in tokens.unbind(2))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    attended = attended.reshape(batch, height, width, channels // 3).permute(0, 3, 1, 2)
    return attended.contiguous() if contiguous else attended
