"""Self-attention over the pixels of a feature map, from packed queries, keys and values."""

from __future__ import annotations

from typing import Any

import torch

from diffmem.ops.attention import arguments, autotune, reference, torch_backend
from diffmem.ops.registry import Backend, Op, register
from diffmem.ops.triton_ops import triton_unavailable


def _triton_kernels() -> Any:
    from diffmem.ops.attention import triton_kernels  # imports triton

    return triton_kernels


OP = register(
    Op(
        "attention",
        (
            Backend(
                "triton",
                "kernels that read the packed map",
                lambda qkv, num_heads: _triton_kernels().attention(qkv, num_heads),
                triton_unavailable,
                lambda qkv, num_heads: _triton_kernels().unfit(qkv, num_heads),
            ),
            Backend("torch", "torch.nn.functional.scaled_dot_product_attention", torch_backend.attention),
            Backend("reference", "the plain formula", reference.attention),
        ),
        autotuned=("triton", "torch"),
    )
)


def attention(qkv: torch.Tensor, num_heads: int, impl: str | None = None) -> torch.Tensor:
    """Attention of every pixel over all pixels, softmax(q·kᵀ/√c)·v per head, as a map (B, C, H, W) like qkv in dtype
    and layout.

    qkv (B, 3C, H, W) packs its channel axis as (3, num_heads, c), c = C/num_heads: all queries, then all keys, then all
    values, which are views with contiguous channels where the map is channels_last. (EDM's networks pack it (num_heads,
    c, 3); `diffmem.models.blocks.QueryKeyValue` regroups their weights.) `impl` forces a backend; on GPUs the
    fastest is measured at the first use of a shape, see `diffmem.ops.attention.autotune`. Raises InputError where 3C
    does not split so, or where a forced one cannot take qkv.
    """
    arguments.check(qkv, num_heads)
    backend = OP.select(qkv.device.type, impl, qkv, num_heads)
    if impl is None and backend.name == "triton" and qkv.device.type == "cuda":  # the interpreter is there for checks
        backend = OP[autotune.fastest_backend(qkv, num_heads, {name: OP[name].function for name in OP.autotuned})]
    return backend.function(qkv, num_heads)
