"""Op `nearest` in the compiled core: integer products of all pairs."""

from __future__ import annotations

import numpy as np

from diffmem.lazy import torch
from diffmem.ops.registry import core_threads, native_module, native_unavailable

LARGEST_K = 64


def dtype_name(rows: np.ndarray | torch.Tensor) -> str:
    """ "uint8", "float32", …, of an array or a tensor."""
    return str(rows.dtype).removeprefix("torch.")


def native_rows(rows: np.ndarray | torch.Tensor):
    """The compiled core's view of rows [n, d], an array or a tensor in the CPU's memory, whose values are adjacent."""
    core = native_module()
    types = {"uint8": core.NearestType.u8, "float32": core.NearestType.f32, "float64": core.NearestType.f64}
    if isinstance(rows, np.ndarray):
        address, stride = rows.ctypes.data, rows.strides[0] // rows.itemsize
    else:
        address, stride = rows.data_ptr(), rows.stride(0)
    stride = stride if len(rows) > 1 else rows.shape[1]
    return core.NearestRows(address, len(rows), stride, rows.shape[1], types[dtype_name(rows)])


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
    squared, indices = search_dense(queries, training, k)
    return torch.from_numpy(squared), torch.from_numpy(indices)


def search_dense(
    queries: np.ndarray | torch.Tensor, training: np.ndarray | torch.Tensor, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same of rows whose values are adjacent, arrays or tensors, as arrays."""
    squared = np.empty((len(queries), k), np.int64 if dtype_name(queries) == "uint8" else np.float64)
    indices = np.empty((len(queries), k), np.int64)
    native_module().nearest_search_dense(
        native_rows(training),
        native_rows(queries),
        k,
        squared.ctypes.data,
        indices.ctypes.data,
        core_threads(),
    )
    return squared, indices
