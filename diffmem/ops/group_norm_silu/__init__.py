"""GroupNorm followed by SiLU, with an optional scale and shift: most of a UNet's elementwise work."""

from __future__ import annotations

import torch

from diffmem.errors import InputError
from diffmem.ops.group_norm_silu import arguments, native, reference, torch_backend
from diffmem.ops.registry import Implementation, Op, always, register
from diffmem.ops.triton_ops import triton_unavailable

OP = register(
    Op(
        "group_norm_silu",
        (
            Implementation("triton", "one launch, one pass over memory", triton_unavailable),
            Implementation(
                "native", "float32 channels_last, channels in multiples of 8; else PyTorch's", native.unavailable
            ),
            Implementation("pytorch", "PyTorch operations, fused under torch.compile", always),
            Implementation("reference", "the plain formula", always),
        ),
    )
)

_FUNCTIONS = {"pytorch": torch_backend.group_norm_silu, "reference": reference.group_norm_silu}


@torch.compiler.assume_constant_result  # torch.compile is not to trace how the choice is made
def _choose(device_type: str, impl: str | None) -> str:
    return OP.choose(device_type, impl)


def fuses_added(device_type: str) -> bool:
    """Whether `added` costs no pass over the map of its own on a device of that type."""
    return _choose(device_type, None) in ("triton", "native")


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
    silu=False stops before the SiLU; added (B or 1, C) or None. `impl` forces an implementation. Raises InputError
    where shapes, dtypes, devices or numbers do not fit, or a forced one cannot take them, TypeError for other kinds.
    """
    arguments.check(x, num_groups, weight, bias, eps, scale, shift, added)
    function = _FUNCTIONS.get(chosen := _choose(x.device.type, impl))
    if function is None:
        fast = native if chosen == "native" else _triton_kernels()
        why_not = fast.unfit(x, num_groups)
        if why_not is not None and impl is not None:
            raise InputError(f"group_norm_silu: implementation {impl!r} cannot take these arguments: {why_not}")
        function = fast.group_norm_silu if why_not is None else torch_backend.group_norm_silu
    return function(x, num_groups, weight, bias, eps, scale, shift, silu, added)


def _triton_kernels():
    from diffmem.ops.group_norm_silu import triton_kernels  # imports triton

    return triton_kernels
