"""3×3 convolution with stride 1 and zero padding 1: nine tenths of a UNet's time on a CPU."""

from __future__ import annotations

import torch

from diffmem.ops.conv3x3 import native, reference, torch_backend
from diffmem.ops.conv3x3.arguments import check
from diffmem.ops.registry import Backend, Op, register

OP = register(
    Op(
        "conv3x3",
        (
            Backend(
                "native",
                "Winograd F(4×4, 3×3), for float32, channels in multiples of 8, outputs of 16; torch for others",
                native.conv3x3,
                native.unavailable,
                native.unfit,
            ),
            Backend("torch", "torch.nn.functional.conv2d", torch_backend.conv3x3),
            Backend("reference", "nine matrix products", reference.conv3x3),
        ),
    )
)


def conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
    impl: str | None = None,
) -> torch.Tensor:
    """(x convolved with 3×3 kernels + residual)·scale, (B, O, H, W), what is convolved being Σ_(c,i,j)
    weight[o, c, i, j]·x[b, c, h + i − 1, w + j − 1] + bias[o].

    x (B, C, H, W), zero outside of the image; weight (O, C, 3, 3); bias (O,) or None; residual (B, O, H, W) or None. On
    CPUs with AVX2, large enough float32 problems run by Winograd's minimal filtering, within twice the rounding error
    of the direct sum, under autocast as well. `impl` forces a backend. Raises InputError where shapes, dtypes or
    devices do not fit, or a forced one cannot take them; TypeError for what is not a tensor.
    """
    check(x, weight, bias, residual, scale)
    return OP.select(x.device.type, impl, x, weight, bias).function(x, weight, bias, residual, scale)
