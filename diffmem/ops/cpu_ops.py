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


def cpu_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function of tensors in the CPU's memory the op `torch.ops.diffmem.<name>`, which is returned.

    The function changes none of its arguments, and its annotations are the op's schema. It has no gradient, and says so
    where one is asked for.
    """

    def define(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CPU")

        def no_gradient(*_: Any) -> None:
            raise RuntimeError(f"diffmem.{name} has no gradient")

        torch.library.register_autograd(f"diffmem::{name}", no_gradient, lib=_LIBRARY)
        return getattr(torch.ops.diffmem, name).default

    return define
