"""Ops of the core that are called without PyTorch's dispatcher: the same bits, and seen by all that looks at ops."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from diffmem.ops.conv3x3 import OP as CONV
from diffmem.ops.conv3x3 import conv3x3, native
from diffmem.ops.group_norm_silu import OP as NORM
from diffmem.ops.group_norm_silu import group_norm_silu

MISSING = CONV["native"].supports("cpu") or NORM["native"].supports("cpu")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no compiled ops of networks: {MISSING}")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def channels_last(*shape):
    return normal(*shape).to(memory_format=torch.channels_last)


def norm_arguments():
    x, rows = channels_last(4, 16, 8, 8), [normal(4, 16, seed=seed) for seed in (3, 4, 5)]
    return [x, 4, normal(16, seed=1), normal(16, seed=2), 1e-5, *rows[:2], True, rows[2]]


def conv_arguments(x=None):
    x = channels_last(8, 16, 8, 8) if x is None else x
    return [x, normal(32, 16, 3, 3, seed=1), normal(32, seed=2), normal(8, 32, 8, 8, seed=3), 0.5]


def norm(*arguments):
    return group_norm_silu(*arguments, impl="native")


def conv(*arguments):
    return conv3x3(*arguments, impl="native")


def norm_op(*arguments):
    return torch.ops.diffmem.group_norm_silu_native(*arguments)[0]


def conv_op(x, weight, bias, residual, scale):
    return torch.ops.diffmem.conv3x3_winograd(x, weight, bias, False, residual, scale)


BOTH = pytest.mark.parametrize(
    ("public", "op", "arguments", "name"),
    [
        (norm, norm_op, norm_arguments, "group_norm_silu_native"),
        (conv, conv_op, conv_arguments, "conv3x3_winograd"),
    ],
)


def with_leaves(arguments):
    """The arguments with tensors that ask for a gradient, and those tensors."""
    given = [each.clone().requires_grad_() if isinstance(each, torch.Tensor) else each for each in arguments]
    return given, [each for each in given if isinstance(each, torch.Tensor)]


class Seen(TorchDispatchMode):
    """The names of the ops called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@BOTH
def test_values_and_gradients_are_the_op_s(public, op, arguments, name):
    found = []
    for function in (public, op):
        given, leaves = with_leaves(arguments())
        y = function(*given)
        found.append([y, *torch.autograd.grad((y * normal(*y.shape, seed=9)).sum(), leaves)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    given, _ = with_leaves(arguments())
    with torch.no_grad():
        assert torch.equal(public(*given), op(*given))


@BOTH
def test_what_looks_at_ops_sees_them(public, op, arguments, name):
    given, leaves = with_leaves(arguments())
    with Seen() as seen:
        torch.autograd.grad(public(*given).sum(), leaves)
    backward = {"conv3x3_winograd": "conv3x3_weight_gradient"}.get(name, f"{name}_backward")
    assert {f"diffmem::{name}", f"diffmem::{backward}"} <= set(seen.names)
    with torch.profiler.profile() as profile:
        public(*given)
    assert f"diffmem::{name}" in {event.name for event in profile.events()}
    graph = make_fx(lambda x: public(x, *given[1:]))(given[0].detach())
    assert name in graph.code


def test_under_vmap():
    given = conv_arguments()
    x = torch.stack([given[0], given[0].flip(0)])
    together = torch.func.vmap(lambda each: conv(each, *given[1:]))(x)
    assert torch.equal(together, torch.stack([conv(each, *given[1:]) for each in x]))


def test_gradients_of_gradients():
    """The convolution's is a convolution; the normalization's has none, and says so."""
    given, leaves = with_leaves(conv_arguments(channels_last(4, 16, 8, 8).repeat(2, 1, 1, 1)))
    direction = normal(8, 32, 8, 8, seed=8).requires_grad_()
    (first,) = torch.autograd.grad(conv(*given), leaves[:1], direction, create_graph=True)
    (second,) = torch.autograd.grad(first, direction, normal(*first.shape, seed=7))
    expected = native.conv3x3(normal(*first.shape, seed=7), given[1], None, None, 0.5)
    assert_close("conv3x3 by Winograd", second.double(), expected.double())
    given, leaves = with_leaves(norm_arguments())
    (first,) = torch.autograd.grad(norm(*given).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient"):
        first.sum().backward()
