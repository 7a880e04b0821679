"""diffmem.ops.conv3x3: Winograd's sums are as exact as direct ones, its gradients right, its op fit for compile."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from numerics import CLOSE, assert_as_exact, assert_close, assert_rounded

from diffmem.errors import InputError
from diffmem.ops.conv3x3 import OP, conv3x3, native

AVAILABLE = native.unavailable("cpu")
needs_native = pytest.mark.skipif(AVAILABLE is not None, reason=str(AVAILABLE))


def case(batch, channels, outputs, height, width, seed=0):
    torch.manual_seed(seed)
    x = F.silu(torch.randn(batch, channels, height, width)).to(memory_format=torch.channels_last)
    weight = torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5
    return x, weight, torch.randn(outputs)


@needs_native
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(5, 16, 32, 16, 16), (70, 48, 16, 4, 4), (9, 32, 16, 9, 11), (33, 16, 16, 5, 7), (4, 256, 64, 32, 32)]
)
def test_within_twice_the_error_of_the_direct_sum(shape, bias):
    x, weight, offset = case(*shape)
    offset = offset if bias else None
    exact = conv3x3(x.double(), weight.double(), None if offset is None else offset.double(), impl="reference")
    direct = F.conv2d(x, weight, offset, padding=1)
    y = conv3x3(x, weight, offset, impl="native")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_as_exact("conv3x3", y, direct, exact, norm=True)
    # The border, one pixel deep, is where a wrong tile would show.
    for edge in (slice(0, 1), slice(-1, None)):
        assert_close("conv3x3 by PyTorch", y[:, :, edge].double(), exact[:, :, edge])
        assert_close("conv3x3 by PyTorch", y[..., edge].double(), exact[..., edge])


@needs_native
def test_any_layout_and_poisoned_neighbors():
    x, weight, bias = case(4, 16, 16, 17, 18)
    expected = F.conv2d(x, weight, bias, padding=1)
    strided = torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    strided_weight = torch.stack([weight, torch.full_like(weight, torch.nan)], dim=-1)[..., 0]
    for variant in (x.contiguous(), strided):
        for kernel in (weight, strided_weight, weight.to(memory_format=torch.channels_last)):
            assert_close("conv3x3 by Winograd", conv3x3(variant, kernel, bias, impl="native"), expected)
    # A NaN stays within reach of its own tile: pixels two tiles away are clean.
    x[0, 0, 0, 0] = torch.nan
    y = conv3x3(x, weight, bias, impl="native")
    assert y[0, :, 0, 0].isnan().all()
    assert y[0, :, 6:, 6:].isfinite().all()
    assert y[1:].isfinite().all()


@needs_native
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed):
    x, weight, bias = case(4, 16, 32, 16, 16)
    if transposed:
        weight, bias = weight.transpose(0, 1).contiguous(), bias
    arguments = (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), transposed)
    options = dict(zip(("rtol", "atol"), CLOSE["conv3x3 by Winograd, values of opcheck"], strict=True))
    if "rtol" not in inspect.signature(torch.library.opcheck).parameters:  # PyTorch 2.6: without what compares values
        options = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    torch.library.opcheck(torch.ops.diffmem.conv3x3_winograd, arguments, **options)
    torch.library.opcheck(torch.ops.diffmem.conv3x3_weight_gradient, (x.detach(), torch.randn(4, 32, 16, 16)))


@needs_native
@pytest.mark.parametrize("channels", [16, 24, 80])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_against_float64(transposed, channels):
    x, weight, bias = case(6, channels, 32, 13, 16)
    kernel = weight.transpose(0, 1).contiguous() if transposed else weight
    leaves = [value.clone().requires_grad_() for value in (x, kernel, bias)]
    exact = [value.detach().double().requires_grad_() for value in leaves]
    y = native.conv3x3_winograd(*leaves, transposed)
    if transposed:
        z = F.conv_transpose2d(exact[0], exact[1], exact[2], padding=1)
    else:
        z = F.conv2d(exact[0], exact[1], exact[2], padding=1)
    assert_close("conv3x3 by Winograd", y.double(), z)
    direction = torch.randn_like(z)
    gradients = torch.autograd.grad((y * direction.float()).sum(), leaves)
    for gradient, expected in zip(gradients, torch.autograd.grad((z * direction).sum(), exact), strict=True):
        assert_rounded("conv3x3 gradients", gradient, expected, norm=True)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_other_implementations(impl):
    x, weight, bias = case(2, 3, 5, 4, 6)
    expected = conv3x3(x.double(), weight.double(), bias.double(), impl="reference")
    assert_close("conv3x3 by PyTorch", conv3x3(x, weight, bias, impl=impl).double(), expected)
    assert conv3x3(x[:0], weight, bias, impl=impl).shape == (0, 5, 4, 6)


def test_problems_that_winograd_cannot_take():
    x, weight, bias = case(64, 12, 16, 8, 8)  # 12 channels
    torch.testing.assert_close(conv3x3(x, weight, bias), F.conv2d(x, weight, bias, padding=1))
    with pytest.raises(InputError, match="weight must be"):
        conv3x3(x, weight[:, :-1], bias)
    if AVAILABLE is None:
        with pytest.raises(InputError, match="multiples of 8"):
            conv3x3(x, weight, bias, impl="native")
        assert OP.select("cpu", None).name == "native"
