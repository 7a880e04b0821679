"""`FilteredRows`: training rows with a compact code that bounds distances from below (csrc/nearest/nearest.h).

The code of a row: its coordinates in a basis of leading principal components and the length of what the basis misses,
in int16, coarse to fine. Rows are grouped in clusters, so that a query's nearest clusters give a first, already tight,
limit on its k-th smallest distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from diffmem.lazy import torch
from diffmem.ops.nearest import dtype_name, native_rows
from diffmem.ops.registry import core_threads, native_module
from diffmem.progress import Progress, silent
from diffmem.search.basis import ByteBasis, FloatBasis, byte_basis, float_basis

PANEL = 16  # points side by side, kPanel of csrc/nearest/nearest.h
ROW = 64  # int16 values of a fine row, kRow
LEVEL_COORDINATES = 60  # coordinates a fine row holds, kLevelCoordinates
LARGEST_CODE = 32766
COMPONENTS = 180
COARSE_STEPS = 16  # pairs of values in the coarse code: 31 coordinates and the remainder's length
LARGEST_LEVELS = 64  # 3,840 coordinates: nearest.h counts on fewer than 4,096
CACHE_LINE = 64  # bytes
BLOCK_VALUES = 1 << 25  # values projected at a time
CLUSTER_SAMPLE = 16384
CLUSTER_ITERATIONS = 4


@dataclass(frozen=True)
class Code:
    """Codes of n rows, see csrc/nearest/nearest.h."""

    coarse: np.ndarray  # int16 [n, 2·steps]
    fine: np.ndarray  # int16 [levels, n, 64]
    sq: np.ndarray  # int32 [n, 1 + levels]
    error: np.ndarray  # float32 [n, 1 + levels]

    @classmethod
    def empty(cls, count: int, steps: int, levels: int) -> Code:
        return cls(
            on_cache_lines((count, 2 * steps), np.int16),
            on_cache_lines((levels, count, ROW), np.int16),
            on_cache_lines((count, 1 + levels), np.int32),
            on_cache_lines((count, 1 + levels), np.float32),
        )

    @property
    def native(self) -> Any:
        return native_module().NearestCode(*(a.ctypes.data for a in (self.coarse, self.fine, self.sq, self.error)))


@dataclass(frozen=True)
class FilteredRows:
    """Training rows and their code, ready to be searched.

    rows: [N, d] uint8, float32 or float64; an array or a tensor. basis: what the coordinates are. scale: code units per
    unit of distance.
    panels, bias, fine, order, error, centroids, centroid_bias, starts: as in csrc/nearest/nearest.h.
    """

    rows: np.ndarray | torch.Tensor
    basis: ByteBasis | FloatBasis
    scale: float
    panels: np.ndarray
    bias: np.ndarray
    fine: np.ndarray
    order: np.ndarray
    error: np.ndarray
    centroids: np.ndarray
    centroid_bias: np.ndarray
    starts: np.ndarray

    @property
    def steps(self) -> int:
        return self.panels.shape[1]

    @property
    def levels(self) -> int:
        return self.fine.shape[0]

    @cached_property
    def largest_norm(self) -> float:
        """Rows farther than this from the mean have no code: it would not fit int16."""
        return LARGEST_CODE / self.scale if self.scale > 0 else np.inf

    @cached_property
    def native(self) -> Any:
        arrays = {
            name: getattr(self, name).ctypes.data
            for name in ("panels", "bias", "fine", "order", "error", "centroids", "centroid_bias", "starts")
        }
        return native_module().NearestIndex(
            rows=native_rows(self.rows),
            steps=self.steps,
            levels=self.levels,
            scale=self.scale,
            clusters=len(self.starts) - 1,
            **arrays,
        )

    def within_reach(self, queries: torch.Tensor) -> torch.Tensor:
        """Which float rows have a code, bool [Q]."""
        norms = (queries.double() - torch.from_numpy(self.basis.mean)).norm(dim=1)
        return norms < self.largest_norm

    def encode(self, queries: np.ndarray | torch.Tensor) -> Code:
        """Codes of query rows, none of them farther than `largest_norm` from the mean."""
        return _encode(queries, self.basis, self.scale, self.steps, self.levels, True)

    def encode_rows(self, rows: np.ndarray | torch.Tensor) -> Code:
        """Codes of training rows, as `build` makes them."""
        return _encode(rows, self.basis, self.scale, self.steps, self.levels, False)

    def search(self, queries: np.ndarray | torch.Tensor, code: Code, k: int, allowance: float = 1.0) -> Any:
        """Squared distances [Q, k], indices [Q, k] and the core's account of the work; see `search_filtered` there."""
        integer = dtype_name(queries) == "uint8"
        squared = np.empty((len(queries), k), np.int64 if integer else np.float64)
        indices = np.empty((len(queries), k), np.int64)
        work = native_module().nearest_search_filtered(
            self.native,
            native_rows(queries),
            code.native,
            k,
            allowance,
            squared.ctypes.data,
            indices.ctypes.data,
            core_threads(),
        )
        return squared, indices, work


def build(rows: Any, components: int | None = None, progress: Progress = silent) -> FilteredRows:
    """The code of training rows [N, d], an array of bytes or a tensor; float rows must be finite."""
    n, d = rows.shape
    wanted = min(COMPONENTS if components is None else components, d)
    levels = min(LARGEST_LEVELS, -(-wanted // LEVEL_COORDINATES))
    steps = min(COARSE_STEPS, max(2, levels * LEVEL_COORDINATES // 4), -(-(d + 1) // 2))
    basis: ByteBasis | FloatBasis
    if dtype_name(rows) == "uint8":
        basis = byte_basis(rows if isinstance(rows, np.ndarray) else rows.numpy(), levels * LEVEL_COORDINATES)
        largest = basis.largest_norm
    else:
        basis = float_basis(rows, levels * LEVEL_COORDINATES)
        mean = torch.from_numpy(basis.mean)
        norms = torch.cat([(block.double() - mean).norm(dim=1) for block in rows.split(_block(d))])
        largest = 2 * float(
            norms.max()
        )  # queries farther out than twice the training rows are searched without the code
    scale = LARGEST_CODE / largest if largest > 1e-100 else 0.0
    code = Code.empty(n, steps, levels)
    for start in range(0, n, _block(d)):
        progress("indexing training images", start, n)
        part = slice(start, start + _block(d))
        block = _encode(rows[part], basis, scale, steps, levels, False)
        code.coarse[part], code.fine[:, part], code.sq[part], code.error[part] = (
            block.coarse,
            block.fine,
            block.sq,
            block.error,
        )
    progress("indexing training images", n, n)
    order, starts, centroids = _clusters(code.coarse)
    for level in code.fine:
        level[:] = level[order]
    return FilteredRows(
        rows=rows,
        basis=basis,
        scale=scale,
        panels=_panels(code.coarse[order]),
        bias=_padded(-(code.sq[order, 0] >> 1)),
        fine=code.fine,
        order=order,
        error=code.error.max(axis=0),
        centroids=_panels(centroids),
        centroid_bias=_padded(-(np.square(centroids.astype(np.int64)).sum(axis=1) >> 1).astype(np.int32)),
        starts=starts,
    )


def _block(d: int) -> int:
    return max(1, BLOCK_VALUES // d)


def _encode(
    rows: Any,
    basis: ByteBasis | FloatBasis,
    scale: float,
    steps: int,
    levels: int,
    queries: bool,
) -> Any:
    code = Code.empty(len(rows), steps, levels)
    core, threads = native_module(), core_threads()
    if isinstance(basis, ByteBasis):
        native = core.NearestBasis(
            steps=steps,
            levels=levels,
            p=basis.p.ctypes.data,
            shift=basis.shift.ctypes.data,
            mean=basis.mean.ctypes.data,
            factor=scale / basis.norm if basis.norm > 0 else 0.0,
            scale=scale,
        )
        core.nearest_encode_bytes(native_rows(rows), native, queries, code.native, threads)
        return code
    coordinates, squared_norms = basis.project(rows)
    core.nearest_encode_coordinates(
        coordinates.data_ptr(), squared_norms.data_ptr(), len(rows), steps, levels, scale, queries, code.native, threads
    )
    return code


def _clusters(coarse: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order of the points by cluster, where each cluster starts in it, and the clusters' centers (int16), by k-means.

    A few of Lloyd's iterations on a sample: how good the clusters are decides only how tight the first limits are.
    """
    n = len(coarse)
    count = int(np.clip(np.sqrt(n), 1, 4096))
    sample = coarse[np.linspace(0, n - 1, min(n, CLUSTER_SAMPLE)).astype(np.int64)].astype(np.float32)
    centers = sample[np.linspace(0, len(sample) - 1, count).astype(np.int64)]
    for _ in range(CLUSTER_ITERATIONS):
        nearest = _nearest_center(sample, centers)
        size = np.bincount(nearest, minlength=count)
        total = np.stack([np.bincount(nearest, column, count) for column in sample.T], axis=1)
        centers = np.where(size[:, None] > 0, total / np.maximum(size, 1)[:, None], centers).astype(np.float32)
    centers = np.round(centers)
    assigned = np.concatenate(
        [_nearest_center(coarse[start : start + 16384].astype(np.float32), centers) for start in range(0, n, 16384)]
    )
    starts = np.zeros(count + 1, np.int64)
    starts[1:] = np.bincount(assigned, minlength=count).cumsum()
    return assigned.argsort(kind="stable"), starts, centers.astype(np.int16)


def _nearest_center(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    return (points @ (-2 * centers.T) + np.square(centers).sum(axis=1)).argmin(axis=1)


def _panels(values: np.ndarray) -> np.ndarray:
    """int16 [n, 2·steps] as panels [ceil(n / 16), steps, 16, 2], zeros after the last point."""
    n, width = values.shape
    padded = np.zeros((-(-n // PANEL) * PANEL, width), np.int16)
    padded[:n] = values
    panels = on_cache_lines((len(padded) // PANEL, width // 2, PANEL, 2), np.int16)
    panels[:] = padded.reshape(-1, PANEL, width // 2, 2).transpose(0, 2, 1, 3)
    return panels


def _padded(values: np.ndarray) -> np.ndarray:
    padded = on_cache_lines((-(-len(values) // PANEL) * PANEL,), np.int32)
    padded[len(values) :] = 0
    padded[: len(values)] = values
    return padded


def on_cache_lines(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that starts on a cache line, which the kernels are faster on; its values are not set."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    held = np.empty(size + CACHE_LINE, np.uint8)
    start = -held.ctypes.data % CACHE_LINE
    return held[start : start + size].view(dtype).reshape(shape)
