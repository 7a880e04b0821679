"""Self-attention over the pixels of a feature map, from packed queries, keys and values."""

from __future__ import annotations

import torch

from diffmem.errors import InputError
from diffmem.ops.attention import arguments, reference, torch_backend
from diffmem.ops.registry import Implementation, Op, always, register
from diffmem.ops.triton_ops import triton_unavailable

OP = register(
    Op(
        "attention",
        (
            Implementation(
                "triton",
                "where it was measured to be faster than PyTorch's",
                triton_unavailable,
            ),
            Implementation("pytorch", "torch.nn.functional.scaled_dot_product_attention", always),
            Implementation("reference", "the plain formula", always),
        ),
    )
)

_FUNCTIONS = {"pytorch": torch_backend.attention, "reference": reference.attention}


@torch.compiler.assume_constant_result  # torch.compile is not to trace how the choice is made
def _choose(device_type: str, impl: str | None) -> str:
    return OP.choose(device_type, impl)


def attention(qkv: torch.Tensor, num_heads: int, impl: str | None = None) -> torch.Tensor:
    """Attention of every pixel over all pixels, softmax(q·kᵀ/√c)·v per head, as a map (B, C, H, W) like qkv in dtype
    and layout.

    qkv (B, 3C, H, W) packs its channel axis as (3, num_heads, c), c = C/num_heads: all queries, then all keys, then all
    values, which are views with contiguous channels where the map is channels_last. (EDM's networks pack it (num_heads,
    c, 3); `diffmem.models.blocks.QueryKeyValue` regroups their weights.) `impl` forces an implementation; on GPUs the
    choice is measured at the first use of a shape, see `diffmem.ops.attention.autotune`. Raises InputError where 3C
    does not split so, or where a forced one cannot take qkv.
    """
    arguments.check(qkv, num_heads)
    chosen = _choose(qkv.device.type, impl)
    if chosen != "triton":
        return _FUNCTIONS[chosen](qkv, num_heads)
    from diffmem.ops.attention import autotune, triton_kernels  # imports triton

    why_not = triton_kernels.unfit(qkv, num_heads)
    if impl is not None:
        if why_not is not None:
            raise InputError(f"attention: implementation 'triton' cannot take these arguments: {why_not}")
    elif why_not is not None:
        chosen = "pytorch"
    elif qkv.device.type == "cuda":  # under the interpreter, which is there to check the kernels, they are used
        backends = {"triton": triton_kernels.attention, "pytorch": torch_backend.attention}
        chosen = autotune.fastest_backend(qkv, num_heads, backends)
    return (triton_kernels if chosen == "triton" else torch_backend).attention(qkv, num_heads)
