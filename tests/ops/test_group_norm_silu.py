"""diffmem.ops.group_norm_silu: against float64, through compile, and with inputs that break careless kernels."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_as_exact, assert_close, assert_rounded

from diffmem.errors import InputError
from diffmem.ops.group_norm_silu import OP, group_norm_silu
from diffmem.ops.registry import native_module

LEVELS = ["avx2", "avx512"]
LEVELS = LEVELS[
    : 0 if OP["native"].supports("cpu") else 1 + (native_module().cpu_level() == "avx512")
]  # of this processor
IMPLS = ["torch", "reference"]  # those that take everything; `native` has its own tests below, `triton` its own file
native = pytest.mark.skipif(
    (reason := OP["native"].supports("cpu")) is not None, reason=f"no compiled normalization: {reason}"
)


def case(shape=(3, 12, 5, 7), groups=3, adaptive=False, dtype=torch.float32, mean=0.0, seed=0):
    """The arguments of group_norm_silu up to `shift`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    channels = shape[1]
    conditioning = (normal(shape[0], channels), normal(shape[0], channels)) if adaptive else (None, None)
    return normal(*shape) + mean, groups, normal(channels), normal(channels), 1e-5, *conditioning


def by_pytorch_s_own(x, groups, weight, bias, eps, scale, shift, silu):
    """GroupNorm, the conditioning and SiLU as PyTorch's functions, one after the other."""
    y = torch.nn.functional.group_norm(x, groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return torch.nn.functional.silu(y) if silu else y


def in_float64(arguments):
    return [value.double() if isinstance(value, torch.Tensor) else value for value in arguments]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize(("adaptive", "silu"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("impl", IMPLS)
def test_as_exact_as_contiguous_pytorch(impl, adaptive, silu, mean, layout):
    x, *rest = case(adaptive=adaptive, mean=mean)
    expected = group_norm_silu(*in_float64([x, *rest]), silu=silu, impl="reference")
    plain = by_pytorch_s_own(x, *rest, silu)  # on its best-behaved layout
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    y = group_norm_silu(x, *rest, silu=silu, impl=impl)
    assert y.shape == x.shape
    name = "group_norm_silu by its reference" if impl == "reference" else "group_norm_silu"
    assert_as_exact(name, y, plain, expected)
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    arguments = case(shape=(2, 32, 8, 8), groups=8, adaptive=True, dtype=dtype)
    y = group_norm_silu(*arguments)
    expected = group_norm_silu(*in_float64(arguments), impl="reference")
    assert y.dtype == dtype
    assert_rounded("half precision", y, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_constant_groups_and_empty_batches(impl):
    x, *rest = case()
    constant = group_norm_silu(torch.full_like(x, 7.0), *rest, silu=False, impl=impl)
    assert_close("group_norm_silu of constants", constant, rest[2].reshape(1, -1, 1, 1).expand_as(x))
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
    with pytest.raises(InputError, match="both scale and shift, or neither"):
        group_norm_silu(x, groups, weight, bias, eps, scale)
    with pytest.raises(InputError, match="shift"):
        group_norm_silu(x, groups, weight, bias, eps, scale, shift[:2])
    with pytest.raises(InputError, match="no backend 'fast'"):
        group_norm_silu(x, groups, weight, bias, eps, impl="fast")
    with pytest.raises(InputError, match="added"):
        group_norm_silu(x, groups, weight, bias, eps, added=shift[:, :-1])
    with pytest.raises(InputError, match="TRITON_INTERPRET=1"):
        group_norm_silu(x, groups, weight, bias, eps, impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_added_is_added_to_every_pixel(impl):
    x, *rest = case(adaptive=True)
    added = rest[-1]
    for rows in (added, added[:1]):
        whole = group_norm_silu(x + rows[:, :, None, None], *rest, impl=impl)
        torch.testing.assert_close(group_norm_silu(x, *rest, added=rows, impl=impl), whole)


# One block of channels and several, groups of 4, 6, 8 and 1000, widths that are no multiple of 32.
NATIVE_SHAPES = [
    ((3, 16, 5, 7), 4), ((2, 48, 4, 3), 8), ((2, 40, 9, 8), 5), ((1, 256, 33, 31), 32), ((1, 1000, 2, 2), 1),
]  # fmt: skip


def as_channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def gradients(x, rest, added, dy, silu, impl):
    groups, weight, bias, eps, scale, shift = rest
    leaves = [each.detach().requires_grad_() for each in (x, weight, bias, scale, shift, added) if each is not None]
    named = iter(leaves)
    x, weight, bias = next(named), next(named), next(named)
    scale, shift = (None, None) if scale is None else (next(named), next(named))
    y = group_norm_silu(x, groups, weight, bias, eps, scale, shift, silu, next(named, None), impl)
    return [y, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize(
    ("adaptive", "added", "silu"), [(False, True, True), (True, False, True), (False, False, False)]
)
@pytest.mark.parametrize(("shape", "groups"), NATIVE_SHAPES)
def test_native_is_as_exact_as_pytorch(shape, groups, adaptive, added, silu, mean, level, monkeypatch):
    monkeypatch.setenv("DIFFMEM_CPU", level)
    x, *rest = case(shape, groups, adaptive, mean=mean)
    x, dy = as_channels_last(x), as_channels_last(case(shape, groups, seed=1)[0])
    rows = case(shape, groups, adaptive=True, seed=2)[-1][:1] if added else None
    exact = gradients(
        x.double(), in_float64(rest), None if rows is None else rows.double(), dy.double(), silu, "reference"
    )
    plain = gradients(x.contiguous(), rest, rows, dy, silu, "torch")
    found = gradients(x, rest, rows, dy, silu, "native")
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert_as_exact("group_norm_silu", found, plain, exact)


@pytest.mark.parametrize("level", LEVELS)
def test_native_at_the_ends_of_the_range(level, monkeypatch):
    """SiLU where exp overflows, and of what is not a number."""
    monkeypatch.setenv("DIFFMEM_CPU", level)
    x = as_channels_last(torch.zeros(1, 8, 3, 3))
    values = torch.tensor([torch.nan, torch.inf, 1e30, 200.0, 88.0, -20.0, -88.0, -200.0])
    y = group_norm_silu(x, 1, torch.ones(8), values, 1e-5, impl="native")[0, :, 1, 1]
    assert_close("SiLU at the ends of the range", y, torch.nn.functional.silu(values), equal_nan=True)


@native
def test_native_is_well_registered_and_does_not_mind_threads():
    x, *rest, scale, shift = case((2, 32, 6, 5), 4, adaptive=True)
    x = as_channels_last(x).requires_grad_()
    arguments = (x, *rest, scale.requires_grad_(), shift.requires_grad_(), True, shift.detach()[:1])
    torch.library.opcheck(torch.ops.diffmem.group_norm_silu_native, arguments)
    torch.library.opcheck(torch.ops.diffmem.group_norm_silu_native, (x.detach()[:0], *rest, None, None, False, None))
    whole = torch.ops.diffmem.group_norm_silu_native(*arguments)[0]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(torch.ops.diffmem.group_norm_silu_native(*arguments)[0], whole)
    finally:
        torch.set_num_threads(threads)


@native
def test_native_says_what_it_does_not_take():
    x, *rest = case((2, 16, 3, 3), 4)
    for wrong, why in (
        (x, "channels_last"),
        (as_channels_last(x).double(), "float64"),
        (as_channels_last(x[:, :12]), "12"),
    ):
        parameters = [each[:12] if isinstance(each, torch.Tensor) and "12" in why else each for each in rest]
        with pytest.raises(InputError, match=why):
            group_norm_silu(wrong, *parameters, impl="native")
