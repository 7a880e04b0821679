"""Self-attention over the pixels of a feature map, from packed queries, keys and values."""

from __future__ import annotations

import torch

from diffmem.errors import InputError
from diffmem.ops.attention import arguments, composite, reference
from diffmem.ops.registry import Implementation, Op, always, register
from diffmem.ops.triton_ops import triton_unavailable

OP = register(
    Op(
        "attention",
        (
            Implementation(
                "triton",
                "on the packed map as it is; PyTorch's where that is faster",
                triton_unavailable,
            ),
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
    2: v} of a head (the layout of EDM's networks). `impl` forces an implementation; on GPUs the choice is measured at
    the first use of a shape, see `diffmem.ops.attention.preference`. Raises InputError where 3C does not split so, or
    where a forced one cannot take qkv.
    """
    arguments.check(qkv, num_heads)
    chosen = _choose(qkv.device.type, impl)
    if chosen != "triton":
        return _FUNCTIONS[chosen](qkv, num_heads)
    from diffmem.ops.attention import preference, triton_kernels  # imports triton

    why_not = triton_kernels.unfit(qkv, num_heads)
    if impl is not None:
        if why_not is not None:
            raise InputError(f"attention: implementation 'triton' cannot take these arguments: {why_not}")
    elif why_not is not None:
        chosen = "pytorch"
    elif qkv.device.type == "cuda":  # under the interpreter, which is there to check the kernels, they are used
        ways = {"triton": triton_kernels.attention, "pytorch": composite.attention}
        chosen = preference.preferred(qkv, num_heads, ways)
    return (triton_kernels if chosen == "triton" else composite).attention(qkv, num_heads)
