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
