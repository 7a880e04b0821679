"""The Winograd convolution of csrc/conv3x3, as an op that torch.compile and autograd know.

The gradient of the images is the same convolution with the kernel flipped and its channels exchanged; the gradient of
the weights is formed in the transformed domain as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffmem.ops.conv3x3.arguments import check_weight_gradient, check_winograd
from diffmem.ops.cpu_ops import cpu_op, direct, register_gradient
from diffmem.ops.registry import available_core, native_kernel_unavailable, native_module

# Below this many 4×4 tiles the transformed weights cost more than they save.
_MIN_TILES = 32
# Products of the direct sum for each of Winograd's, at least: 4 where the tiles fill the image, 1.6 for 5×5 pixels. Of
# up to 2×2 pixels the core forms direct sums, without those of pixels outside.
_MIN_SAVED = 2.5


def unavailable(device_type: str) -> str | None:
    """Why Winograd convolution cannot run on `device_type`, or None."""
    return native_kernel_unavailable(device_type, "conv3x3", "AVX2")


def unfit(x: torch.Tensor, weight: torch.Tensor, *others: object) -> str | None:
    """Why Winograd convolution cannot, or is not worth to, be used for x (B, C, H, W) and weight (O, C, 3, 3), or
    None."""
    batch, channels, height, width = x.shape
    if x.dtype != torch.float32 and not torch.is_autocast_enabled("cpu"):
        return f"{x.dtype} is not float32"
    if weight.dtype != torch.float32:
        return f"the weights, {weight.dtype}, are not float32"
    if channels % 8 or weight.shape[0] % 16:
        return f"{channels} channels and {weight.shape[0]} outputs are not multiples of 8 and 16"
    tiles = -(-height // 4) * -(-width // 4)
    if batch * tiles < _MIN_TILES:
        return f"{batch} images of {height}×{width} pixels are fewer than {_MIN_TILES} tiles of 4×4 pixels"
    if max(height, width) > 2 and 9 * height * width < _MIN_SAVED * 36 * tiles:
        return f"tiles of 4×4 pixels save too little on images of {height}×{width} pixels"
    return None


def conv3x3(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """x convolved with weight, see `diffmem.ops.conv3x3`.

    In float32 under autocast, too: a quarter of the products at half the rate takes less time than PyTorch's
    convolution in bfloat16, and conversions that the maps between convolutions then need are saved.
    """
    if x.dtype != torch.float32:
        x = x.to(torch.float32)
    if residual is not None and residual.dtype != torch.float32:
        residual = residual.to(torch.float32)
    return _winograd(x, weight, bias, False, residual, scale)


@cpu_op("conv3x3_winograd", differentiable=True)
def conv3x3_winograd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """(x (B, C, H, W) convolved with weight (O, C, 3, 3) + bias + residual)·scale, channels_last.

    `transposed`: with weight (C, O, 3, 3), flipped, which is the gradient of that convolution.
    """
    check_winograd(x, weight, bias, transposed, residual, scale)
    available_core("conv3x3", unavailable("cpu"))
    return _convolved(x, weight, bias, transposed, residual, scale)


def _convolved(x, weight, bias, transposed, residual=None, scale=1.0):
    core = native_module()
    batch, channels, height, width = x.shape
    outputs = weight.shape[1 if transposed else 0]
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty((batch, outputs, height, width), memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    shape = [batch, height, width, channels, outputs]
    packed = torch.empty(core.conv3x3_packed_size(shape))
    address, strides = weight.data_ptr(), list(weight.stride())
    if transposed:
        address += weight.element_size() * 2 * (strides[2] + strides[3])
        strides = [strides[1], strides[0], -strides[2], -strides[3]]
    if bias is not None:
        bias = bias.contiguous()
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    core.conv3x3_pack(shape, address, strides, packed.data_ptr(), threads)
    core.conv3x3_forward(
        shape,
        x.data_ptr(),
        packed.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        scale,
        y.data_ptr(),
        threads,
    )
    return y


@torch.library.register_fake("diffmem::conv3x3_winograd")
def _(x, weight, bias, transposed, residual=None, scale=1.0):
    check_winograd(x, weight, bias, transposed, residual, scale)
    batch, _, height, width = x.shape
    outputs = weight.shape[1 if transposed else 0]
    return torch.empty_like(x.new_empty((batch, outputs, height, width)), memory_format=torch.channels_last)


@cpu_op("conv3x3_weight_gradient")
def conv3x3_weight_gradient(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """(O, C, 3, 3): the gradient of the weights, from x (B, C, H, W) and the gradient (B, O, H, W) of the result."""
    check_weight_gradient(x, gradient)
    available_core("conv3x3", unavailable("cpu"))
    return _of_weight(x, gradient)


def _of_weight(x, gradient):
    batch, channels, height, width = x.shape
    outputs = gradient.shape[1]
    if x.numel() == 0:
        return torch.zeros(outputs, channels, 3, 3).to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    found = torch.empty((outputs, channels, 3, 3), memory_format=torch.channels_last)
    native_module().conv3x3_weight_gradient(
        [batch, height, width, channels, outputs], x.data_ptr(), gradient.data_ptr(), found.data_ptr(),
        list(found.stride()), torch.get_num_threads(),
    )  # fmt: skip
    return found


@torch.library.register_fake("diffmem::conv3x3_weight_gradient")
def _(x, gradient):
    check_weight_gradient(x, gradient)
    shape = (gradient.shape[1], x.shape[1], 3, 3)
    return torch.empty_like(x.new_empty(shape), memory_format=torch.channels_last)


def _save(ctx, inputs, output):
    x, weight, bias, transposed, residual, scale = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias, ctx.has_residual, ctx.transposed, ctx.scale = (
        bias is not None,
        residual is not None,
        transposed,
        scale,
    )


def _backward(ctx, gradient):
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.scale != 1:
        gradient = gradient * ctx.scale
    if ctx.needs_input_grad[0]:
        if x.shape[1] % 16 == 0 and gradient.shape[1] % 8 == 0:
            grad_x = _winograd(gradient, weight, None, not ctx.transposed, None, 1.0)
        elif ctx.transposed:
            grad_x = F.conv2d(gradient, weight, padding=1)
        else:
            grad_x = F.conv_transpose2d(gradient, weight, padding=1)
    if ctx.needs_input_grad[1]:
        # Exchanging what goes in and what comes out turns the one kernel's gradient into the other's.
        inputs, outputs = (gradient, x) if ctx.transposed else (x, gradient)
        if inputs.shape[1] % 8 == 0 and outputs.shape[1] % 16 == 0:
            grad_weight = _direct_of_weight(inputs, outputs)
        else:
            _, grad_weight, _ = torch.ops.aten.convolution_backward(
                outputs, inputs, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
            )
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = gradient.sum(dim=(0, 2, 3))
    return grad_x, grad_weight, grad_bias, None, gradient if ctx.has_residual else None, None


register_gradient("conv3x3_winograd", _backward, _save)
_direct_of_weight = direct(conv3x3_weight_gradient, _of_weight)
_winograd = direct(conv3x3_winograd, _convolved, _backward, _save)
