"""The exact search on a GPU: several backends, of which the fastest here is found by a short measurement.

uint8 images:
cuda     int8 tensor cores with the best k kept in registers (csrc/nearest/nearest_cuda.cu); k up to 64.
int8     int8 matrix products by cuBLAS (`torch._int_mm`), the best k taken from each stored block.
faiss    FAISS's flat index proposes candidates, exact integers decide.
float32 vectors (embeddings):
tf32     products of values rounded to TF32 propose, exact differences in float64 decide.
float64  products in float64 propose, the same differences decide (`diffmem.ops.nearest.blocked`).

All give the same answer. A backend of which the device makes nothing (no kernel image for this GPU, an old driver) is
found out by trying it once (`diffmem.ops.nearest.cuda.kernel_unavailable`); the reason is kept.

The certificate of what proposes. Let a be the approximate squared distance of a pair, off by at most ε from the true
one, and a_max the largest among the proposals of a query. Images that were not proposed have a ≥ a_max, so a true
distance ≥ a_max − ε: where the k-th exact distance of the proposals is below that, no other image can belong to the
answer, ties included. The other queries are searched again, with more proposals and then without any.

ε for FAISS: 3γ (‖x‖ + Y)², γ = (d + 2)u / (1 − (d + 2)u), Y the largest norm of a training image (see
`diffmem.ops.nearest.blocked`; u = 2^-23 allows for sums that are cut off instead of rounded; centered bytes are exact
in every format FAISS multiplies in, TF32 included).

ε for TF32. Let c be the mean, x̂ = fl(x − c) and ŷ likewise, x̃ and ỹ these rounded to TF32's 11 significant bits: each
value is off by at most h = 2^-11 + 2^-23 of itself. The unit multiplies them exactly and sums in float32, so with
the same γ

    |fl(x̃·ỹ) − x·y| ≤ ((2h + h²) + γ(1 + h)²)·‖x‖‖y‖

by Cauchy–Schwarz, x and y being the centered vectors; norms are summed in float64 of the rounded differences (relative
error 2^-23 at most, with the rounding to float32 another 2^-24); adding −2 x̃·ỹ to ‖y‖² costs at most
γ(‖y‖² + 2‖x‖‖y‖), should the sum begin there. In all |a − A| ≤ (4h + 2h² + 4γ(1 + h)² + 4u)·‖x‖Y + (4u + 2γ)·Y², and
‖x‖² itself is off by 2^-23·‖x‖². Values whose products underflow add at most d·2^-120. Products of values beyond ±2^60
may overflow: such sets are left to float64.

Bytes that are kept per image of d values: uint8 images d rounded up to 64, and a norm: the int8 that the products
want; the uint8 ones are not kept beside them. float32 vectors 4d and a norm. Where a set does not fit into the device's
free memory it is walked part by part, all queries against each part, so that it is sent once per query call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from diffmem.ops.autotune import AutotuneCache, device_name, seconds_of
from diffmem.ops.nearest import cuda, exact_squared_distances
from diffmem.ops.nearest.blocked import nearest_blocked
from diffmem.ops.registry import Backend, Op, anywhere, register
from diffmem.precision import float32_products

Answer = tuple[torch.Tensor, torch.Tensor]  # squared distances and indices, [Q, k]

QUERY_BLOCK, TRAINING_BLOCK = 1024, 1 << 15  # matrix products: 256 MB of keys at a time
SEND_BYTES = 1 << 28  # of rows that are sent to the device at a time
TRIAL_QUERIES, TRIAL_ROWS = 512, 1 << 17
EXTRA_PROPOSALS = 6
TF32_PROPOSALS = (16, 128)  # beyond k: at first, and where these do not do
LARGEST_VALUE = 2.0**60  # of vectors whose products float32 holds
ALIGNMENT = 64  # bytes of a row of int8: what the kernel takes; cuBLAS wants multiples of 8, and 32 rows

CACHE = AutotuneCache("search")


class GpuRows:
    """Training rows on a device, searched by the backend that is fastest there.

    rows: [N, d] uint8 or float32, anywhere.
    backend: "cuda", "int8" or "faiss" for uint8 rows, "tf32" or "float64" for float32 ones, to force one; None measures
        at the first query and remembers, for other processes too (`diffmem.ops.autotune`).
    """

    def __init__(self, rows: torch.Tensor, device: torch.device, backend: str | None = None) -> None:
        self.rows, self.device, self.backend = rows, device, backend
        self.part = len(rows)
        if device.type == "cuda" and held_bytes(rows) > (room := _room(device)):
            self.part = max(TRAINING_BLOCK, int(len(rows) * room / held_bytes(rows)))
        self._resident: _Bytes | _Floats | None = None

    @property
    def resident(self) -> bool:
        """Whether all rows stay on the device from one query to the next."""
        return self.part >= len(self.rows)

    def query_block(self) -> int:
        """How many queries to hand over at once: all that have room where the rows are sent again for each call."""
        if self.resident:
            return 1 << 16
        room = (1 << 30) if self.device.type != "cuda" else _room(self.device) // 4
        return max(QUERY_BLOCK, room // (self.rows.shape[1] * self.rows.element_size()))

    def __call__(self, queries: torch.Tensor, k: int) -> Answer:
        """The k nearest rows of each query [Q, d], of the rows' dtype, on the device; ties go to the lower index."""
        if self.backend is None:
            self.backend = self._choose(queries, k)
        best: Answer | None = None
        for start, part in self._parts():
            squared, indices = OP[self.backend].function(part, queries, min(k, len(part)))
            found = squared, indices + start
            best = found if best is None else _merge(best, found, k)
        assert best is not None  # there is a row
        return best

    def _parts(self) -> Iterator[tuple[int, _Bytes | _Floats]]:
        kind = _Bytes if self.rows.dtype == torch.uint8 else _Floats
        if self.resident:
            if self._resident is None:
                self._resident = kind(self.rows, self.device)
            yield 0, self._resident
            return
        for start in range(0, len(self.rows), self.part):
            yield start, kind(self.rows[start : start + self.part], self.device)

    def _choose(self, queries: torch.Tensor, k: int) -> str:
        backends = available_backends(self.device, self.rows.dtype)
        if len(backends) == 1:
            return backends[0]
        dtype = str(self.rows.dtype).removeprefix("torch.")
        case = f"{dtype}, d {self.rows.shape[1]}, N 2^{len(self.rows).bit_length()}, k {'≤ 64' if k <= 64 else '> 64'}"

        def measure() -> dict[str, float]:
            kind = _Bytes if self.rows.dtype == torch.uint8 else _Floats
            trial = kind(self.rows[:TRIAL_ROWS], self.device)
            some = queries[:TRIAL_QUERIES]
            runs: dict[str, Any] = {
                name: partial(OP[name].function, trial, some, min(k, len(trial))) for name in backends
            }
            return seconds_of(runs, self.device)

        return CACHE.fastest(device_name(self.device), case, backends, measure)


def available_backends(device: torch.device, dtype: torch.dtype = torch.uint8) -> list[str]:
    """The backends that can be used on `device` for rows of this dtype."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return [backend.name for backend in OP.candidates(device.type, dtype)]


def _backend(
    name: str, dtype: torch.dtype, description: str, unavailable: Callable[[str], str | None] = anywhere
) -> Backend:
    """A backend for training rows of one dtype; its function takes the rows on the device, queries and k."""

    def search(part: _Bytes | _Floats, queries: torch.Tensor, k: int) -> Answer:
        return part.search(name, queries, k)

    def unfit(other: torch.dtype) -> str | None:
        return None if other == dtype else f"it takes {dtype} rows, not {other}"

    return Backend(name, description, search, unavailable, unfit)


def _faiss_unavailable(device_type: str) -> str | None:
    if device_type != "cuda":
        return "it proposes on GPUs"
    try:
        import faiss
    except ImportError:
        return "FAISS is not installed (pip install 'diffmem[gpu]')"
    return None if faiss.get_num_gpus() > 0 else "this build of FAISS sees no GPU (pip install 'diffmem[gpu]')"


OP = register(
    Op(
        "gpu search",
        (
            _backend("cuda", torch.uint8, "int8 tensor cores, the best k in registers", cuda.unavailable),
            _backend("int8", torch.uint8, "int8 products by cuBLAS"),
            _backend(
                "faiss",
                torch.uint8,
                "FAISS's flat index proposes candidates, exact integers decide",
                _faiss_unavailable,
            ),
            _backend("tf32", torch.float32, "TF32 products propose, exact differences decide"),
            _backend("float64", torch.float32, "float64 products propose, exact differences decide"),
        ),
        autotuned=("cuda", "int8", "faiss", "tf32", "float64"),
        cases={"images": (torch.uint8,), "float32 vectors": (torch.float32,)},
        devices=("cuda",),
    )
)


def held_bytes(rows: torch.Tensor) -> int:
    """Bytes that rows [N, d] take on the device once they are ready to be searched."""
    count, d = rows.shape
    return count * (8 + (_multiple(d, ALIGNMENT) if rows.dtype == torch.uint8 else d * rows.element_size()))


def _room(device: torch.device) -> int:
    """Bytes for rows, beside what a search needs."""
    return torch.cuda.mem_get_info(device)[0] * 3 // 4 - (1 << 30)


class _Bytes:
    """Some of the uint8 training rows on the device: value − 128 as int8, rows padded with zeros to what the kernel and
    cuBLAS take, and their squared norms; uint8 rows are dropped as soon as they are there."""

    def __init__(self, rows: torch.Tensor, device: torch.device) -> None:
        self.count, self.d = rows.shape
        self.values, self.norms = _centered(rows, device)
        self._faiss_index: Any = None

    def __len__(self) -> int:
        return self.count

    def search(self, backend: str, queries: torch.Tensor, k: int) -> Answer:
        """The k nearest rows of uint8 queries [Q, d]."""
        if len(queries) == 0:
            return queries.new_empty(0, k, dtype=torch.int64), queries.new_empty(0, k, dtype=torch.int64)
        if backend == "cuda" and k > 64:
            backend = "int8"  # the kernel keeps lists of up to 64
        values, norms = _centered(queries, queries.device)
        search = {"cuda": self._kernel, "int8": self._products, "faiss": self._faiss}[backend]
        return search(values[: len(queries)], norms, k)

    def _kernel(self, x: torch.Tensor, norms: torch.Tensor, k: int) -> Answer:
        from diffmem.ops.nearest.cuda import CenteredImages, nearest_cuda

        return nearest_cuda(
            CenteredImages(x, norms, self.d), CenteredImages(self.values[: self.count], self.norms, self.d), k
        )

    def _products(self, x: torch.Tensor, norms: torch.Tensor, k: int) -> Answer:
        answers = []
        for first in range(0, len(x), QUERY_BLOCK):
            block, own = x[first : first + QUERY_BLOCK], norms[first : first + QUERY_BLOCK]
            taken = len(block)
            if taken < 32 or taken % 8:
                block = torch.nn.functional.pad(block, (0, 0, 0, max(32, _multiple(taken, 8)) - taken))
            best: Answer | None = None
            for start in range(0, self.count, TRAINING_BLOCK):
                stop = min(start + TRAINING_BLOCK, self.count)
                y = self.values[start : _multiple(stop, 8)]
                products = torch._int_mm(block, y.T)[:taken, : stop - start].long()
                squared = own[:, None] + self.norms[start:stop] - 2 * products
                # One key for (distance, index): below 2^40 and 2^15, so that the k smallest keys are the k nearest,
                # ties included.
                keys = squared.mul_(TRAINING_BLOCK) + torch.arange(stop - start, device=squared.device)
                keys = keys.topk(min(k, stop - start), largest=False, sorted=True).values
                found = keys // TRAINING_BLOCK, keys % TRAINING_BLOCK + start
                best = found if best is None else _merge(best, found, k)
            assert best is not None
            answers.append(best)
        return _stacked(answers)

    def _faiss(self, x: torch.Tensor, norms: torch.Tensor, k: int) -> Answer:
        if self._faiss_index is None:
            self._faiss_index = self._build_faiss()
        width = min(self.count, k + EXTRA_PROPOSALS)
        approximate, proposed = self._faiss_index.search(x[:, : self.d].float().cpu().numpy(), width)
        proposed = torch.from_numpy(proposed).to(x.device)
        unit = (self.d + 2) * 2.0**-23
        largest = self.norms.max().double().sqrt()
        margin = 3 * unit / (1 - unit) * (norms.double().sqrt() + largest) ** 2
        bound = torch.from_numpy(approximate.max(axis=1).astype(np.float64)).to(x.device) - margin
        answer, uncertain = _certified(x, self.values, proposed, bound, k, width == self.count)
        if len(uncertain):
            _replace(answer, uncertain, self._products(x[uncertain], norms[uncertain], k))
        return answer

    def _build_faiss(self) -> Any:
        import faiss

        index: Any = faiss.IndexFlatL2(self.d)
        if self.values.device.type == "cuda":
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), self.values.device.index or 0, index)
        for block in self.values[: self.count].split(TRAINING_BLOCK):
            index.add(block[:, : self.d].float().cpu().numpy())
        return index


class _Floats:
    """Some of the float32 training rows on the device, their mean, and the squared norms about it."""

    def __init__(self, rows: torch.Tensor, device: torch.device) -> None:
        self.values = torch.empty(rows.shape, dtype=rows.dtype, device=device)
        total = torch.zeros(rows.shape[1], dtype=torch.float64, device=device)
        step = max(1, SEND_BYTES // (rows.element_size() * max(1, rows.shape[1])))
        for start in range(0, len(rows), step):
            block = rows[start : start + step].to(device)
            self.values[start : start + step] = block
            total += block.sum(dim=0, dtype=torch.float64)
        self.mean = (total / len(rows)).float()
        self.norms = torch.cat([_squared_norms(block - self.mean) for block in self.values.split(step)])
        self.largest = float(self.norms.max().sqrt())
        magnitude = max(float(self.values.abs().max()), float(self.mean.abs().max()))
        self.rounded = magnitude <= LARGEST_VALUE  # else products of float32 may overflow

    def __len__(self) -> int:
        return len(self.values)

    def search(self, backend: str, queries: torch.Tensor, k: int) -> Answer:
        """The k nearest rows of float32 queries [Q, d]."""
        if len(queries) == 0:
            return queries.new_empty(0, k, dtype=torch.float64), queries.new_empty(0, k, dtype=torch.int64)
        if backend == "float64" or not self.rounded or float(queries.abs().max()) > LARGEST_VALUE:
            return nearest_blocked(queries, self.values, k)
        return _stacked([self._tf32(block, k) for block in queries.split(QUERY_BLOCK)])

    def _tf32(self, queries: torch.Tensor, k: int) -> Answer:
        answer, uncertain = self._proposed(queries, k, TF32_PROPOSALS[0])
        if len(uncertain):
            again, still = self._proposed(queries[uncertain], k, TF32_PROPOSALS[1])
            _replace(answer, uncertain, again)
            uncertain = uncertain[still]
        if len(uncertain):
            _replace(answer, uncertain, nearest_blocked(queries[uncertain], self.values, k))
        return answer

    def _proposed(self, queries: torch.Tensor, k: int, extra: int) -> tuple[Answer, torch.Tensor]:
        """The best of what TF32 proposes, and the queries that this does not settle."""
        width = min(len(self), k + extra)
        x = queries - self.mean
        norms, x = _squared_norms(x), to_tf32(x)
        best: Answer | None = None
        for start in range(0, len(self), TRAINING_BLOCK):
            block = slice(start, start + TRAINING_BLOCK)
            y = to_tf32(self.values[block] - self.mean)
            with float32_products("tf32"):
                approximate = torch.addmm(self.norms[block].float(), x, y.T, alpha=-2)
            near = approximate.topk(min(width, len(y)), dim=1, largest=False)
            found = near.values, near.indices + start
            best = found if best is None else _merge(best, found, width)
        assert best is not None
        approximate, proposed = best
        bound = approximate[:, -1].double() + norms - self.margin(norms)
        return _certified(queries, self.values, proposed, bound, k, width == len(self))

    def margin(self, norms: torch.Tensor) -> torch.Tensor:
        """ε for queries of these squared norms about the mean, float64 [Q]."""
        unit, h, d = 2.0**-23, 2.0**-11 + 2.0**-23, self.values.shape[1]
        gamma = (d + 2) * unit / (1 - (d + 2) * unit)
        both = norms.sqrt() * self.largest * (1 + 2 * unit)
        slack = (4 * h + 2 * h * h + 4 * gamma * (1 + h) ** 2 + 4 * unit) * both
        slack = slack + (4 * unit + 2 * gamma) * self.largest**2
        return slack + 2 * unit * norms + d * 2.0**-120


def to_tf32(values: torch.Tensor) -> torch.Tensor:
    """float32 values rounded to the 11 significant bits of TF32, half up in magnitude: off by at most 2^-11."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def _certified(
    queries: torch.Tensor, training: torch.Tensor, proposed: torch.Tensor, bound: torch.Tensor, k: int, whole: bool
) -> tuple[Answer, torch.Tensor]:
    """The k best of the proposed rows [Q, width] by exact (distance, index), and the queries for which another row
    could be as near: those whose k-th distance is not below `bound` [Q] float64. whole: everything was proposed."""
    rows = torch.arange(len(queries), device=queries.device).repeat_interleave(proposed.shape[1])
    exact = exact_squared_distances(queries, training, rows, proposed.flatten()).view(proposed.shape)
    # Ascending indices first, so that the stable sort by distance leaves ties in that order.
    proposed, order = proposed.sort(dim=1)
    squared, order = exact.gather(1, order).sort(dim=1, stable=True)
    answer = squared[:, :k].contiguous(), proposed.gather(1, order[:, :k])
    if whole:
        return answer, torch.empty(0, dtype=torch.int64, device=queries.device)
    # Distances of floats are rounded too: float64, by (d + 2)·2^-53 of themselves.
    last = answer[0][:, -1].double() * (1 + (queries.shape[1] + 2) * 2.0**-52)
    return answer, (last >= bound).nonzero().flatten()


def _merge(one: Answer, other: Answer, k: int) -> Answer:
    """The k smallest of both; among equal distances those of `one`, and in each the earlier column."""
    squared, order = torch.cat([one[0], other[0]], 1).sort(dim=1, stable=True)
    return squared[:, :k], torch.cat([one[1], other[1]], 1).gather(1, order[:, :k])


def _replace(answer: Answer, rows: torch.Tensor, better: Answer) -> None:
    for values, new in zip(answer, better, strict=True):
        values[rows] = new


def _stacked(answers: list[Answer]) -> Answer:
    squared, indices = zip(*answers, strict=True)
    return torch.cat(squared), torch.cat(indices)


def _centered(rows: torch.Tensor, device: torch.device) -> Answer:
    """Value − 128 as int8, padded with zeros to what kernel and cuBLAS take (32 rows at least, multiples of 8, of 64
    values), and squared norms int64 [N]; `rows` are sent to the device a block at a time."""
    n, d = rows.shape
    centered = torch.zeros(max(32, _multiple(n, 8)), _multiple(d, ALIGNMENT), dtype=torch.int8, device=device)
    norms = torch.empty(n, dtype=torch.int64, device=device)
    step = max(1, SEND_BYTES // (8 * max(1, d)))
    for start in range(0, n, step):
        block = rows[start : start + step].to(device).bitwise_xor(128).view(torch.int8)
        centered[start : start + len(block), :d] = block
        norms[start : start + len(block)] = block.float().square_().sum(1, dtype=torch.float64).long()
    return centered, norms


def _squared_norms(rows: torch.Tensor) -> torch.Tensor:
    return rows.double().square().sum(dim=1)


def _multiple(value: int, of: int) -> int:
    return -(-value // of) * of
