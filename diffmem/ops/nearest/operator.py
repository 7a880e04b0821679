"""The operator `nearest`, and what serves it."""

from __future__ import annotations

import torch

from diffmem.errors import InputError
from diffmem.ops.arguments import check_shape, check_tensor, check_whole
from diffmem.ops.nearest import cuda, native
from diffmem.ops.nearest.blocked import nearest_blocked
from diffmem.ops.nearest.native import nearest_native
from diffmem.ops.nearest.reference import nearest_reference
from diffmem.ops.registry import Backend, Op, register

OP = register(
    Op(
        "nearest",
        (
            Backend("cuda", "int8 products on tensor cores", cuda.nearest, cuda.unavailable, cuda.unfit),
            Backend("native", "integer products of all pairs", nearest_native, native.unavailable, native.unfit),
            Backend("torch", "blocked matrix products, exact re-ranking", nearest_blocked),
            Backend("reference", "every difference, in PyTorch", nearest_reference),
        ),
    )
)
DTYPES = (torch.uint8, torch.float32, torch.float64)


def nearest(
    queries: torch.Tensor, training: torch.Tensor, k: int, *, impl: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared Euclidean distances and indices of the k nearest rows of `training` for each row of `queries`.

    The answer is exact: for uint8 rows the distances are integers and equal distances go to the lower index.

    queries: [Q, d] uint8, float32 or float64.
    training: [N, d], the same dtype; it may lie on another device and is then moved block by block.
    k: from 1 to N.
    impl: "cuda", "native", "torch" or "reference", to force a backend (`diffmem.ops.registry`). By default the core
        serves what it can: k up to 64, on GPUs uint8 rows only; "torch" the rest.
    Returns squared distances [Q, k], int64 for uint8 rows and float64 for floats, and indices int64 [Q, k].
    Raises InputError for shapes and dtypes that do not fit, k out of range, or values that are not finite.
    """
    _check(queries, training, k)
    backend = OP.select(queries.device.type, impl, queries, training, k)
    return torch.ops.diffmem.nearest(queries, training, k, backend.name)


def _check(queries: torch.Tensor, training: torch.Tensor, k: int) -> None:
    check_tensor("nearest", "queries", queries, DTYPES)
    check_tensor("nearest", "training", training, (queries.dtype,))
    check_whole("nearest", "k", k, 1)
    check_shape("nearest", "queries", queries, (None, None), "[Q, d]")
    check_shape("nearest", "training", training, (None, queries.shape[1]), f"[N, {queries.shape[1]}]")
    if queries.shape[1] < 1:
        raise InputError(f"nearest: queries must be [Q, d] with at least one value each, got {tuple(queries.shape)}")
    if k > len(training):
        raise InputError(f"nearest: k must be between 1 and the number of training images, {len(training)}; got {k}")


@torch.library.custom_op("diffmem::nearest", mutates_args=())
def _nearest(queries: torch.Tensor, training: torch.Tensor, k: int, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    _check(queries, training, k)
    backend = OP.select(queries.device.type, impl, queries, training, k)
    if len(queries) == 0:
        return _nearest_fake(queries, training, k, impl)
    for name, rows in (("queries", queries), ("training", training)):
        if rows.is_floating_point() and not bool(rows.isfinite().all()):
            raise InputError(f"nearest: {name} must be finite, but hold NaN or infinity")
    return backend.function(queries, training, k)


@_nearest.register_fake
def _nearest_fake(
    queries: torch.Tensor, training: torch.Tensor, k: int, impl: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(queries, training, k)
    squared = torch.int64 if queries.dtype == torch.uint8 else torch.float64
    return queries.new_empty(len(queries), k, dtype=squared), queries.new_empty(len(queries), k, dtype=torch.int64)
