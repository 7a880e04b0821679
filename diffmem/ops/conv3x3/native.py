"""The Winograd convolution of csrc/conv3x3, as an op that torch.compile and autograd know.

The gradient of the images is the same convolution with the kernel flipped and its channels exchanged; the gradient of
the weights is formed in the transformed domain as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffmem.ops.conv3x3.arguments import check_weight_gradient, check_winograd
from diffmem.ops.registry import available_core, native_kernel_unavailable

# Below this many 4×4 tiles the transformed weights cost more than they save.
_MIN_TILES = 32
# Products of the direct sum for each of Winograd's, at least: 4 where the tiles fill the image, 1 for 2×2 pixels.
_MIN_SAVED = 2.5


def unavailable(device_type: str) -> str | None:
    """Why Winograd convolution cannot run on `device_type`, or None."""
    return native_kernel_unavailable(device_type, "conv3x3", "AVX2")


def unfit(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """Why Winograd convolution cannot, or is not worth to, be used for x (B, C, H, W) and weight (O, C, 3, 3), or
    None."""
    batch, channels, height, width = x.shape
    if x.dtype != torch.float32:
        return f"{x.dtype} is not float32"
    if torch.is_autocast_enabled("cpu"):
        return "autocast asks for a narrower dtype"
    if channels % 8 or weight.shape[0] % 16:
        return f"{channels} channels and {weight.shape[0]} outputs are not multiples of 8 and 16"
    tiles = -(-height // 4) * -(-width // 4)
    if batch * tiles < _MIN_TILES:
        return f"{batch} images of {height}×{width} pixels are fewer than {_MIN_TILES} tiles of 4×4 pixels"
    if 9 * height * width < _MIN_SAVED * 36 * tiles:
        return f"tiles of 4×4 pixels save too little on images of {height}×{width} pixels"
    return None


def conv3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x convolved with weight, see `diffmem.ops.conv3x3`."""
    return conv3x3_winograd(x, weight, bias, False)


@torch.library.custom_op("diffmem::conv3x3_winograd", mutates_args=(), device_types="cpu")
def conv3x3_winograd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    """x (B, C, H, W) convolved with weight (O, C, 3, 3), channels_last.

    `transposed`: with weight (C, O, 3, 3), flipped, which is the gradient of that convolution.
    """
    check_winograd(x, weight, bias, transposed)
    core = available_core("conv3x3", unavailable("cpu"))
    batch, channels, height, width = x.shape
    outputs = weight.shape[1 if transposed else 0]
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty((batch, outputs, height, width), memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    packed = torch.empty(core.conv3x3_packed_size(channels, outputs))
    address, strides = weight.data_ptr(), list(weight.stride())
    if transposed:
        address += weight.element_size() * 2 * (strides[2] + strides[3])
        strides = [strides[1], strides[0], -strides[2], -strides[3]]
    if bias is not None:
        bias = bias.contiguous()
    threads = torch.get_num_threads()
    core.conv3x3_pack(address, strides, channels, outputs, packed.data_ptr(), threads)
    core.conv3x3_forward(
        [batch, height, width, channels, outputs],
        x.data_ptr(),
        packed.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        threads,
    )
    return y


@conv3x3_winograd.register_fake
def _(x, weight, bias, transposed):
    check_winograd(x, weight, bias, transposed)
    batch, _, height, width = x.shape
    outputs = weight.shape[1 if transposed else 0]
    return torch.empty_like(x.new_empty((batch, outputs, height, width)), memory_format=torch.channels_last)


@torch.library.custom_op("diffmem::conv3x3_weight_gradient", mutates_args=(), device_types="cpu")
def conv3x3_weight_gradient(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """(O, C, 3, 3): the gradient of the weights, from x (B, C, H, W) and the gradient (B, O, H, W) of the result."""
    check_weight_gradient(x, gradient)
    batch, channels, height, width = x.shape
    outputs = gradient.shape[1]
    if x.numel() == 0:
        return torch.zeros(outputs, channels, 3, 3).to(memory_format=torch.channels_last)
    core = available_core("conv3x3", unavailable("cpu"))
    x = x.contiguous(memory_format=torch.channels_last)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    found = torch.empty((outputs, channels, 3, 3), memory_format=torch.channels_last)
    core.conv3x3_weight_gradient(
        [batch, height, width, channels, outputs], x.data_ptr(), gradient.data_ptr(), found.data_ptr(),
        list(found.stride()), torch.get_num_threads(),
    )  # fmt: skip
    return found


@conv3x3_weight_gradient.register_fake
def _(x, gradient):
    check_weight_gradient(x, gradient)
    shape = (gradient.shape[1], x.shape[1], 3, 3)
    return torch.empty_like(x.new_empty(shape), memory_format=torch.channels_last)


def _save(ctx, inputs, output):
    x, weight, bias, transposed = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias, ctx.transposed = bias is not None, transposed


def _backward(ctx, gradient):
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        if x.shape[1] % 16 == 0 and gradient.shape[1] % 8 == 0:
            grad_x = conv3x3_winograd(gradient, weight, None, not ctx.transposed)
        elif ctx.transposed:
            grad_x = F.conv2d(gradient, weight, padding=1)
        else:
            grad_x = F.conv_transpose2d(gradient, weight, padding=1)
    if ctx.needs_input_grad[1]:
        # Exchanging what goes in and what comes out turns the one kernel's gradient into the other's.
        inputs, outputs = (gradient, x) if ctx.transposed else (x, gradient)
        if inputs.shape[1] % 8 == 0 and outputs.shape[1] % 16 == 0:
            grad_weight = conv3x3_weight_gradient(inputs, outputs)
        else:
            _, grad_weight, _ = torch.ops.aten.convolution_backward(
                outputs, inputs, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
            )
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = gradient.sum(dim=(0, 2, 3))
    return grad_x, grad_weight, grad_bias, None


conv3x3_winograd.register_autograd(_backward, setup_context=_save)
