"""PyTorch, imported when it is first used.

Importing PyTorch takes longer than comparing ten thousand images with fifty thousand. What the compiled core does alone
(`diffmem.ops.core_arrays`) needs none of it: modules on that way write `from diffmem.lazy import torch`. Whether
something is a tensor is asked of `diffmem.data.arrays.is_tensor`, which imports nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class LazyModule:
    """A module that is imported when one of its attributes is first asked for.

    Args:
        name: Full name of the module.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value


if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

__all__ = ["LazyModule", "torch"]
