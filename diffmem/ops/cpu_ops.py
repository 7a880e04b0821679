"""Ops of the compiled core as PyTorch knows them, without what `torch.library.custom_op` costs at its first call.

That decorator wraps the function so that torch.compile leaves it alone, for which the first call imports torch._dynamo,
and with it sympy and Triton: 1.2 s of every command that calls such an op once. An op that is defined with a schema and
a kernel for one dispatch key is opaque to torch.compile too, and imports nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("diffmem", "FRAGMENT")


def cpu_op(name: str, schema: str | None = None, differentiable: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function of tensors in the CPU's memory the op `torch.ops.diffmem.<name>`, which is returned.

    The function changes none of its arguments.

    Args:
        name: Of the op.
        schema: "(Tensor x, …) -> Tensor"; None: what the function's annotations say.
        differentiable: Its gradient goes to `register_gradient`; otherwise it has none, and says so where one is asked
            for.
    """

    def define(function: Callable[..., Any]) -> Any:
        described = torch.library.infer_schema(function, mutates_args=()) if schema is None else schema
        _LIBRARY.define(name + described, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CPU")

        def no_gradient(*_: Any) -> None:
            raise RuntimeError(f"diffmem.{name} has no gradient")

        if not differentiable:
            register_gradient(name, no_gradient)
        return getattr(torch.ops.diffmem, name).default

    return define


def register_gradient(name: str, backward: Callable[..., Any], save: Callable[..., None] | None = None) -> None:
    """Gives an op of `cpu_op` its gradient: backward(ctx, *gradients), after save(ctx, inputs, output)."""
    torch.library.register_autograd(f"diffmem::{name}", backward, setup_context=save, lib=_LIBRARY)


def direct(
    op: Any,
    kernel: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """`op`, but `kernel` itself where nothing needs to see the op: no compiler, trace, profiler, mode or transform of
    PyTorch, and no tensor of another class.

    The dispatcher's way to an op in Python and to its gradient takes as long as normalizing a small map. Values and
    gradients are the same.

    Args:
        op: Of `cpu_op`.
        kernel: What it computes; takes its arguments as right.
        backward: As for `register_gradient`; without it `op` is called where a gradient may be asked for.
        save: As for `register_gradient`.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = kernel(*inputs)
            if save is not None:
                save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return None if backward is None else backward(ctx, *gradients)

    with_gradient = op if backward is None else Direct.apply

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched():
            return op(*inputs)
        tensors = [each for each in inputs if isinstance(each, torch.Tensor)]
        if any(type(each) not in _PLAIN for each in tensors):
            return op(*inputs)
        if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
            return with_gradient(*inputs)
        return kernel(*inputs)

    return call


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _is_watched() -> bool:
    """Whether something other than autograd looks at the ops that are called."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch._C._autograd._profiler_enabled()
    )
