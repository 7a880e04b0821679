"""Op `nearest`: the k nearest rows of a training set, exactly, for each query row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffmem.ops.nearest.blocked import exact_squared_distances, pairs_within
from diffmem.ops.nearest.native import dtype_name, native_rows, search_dense

if TYPE_CHECKING:
    from diffmem.ops.nearest.operator import OP, nearest

__all__ = [
    "OP",
    "dtype_name",
    "exact_squared_distances",
    "native_rows",
    "nearest",
    "pairs_within",
    "search_dense",
]


def __getattr__(name: str) -> Any:
    """The operator, when it is first asked for: defining it imports PyTorch."""
    if name not in ("OP", "nearest"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from diffmem.ops.nearest import operator

    return getattr(operator, name)
