"""diffmem.ops.conv3x3: Winograd's sums are as exact as direct ones, its gradients right, its op fit for compile."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from numerics import CLOSE, assert_as_exact, assert_close, assert_rounded

from diffmem.errors import InputError
from diffmem.ops.conv3x3 import OP, conv3x3, native
from diffmem.ops.registry import native_module

AVAILABLE = native.unavailable("cpu")
needs_native = pytest.mark.skipif(AVAILABLE is not None, reason=str(AVAILABLE))
LEVELS = ["avx2", "avx512"]
LEVELS = LEVELS[: 0 if AVAILABLE else 1 + (native_module().cpu_level() == "avx512")]  # of this processor


def case(batch, channels, outputs, height, width, seed=0):
    torch.manual_seed(seed)
    x = F.silu(torch.randn(batch, channels, height, width)).to(memory_format=torch.channels_last)
    weight = torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5
    return x, weight, torch.randn(outputs)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        (5, 16, 32, 16, 16),
        (67, 24, 48, 2, 2),
        (40, 8, 16, 1, 2),
        (33, 16, 32, 1, 1),
        (70, 40, 16, 4, 4),
        (9, 32, 48, 9, 11),
        (33, 8, 16, 6, 7),
        (4, 256, 64, 32, 32),
    ],
)
def test_within_twice_the_error_of_the_direct_sum(shape, bias, level, monkeypatch):
    monkeypatch.setenv("DIFFMEM_CPU", level)
    x, weight, offset = case(*shape)
    offset = offset if bias else None
    exact = conv3x3(x.double(), weight.double(), None if offset is None else offset.double(), impl="reference")
    direct = F.conv2d(x, weight, offset, padding=1)
    y = conv3x3(x, weight, offset, impl="native")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_as_exact("conv3x3", y, direct, exact, norm=True)
    residual = torch.randn_like(y)
    assert torch.equal(conv3x3(x, weight, offset, residual, 0.5, impl="native"), (y + residual) * 0.5)
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
    residual = torch.randn(4, 32, 16, 16, requires_grad=True)
    arguments = (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), transposed, residual, 0.5)
    options = dict(zip(("rtol", "atol"), CLOSE["conv3x3 by Winograd, values of opcheck"], strict=True))
    if "rtol" not in inspect.signature(torch.library.opcheck).parameters:  # PyTorch 2.6: without what compares values
        options = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    torch.library.opcheck(torch.ops.diffmem.conv3x3_winograd, arguments, **options)
    torch.library.opcheck(torch.ops.diffmem.conv3x3_weight_gradient, (x.detach(), torch.randn(4, 32, 16, 16)))


@pytest.mark.parametrize("level", LEVELS)
# More tiles than are held at a time; sizes that are convolved directly.
@pytest.mark.parametrize(
    "shape",
    [
        (6, 16, 13, 16),
        (6, 24, 13, 16),
        (6, 80, 13, 16),
        (80, 48, 13, 16),
        (70, 24, 2, 2),
        (6, 16, 2, 1),
        (40, 80, 1, 1),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_against_float64(transposed, shape, level, monkeypatch):
    monkeypatch.setenv("DIFFMEM_CPU", level)
    batch, channels, *size = shape
    x, weight, bias = case(batch, channels, 32, *size)
    kernel = weight.transpose(0, 1).contiguous() if transposed else weight
    residual = torch.randn(batch, 32, *size)
    leaves = [value.clone().requires_grad_() for value in (x, kernel, bias, residual)]
    exact = [value.detach().double().requires_grad_() for value in leaves]
    y = native.conv3x3_winograd(*leaves[:3], transposed, leaves[3], 0.75)
    if transposed:
        z = F.conv_transpose2d(exact[0], exact[1], exact[2], padding=1)
    else:
        z = F.conv2d(exact[0], exact[1], exact[2], padding=1)
    z = (z + exact[3]) * 0.75
    assert_close("conv3x3 by Winograd", y.double(), z)
    direction = torch.randn_like(z)
    gradients = torch.autograd.grad((y * direction.float()).sum(), leaves)
    for gradient, expected in zip(gradients, torch.autograd.grad((z * direction).sum(), exact), strict=True):
        assert_rounded("conv3x3 gradients", gradient, expected, norm=True)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_other_implementations(impl):
    x, weight, bias = case(2, 3, 5, 4, 6)
    residual = torch.randn(2, 5, 4, 6)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert_close("conv3x3 by PyTorch", conv3x3(x, weight, bias, impl=impl).double(), expected)
    expected = (expected + residual) * 0.5
    assert_close("conv3x3 by PyTorch", conv3x3(x, weight, bias, residual, 0.5, impl=impl).double(), expected)
    assert conv3x3(x[:0], weight, bias, impl=impl).shape == (0, 5, 4, 6)


@needs_native
def test_autocast_leaves_it_in_float32():
    x, weight, bias = case(4, 16, 16, 16, 16)
    expected = conv3x3(x.bfloat16().float(), weight, bias, x.bfloat16().float(), impl="native")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv3x3(x.bfloat16(), weight, bias, x.bfloat16()), expected)


@needs_native
def test_any_number_of_threads():
    """A block of tiles is some thread's, and none is left out or done twice, however many threads there are."""
    x, weight, bias = case(37, 16, 32, 6, 10)
    gradient = torch.randn(37, 32, 6, 10)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append((conv3x3(x, weight, bias, impl="native"), native.conv3x3_weight_gradient(x, gradient)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(ours, first) for each in found[1:] for ours, first in zip(each, found[0], strict=True))


def test_problems_that_winograd_cannot_take():
    x, weight, bias = case(64, 12, 16, 8, 8)  # 12 channels
    torch.testing.assert_close(conv3x3(x, weight, bias), F.conv2d(x, weight, bias, padding=1))
    with pytest.raises(InputError, match="weight must be"):
        conv3x3(x, weight[:, :-1], bias)
    with pytest.raises(InputError, match="residual must be"):
        conv3x3(x, weight, bias, x[:, :, 1:])
    if AVAILABLE is None:
        with pytest.raises(InputError, match="multiples of 8"):
            conv3x3(x, weight, bias, impl="native")
        assert OP.select("cpu", None).name == "native"
        for shape, why in (((300, 16, 16, 5, 5), "save too little"), ((31, 16, 16, 4, 4), "fewer than 32 tiles")):
            x, weight, bias = case(*shape)
            with pytest.raises(InputError, match=why):
                conv3x3(x, weight, bias, impl="native")
