"""Op `nearest` in the compiled core: integer products of all pairs."""

from __future__ import annotations

import torch

from diffmem.ops.registry import native_module, native_unavailable

LARGEST_K = 64


def native_rows(rows: torch.Tensor):
    """The compiled core's view of CPU rows [n, d] whose values are adjacent."""
    core = native_module()
    types = {
        torch.uint8: core.NearestType.u8,
        torch.float32: core.NearestType.f32,
        torch.float64: core.NearestType.f64,
    }
    stride = rows.stride(0) if len(rows) > 1 else rows.shape[1]
    return core.NearestRows(rows.data_ptr(), len(rows), stride, rows.shape[1], types[rows.dtype])


def unavailable(device_type: str) -> str | None:
    """Why the compiled search cannot run on `device_type`, or None."""
    return "written for the CPU" if device_type != "cpu" else native_unavailable("cpu")


def unfit(queries: torch.Tensor, training: torch.Tensor, k: int) -> str | None:
    """Why the compiled search cannot take these arguments, or None."""
    if k > LARGEST_K:
        return f"k is {k}, but must be at most {LARGEST_K}"
    if training.device.type != "cpu":
        return "the training images are on another device"
    return None


def nearest_native(queries: torch.Tensor, training: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances [Q, k] and indices [Q, k]; see `diffmem.ops.nearest.nearest`."""
    queries, training = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (queries, training))
    squared = torch.empty(len(queries), k, dtype=torch.int64 if queries.dtype == torch.uint8 else torch.float64)
    indices = torch.empty(len(queries), k, dtype=torch.int64)
    native_module().nearest_search_dense(
        native_rows(training),
        native_rows(queries),
        k,
        squared.data_ptr(),
        indices.data_ptr(),
        torch.get_num_threads(),
    )
    return squared, indices
