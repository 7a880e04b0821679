"""Self-attention over the pixels of a feature map, from packed queries, keys and values."""

from __future__ import annotations

import torch

from diffmem.errors import InputError
from diffmem.ops.attention import composite, reference
from diffmem.ops.registry import Implementation, Op, always, register

OP = register(
    Op(
        "attention",
        (
            Implementation("pytorch", "torch.nn.functional.scaled_dot_product_attention", always),
            Implementation("reference", "the plain formula", always),
        ),
    )
)

_FUNCTIONS = {"pytorch": composite.attention, "reference": reference.attention}


@torch.compiler.assume_constant_result  # torch.compile is not to trace how the choice is made
def _choose(device_type: str, impl: str | None) -> str:
    return OP.choose(device_type, impl)


def attention(qkv: torch.Tensor, num_heads: int, impl: str | None = None) -> torch.Tensor:
    """Attention of every pixel over all pixels, softmax(q·kᵀ/√c)·v per head, as a map (B, C, H, W) like qkv in dtype
    and layout.

    qkv (B, 3C, H, W) packs, per head, the channel axis as (c, 3), c = C/num_heads channels: channel 3·i + {0: q, 1: k,
    2: v} of a head (the layout of EDM's networks). `impl` forces an implementation. Raises InputError where 3C does
    not split so.
    """
    if qkv.ndim != 4 or num_heads < 1 or qkv.shape[1] % (3 * num_heads):
        raise InputError(
            f"attention: qkv {tuple(qkv.shape)} must be (B, 3C, H, W) with C a multiple of num_heads={num_heads}"
        )
    return _FUNCTIONS[_choose(qkv.device.type, impl)](qkv, num_heads)
