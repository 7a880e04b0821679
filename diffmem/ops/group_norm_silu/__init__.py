"""GroupNorm followed by SiLU, with an optional scale and shift: most of a UNet's elementwise work."""

from __future__ import annotations

from typing import Any

import torch

from diffmem.ops.group_norm_silu import arguments, native, reference, torch_backend
from diffmem.ops.registry import Backend, Op, register
from diffmem.ops.triton_ops import triton_unavailable


def _triton_kernels() -> Any:
    from diffmem.ops.group_norm_silu import triton_kernels  # imports triton

    return triton_kernels


OP = register(
    Op(
        "group_norm_silu",
        (
            Backend(
                "triton",
                "one launch, one pass over memory",
                lambda *all_arguments: _triton_kernels().group_norm_silu(*all_arguments),
                triton_unavailable,
                lambda x, num_groups, *others: _triton_kernels().unfit(x, num_groups),
            ),
            Backend(
                "native",
                "vectorized, for float32 channels_last maps with channels in multiples of 8; torch for others",
                native.group_norm_silu,
                native.unavailable,
                lambda x, num_groups, *others: native.unfit(x, num_groups),
            ),
            Backend("torch", "PyTorch operations, fused under torch.compile", torch_backend.group_norm_silu),
            Backend("reference", "the plain formula", reference.group_norm_silu),
        ),
    )
)


def fuses_added(device_type: str) -> bool:
    """Whether `added` costs no pass over the map of its own on a device of that type."""
    return OP.select(device_type, None).name in ("triton", "native")


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = True,
    added: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Group-normalized x, scaled, shifted and passed through SiLU, in x's shape, dtype and memory format.

    z = x + added, one number per image and channel (the embedding of DDPM++, arXiv 2011.13456); y = (z − μ)/√(v +
    eps)·weight + bias with the mean μ and (biased) variance v of each image and group of channels (Wu and He, arXiv
    1803.08494); then y·(1 + scale) + shift (the adaptive form of ADM, arXiv 2105.05233); then y·sigmoid(y).

    x (B, C, …) floating; num_groups divides C; weight, bias (C,); scale and shift both (B or 1, C), or both None;
    silu=False stops before the SiLU; added (B or 1, C) or None. `impl` forces a backend. Raises InputError
    where shapes, dtypes, devices or numbers do not fit, or a forced one cannot take them, TypeError for other kinds.
    """
    arguments.check(x, num_groups, weight, bias, eps, scale, shift, added)
    backend = OP.select(x.device.type, impl, x, num_groups)
    return backend.function(x, num_groups, weight, bias, eps, scale, shift, silu, added)
