"""3×3 convolution with stride 1 and zero padding 1: nine tenths of a UNet's time on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffmem.errors import InputError
from diffmem.ops.conv3x3 import native, reference
from diffmem.ops.conv3x3.arguments import check
from diffmem.ops.registry import Implementation, Op, always, register

OP = register(
    Op(
        "conv3x3",
        (
            Implementation(
                "native",
                "Winograd F(4×4, 3×3), float32, channels multiples of 8, outputs of 16; else PyTorch's",
                native.unavailable,
            ),
            Implementation("pytorch", "torch.nn.functional.conv2d", always),
            Implementation("reference", "nine matrix products", always),
        ),
    )
)


@torch.compiler.assume_constant_result  # torch.compile is not to trace how the choice is made
def _choose(device_type: str, impl: str | None) -> str:
    return OP.choose(device_type, impl)


def conv3x3(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, impl: str | None = None
) -> torch.Tensor:
    """x convolved with 3×3 kernels, (B, O, H, W): Σ_(c,i,j) weight[o, c, i, j]·x[b, c, h + i − 1, w + j − 1] + bias[o].

    x (B, C, H, W), zero outside of the image; weight (O, C, 3, 3); bias (O,) or None. On CPUs with AVX2, large enough
    float32 problems run by Winograd's minimal filtering, within twice the rounding error of the direct sum. `impl`
    forces one. Raises InputError where shapes, dtypes or devices do not fit, or a forced one cannot take them;
    TypeError for what is no tensor.
    """
    check(x, weight, bias)
    chosen = _choose(x.device.type, impl)
    if chosen == "native":
        if native.fits(x, weight.shape[0]):
            return native.conv3x3_winograd(x, weight, bias, False)
        if impl == "native":
            raise InputError(
                f"conv3x3: impl='native' takes float32, channels in multiples of 8, outputs of 16 and at least "
                f"64 tiles of 4×4 pixels, not {x.dtype} x {tuple(x.shape)} and {weight.shape[0]} outputs"
            )
        chosen = "pytorch"
    if chosen == "pytorch":
        return F.conv2d(x, weight, bias, padding=1)
    return reference.conv3x3(x, weight, bias)
