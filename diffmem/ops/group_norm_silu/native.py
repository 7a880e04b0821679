"""The channels_last normalization of csrc/group_norm_silu, as an op that torch.compile and autograd know."""

from __future__ import annotations

import math

import torch

from diffmem.ops.cpu_ops import cpu_op, direct, register_gradient
from diffmem.ops.group_norm_silu import arguments
from diffmem.ops.registry import available_core, native_kernel_unavailable, native_module

_WIDEST = 1024  # channels that the core takes at once: whole groups and multiples of 8


def unavailable(device_type: str) -> str | None:
    """Why the compiled normalization cannot run on `device_type`, or None."""
    return native_kernel_unavailable(device_type, "group_norm_silu", "AVX2")


def unfit(x: torch.Tensor, num_groups: int) -> str | None:
    """Why the compiled normalization cannot take x, or is not to, or None."""
    if x.ndim != 4 or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not channels_last"
    return _unfit(x, num_groups)


def _unfit(x: torch.Tensor, num_groups: int) -> str | None:
    """Why the compiled normalization cannot take x, in whichever layout, or None."""
    if x.dtype != torch.float32:
        return f"{x.dtype} is not float32"
    if x.ndim != 4:
        return f"it has {x.ndim} axes, not 4"
    channels = x.shape[1]
    if channels % 8 or math.lcm(channels // num_groups, 8) > _WIDEST:
        return f"{channels} channels in {num_groups} groups are not multiples of 8 in blocks of at most {_WIDEST}"
    return None


@cpu_op("group_norm_silu_native", f"({arguments.FORWARD}) -> (Tensor, Tensor, Tensor)", differentiable=True)
def group_norm_silu_forward(x, num_groups, weight, bias, eps, scale, shift, silu, added):
    """The result, and the mean (float64) and 1/√(variance + eps) of each image's groups, (B, num_groups)."""
    _check(x, num_groups, weight, bias, eps, scale, shift, added)
    available_core("group_norm_silu", unavailable("cpu"))
    return _forward(x, num_groups, weight, bias, eps, scale, shift, silu, added)


def _forward(x, num_groups, weight, bias, eps, scale, shift, silu, added):
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x)
    mean = torch.empty((x.shape[0], num_groups), dtype=torch.float64)
    rstd = torch.empty((x.shape[0], num_groups))
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    shape, kept, addresses, strides = _arguments(x, num_groups, weight, bias, scale, shift, added)
    native_module().group_norm_silu_forward(
        shape, addresses, strides, eps, silu, x.data_ptr(), y.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    del kept
    return y, mean, rstd


@torch.library.register_fake("diffmem::group_norm_silu_native")
def _(x, num_groups, weight, bias, eps, scale, shift, silu, added):
    _check(x, num_groups, weight, bias, eps, scale, shift, added)
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float64)
    return (
        torch.empty_like(x, memory_format=torch.channels_last),
        mean,
        torch.empty_like(mean, dtype=torch.float32),
    )


@cpu_op("group_norm_silu_native_backward", f"({arguments.BACKWARD}) -> (Tensor, Tensor)")
def group_norm_silu_backward(dy, x, mean, rstd, num_groups, weight, bias, scale, shift, silu, added):
    """dx, and sums (3, B, C): Σ g, Σ g·x̂ and Σ dx over each channel's pixels, g the gradient before SiLU."""
    _check_backward(dy, x, mean, rstd, num_groups, weight, bias, scale, shift, added)
    available_core("group_norm_silu", unavailable("cpu"))
    return _gradient(dy, x, mean, rstd, num_groups, weight, bias, scale, shift, silu, added)


def _gradient(dy, x, mean, rstd, num_groups, weight, bias, scale, shift, silu, added):
    x = x.contiguous(memory_format=torch.channels_last)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx = torch.empty_like(x)
    sums = torch.empty((3, *x.shape[:2]))
    if x.numel() == 0:
        return dx, sums.zero_()
    shape, kept, addresses, strides = _arguments(x, num_groups, weight, bias, scale, shift, added)
    native_module().group_norm_silu_backward(
        shape, addresses, strides, silu, dy.data_ptr(), x.data_ptr(), mean.data_ptr(), rstd.data_ptr(), dx.data_ptr(),
        sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    del kept
    return dx, sums


@torch.library.register_fake("diffmem::group_norm_silu_native_backward")
def _(dy, x, mean, rstd, num_groups, weight, bias, scale, shift, silu, added):
    _check_backward(dy, x, mean, rstd, num_groups, weight, bias, scale, shift, added)
    return torch.empty_like(x, memory_format=torch.channels_last), x.new_empty((3, *x.shape[:2]))


def _check(x, num_groups, weight, bias, eps, scale, shift, added):
    arguments.check(x, num_groups, weight, bias, eps, scale, shift, added)
    # The layout is made what it must be.
    arguments.check_kernel(_unfit(x, num_groups))


def _check_backward(dy, x, mean, rstd, num_groups, weight, bias, scale, shift, added):
    _check(x, num_groups, weight, bias, 0.0, scale, shift, added)
    arguments.check_saved(dy, x, mean, rstd, (x.shape[0], num_groups), torch.float64)


def _arguments(x, num_groups, weight, bias, scale, shift, added):
    """Sizes, tensors to be kept alive, their addresses (0 for None), and the row strides of the last three."""
    batch, channels, height, width = x.shape
    kept = [
        None if each is None else each.to(torch.float32).contiguous() for each in (weight, bias, scale, shift, added)
    ]
    addresses = [0 if each is None else each.data_ptr() for each in kept]
    strides = [0 if each is None or each.shape[0] == 1 else channels for each in kept[2:]]
    return [batch, height * width, channels, num_groups], kept, addresses, strides


def _save(ctx, inputs, output):
    x, num_groups, weight, bias, _eps, scale, shift, silu, added = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift, added)
    ctx.num_groups, ctx.silu = num_groups, silu
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx, dy, _dmean, _drstd):
    x, mean, rstd, weight, bias, scale, shift, added = ctx.saved_tensors
    dx, sums = _direct_backward(dy, x, mean, rstd, ctx.num_groups, weight, bias, scale, shift, ctx.silu, added)
    of_g, of_product, of_dx = sums.unbind(0)
    dscale = dshift = dadded = None
    if scale is not None:
        dscale = (of_product * weight + of_g * bias).sum_to_size(scale.shape)
        dshift = of_g.sum_to_size(shift.shape)
        of_g, of_product = of_g * (1 + scale), of_product * (1 + scale)
    if added is not None:
        dadded = of_dx.sum_to_size(added.shape)
    return dx, None, of_product.sum(0), of_g.sum(0), None, dscale, dshift, None, dadded


register_gradient("group_norm_silu_native", _backward, _save)
_direct_backward = direct(group_norm_silu_backward, _gradient)
_direct_forward = direct(group_norm_silu_forward, _forward, _backward, _save)


def group_norm_silu(*all_arguments) -> torch.Tensor:
    """silu((x − mean)/√(var + eps)·weight + bias), with the arguments of `diffmem.ops.group_norm_silu`."""
    return _direct_forward(*all_arguments)[0]
