"""diffmem.ops.group_norm_silu: against float64, through compile, and with inputs that break careless kernels."""

from __future__ import annotations

import pytest
import torch

from diffmem.errors import InputError
from diffmem.ops.group_norm_silu import OP, group_norm_silu

IMPLS = [implementation.name for implementation in OP.implementations if implementation.unavailable("cpu") is None]


def case(shape=(3, 12, 5, 7), groups=3, adaptive=False, dtype=torch.float32, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    channels = shape[1]
    conditioning = (normal(shape[0], channels), normal(shape[0], channels)) if adaptive else (None, None)
    return normal(*shape) + mean, groups, normal(channels), normal(channels), 1e-5, *conditioning


def in_float64(arguments):
    return [value.double() if isinstance(value, torch.Tensor) else value for value in arguments]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize(("adaptive", "silu"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("impl", IMPLS)
def test_as_exact_as_contiguous_pytorch(impl, adaptive, silu, mean, layout):
    x, *rest = case(adaptive=adaptive, mean=mean)
    expected = group_norm_silu(*in_float64([x, *rest]), silu=silu, impl="reference")
    # The yardstick: PyTorch's own GroupNorm on its best-behaved layout.
    plain = torch.nn.functional.group_norm(x, *rest[:4])
    exact = torch.nn.functional.group_norm(x.double(), *in_float64(rest[:4]))
    allowed = 8 * (plain - exact).abs().max() + 2e-6
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    y = group_norm_silu(x, *rest, silu=silu, impl=impl)
    assert y.shape == x.shape
    assert (y - expected).abs().max() <= allowed
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    arguments = case(shape=(2, 32, 8, 8), groups=8, adaptive=True, dtype=dtype)
    y = group_norm_silu(*arguments)
    expected = group_norm_silu(*in_float64(arguments), impl="reference")
    assert y.dtype == dtype
    assert (y - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("impl", IMPLS)
def test_constant_groups_and_empty_batches(impl):
    x, *rest = case()
    constant = group_norm_silu(torch.full_like(x, 7.0), *rest, silu=False, impl=impl)
    # A variance of zero multiplies the mean's rounding (7 · 2⁻²⁴) by 1/√eps and the weights, and by nothing worse.
    torch.testing.assert_close(constant, rest[2].reshape(1, -1, 1, 1).expand_as(x), atol=5e-4, rtol=0)
    assert group_norm_silu(x[:0], *rest, impl=impl).shape == x[:0].shape


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients(impl, channels_last):
    x, groups, weight, bias, eps, scale, shift = case((2, 4, 3, 2), 2, adaptive=True, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    leaves = [value.requires_grad_() for value in (x, weight, bias, scale, shift)]

    def function(x, weight, bias, scale, shift):
        return group_norm_silu(x, groups, weight, bias, eps, scale, shift, impl=impl)

    assert torch.autograd.gradcheck(function, leaves)


def test_gradients_of_the_weights_alone():
    # PyTorch 2.13's own backward crashes here.
    x, groups, weight, bias, eps, *_ = case((2, 8, 4, 4), 2)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        y = group_norm_silu(x.to(memory_format=layout), groups, weight.requires_grad_(), bias.requires_grad_(), eps)
        gradients.append(torch.autograd.grad(y.square().sum(), (weight, bias)))
    torch.testing.assert_close(*gradients)


def test_one_conditioning_row_serves_all_images():
    x, *rest, scale, shift = case(adaptive=True)
    whole = group_norm_silu(x, *rest, scale[:1].expand_as(scale), shift[:1].expand_as(shift))
    torch.testing.assert_close(group_norm_silu(x, *rest, scale[:1], shift[:1]), whole)


def test_bad_arguments():
    x, groups, weight, bias, eps, scale, shift = case(adaptive=True)
    with pytest.raises(InputError, match="5 groups"):
        group_norm_silu(x, 5, weight, bias, eps)
    with pytest.raises(InputError, match="weight"):
        group_norm_silu(x, groups, weight[:-1], bias, eps)
    with pytest.raises(InputError, match="both or neither"):
        group_norm_silu(x, groups, weight, bias, eps, scale)
    with pytest.raises(InputError, match="shift"):
        group_norm_silu(x, groups, weight, bias, eps, scale, shift[:2])
    with pytest.raises(InputError, match="no implementation 'fast'"):
        group_norm_silu(x, groups, weight, bias, eps, impl="fast")
