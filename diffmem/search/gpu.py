"""The exact search of uint8 images on a GPU: several ways, of which the fastest here is found by a short measurement.

kernel          int8 tensor cores with the best k kept in registers (csrc/nearest/nearest_cuda.cu).
int8 products   int8 matrix products by cuBLAS (`torch._int_mm`), the best k taken from each stored block.
faiss           FAISS's flat index proposes, exact integers decide; an answer that its float32 arithmetic cannot have
                got wrong is certified, the others are searched again by int8 products.

All give the same answer. The certificate: FAISS's squared distances a of centred images differ from the true ones by
at most ε = 3γ (‖x‖ + Y)², γ = (d + 2)u / (1 − (d + 2)u), Y the largest norm of a training image (see
`diffmem.ops.nearest.blocked`; u = 2^-23 allows for sums that are cut off instead of rounded; centred bytes are exact in
every format FAISS multiplies in, TF32 included). Images that were not proposed have a ≥ a_max, the largest proposed, so
a true distance ≥ a_max − ε. If the k-th exact distance of the proposed is below that, no other image can belong to the
answer, ties included.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from diffmem.ops.measured import fastest
from diffmem.ops.nearest import exact_squared_distances
from diffmem.ops.registry import native_unavailable

Answer = tuple[torch.Tensor, torch.Tensor]  # squared distances and indices, [Q, k]

QUERY_BLOCK, TRAINING_BLOCK = 1024, 1 << 15  # int8 products: 256 MB of keys at a time
TRIAL_QUERIES, TRIAL_ROWS = 512, 1 << 17
EXTRA_PROPOSALS = 6

# The way that was fastest, by (device, values per image, power of two of the training set's size).
_fastest: dict[tuple[str, int, int], str] = {}


class GpuRows:
    """uint8 training rows on a device, searched in the way that is fastest there.

    rows: [N, d] uint8, anywhere. Where they do not fit into half of the device's free memory, they are sent part by
    part for each block of queries.
    way: "kernel", "int8 products" or "faiss" to force one; None measures at the first query and remembers.
    """

    def __init__(self, rows: torch.Tensor, device: torch.device, way: str | None = None):
        self.rows, self.device, self.way = rows, device, way
        held = 2 * rows.numel()  # as they are, and centred
        self.part = len(rows)
        if device.type == "cuda" and held > (room := torch.cuda.mem_get_info(device)[0] // 2):
            self.part = max(TRAINING_BLOCK, int(len(rows) * room / held))
        self._resident: _Part | None = None

    def __call__(self, queries: torch.Tensor, k: int) -> Answer:
        """The k nearest rows of each query [Q, d] uint8 on the device: exact, ties to the lower index."""
        if self.way is None:
            self.way = self._choose(queries, k)
        best: Answer | None = None
        for start in range(0, len(self.rows), self.part):
            part = self._part(start)
            squared, indices = part.search(self.way, queries, min(k, len(part.rows)))
            found = squared, indices + start
            best = (
                found
                if best is None
                else _best(torch.cat([best[0], found[0]], 1), torch.cat([best[1], found[1]], 1), k)
            )
        return best

    def _part(self, start: int) -> _Part:
        if self.part < len(self.rows):
            return _Part(self.rows[start : start + self.part].to(self.device))
        if self._resident is None:
            self._resident = _Part(self.rows.to(self.device))
        return self._resident

    def _choose(self, queries: torch.Tensor, k: int) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        key = (name, self.rows.shape[1], len(self.rows).bit_length())
        if key not in _fastest:
            ways = available_ways(self.device)
            trial = _Part(self.rows[:TRIAL_ROWS].to(self.device))
            _fastest[key] = fastest(
                {
                    way: lambda way=way: trial.search(way, queries[:TRIAL_QUERIES], min(k, len(trial.rows)))
                    for way in ways
                },
                self.device,
            )
        return _fastest[key]


def available_ways(device: torch.device) -> list[str]:
    """The ways that can be used on `device`."""
    ways = ["int8 products"]
    if device.type == "cuda" and native_unavailable("cuda") is None:
        ways.insert(0, "kernel")
    if device.type == "cuda":
        try:
            import faiss

            if faiss.get_num_gpus() > 0:
                ways.append("faiss")
        except ImportError:
            pass
    return ways


class _Part:
    """Some of the training rows, on the device, in the forms that the ways need (made when first needed)."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows
        self._made: dict[str, object] = {}

    def search(self, way: str, queries: torch.Tensor, k: int) -> Answer:
        return {"kernel": self._kernel, "int8 products": self._products, "faiss": self._faiss}[way](queries, k)

    def _once(self, name: str, make: Callable[[], object]):
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def _kernel(self, queries: torch.Tensor, k: int) -> Answer:
        from diffmem.ops.nearest.cuda import centre, nearest_cuda

        indices, squared = nearest_cuda(
            queries.contiguous(), self._once("centred", lambda: centre(self.rows.contiguous())), k
        )
        return squared, indices

    def _products(self, queries: torch.Tensor, k: int) -> Answer:
        training, training_norms = self._once("int8", lambda: _centred_int8(self.rows))
        answers = []
        for block in queries.split(QUERY_BLOCK):
            x, norms = _centred_int8(block)
            best: Answer | None = None
            for start in range(0, len(self.rows), TRAINING_BLOCK):
                stop = min(start + TRAINING_BLOCK, len(self.rows))
                y = training[start : _multiple(stop, 8)]
                products = torch._int_mm(x, y.T)[: len(block), : stop - start].long()
                squared = norms[: len(block), None] + training_norms[start:stop] - 2 * products
                # One key for (distance, index): below 2^40 and 2^15, so that the k smallest keys are the k nearest,
                # ties included.
                keys = squared.mul_(TRAINING_BLOCK) + torch.arange(stop - start, device=squared.device)
                keys = keys.topk(min(k, stop - start), largest=False, sorted=True).values
                found = keys // TRAINING_BLOCK, keys % TRAINING_BLOCK + start
                best = (
                    found
                    if best is None
                    else _best(torch.cat([best[0], found[0]], 1), torch.cat([best[1], found[1]], 1), k)
                )
            answers.append(best)
        return torch.cat([squared for squared, _ in answers]), torch.cat([indices for _, indices in answers])

    def _faiss(self, queries: torch.Tensor, k: int) -> Answer:
        index, largest_norm = self._once("faiss", self._build_faiss)
        width = min(len(self.rows), k + EXTRA_PROPOSALS)
        x = _centred_float(queries)
        approximate, proposed = index.search(x.cpu().numpy(), width)
        proposed = torch.from_numpy(proposed).to(queries.device)
        rows = torch.arange(len(queries), device=queries.device).repeat_interleave(width)
        exact = exact_squared_distances(queries, self.rows, rows, proposed.flatten()).view(proposed.shape)
        # Ascending indices first, so that the stable sort by distance leaves ties in that order.
        proposed, order = proposed.sort(dim=1)
        squared, indices = _best(exact.gather(1, order), proposed, k)
        if width < len(self.rows):
            unit = (queries.shape[1] + 2) * 2.0**-23
            margin = 3 * unit / (1 - unit) * (x.double().square().sum(1).sqrt() + largest_norm) ** 2
            bound = torch.from_numpy(approximate.max(axis=1).astype(np.float64)).to(queries.device) - margin
            uncertain = (squared[:, -1].double() >= bound).nonzero().flatten()
            if len(uncertain):
                squared[uncertain], indices[uncertain] = self._products(queries[uncertain], k)
        return squared, indices

    def _build_faiss(self):
        import faiss

        index = faiss.IndexFlatL2(self.rows.shape[1])
        if self.rows.device.type == "cuda":
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), self.rows.device.index or 0, index)
        largest = 0.0
        for block in self.rows.split(TRAINING_BLOCK):
            values = _centred_float(block)
            largest = max(largest, float(values.double().square().sum(1).max().sqrt()))
            index.add(values.cpu().numpy())
        return index, largest


def _best(squared: torch.Tensor, indices: torch.Tensor, k: int) -> Answer:
    """The k smallest of each row; among equal distances the earlier column."""
    squared, order = squared.sort(dim=1, stable=True)
    return squared[:, :k], indices.gather(1, order[:, :k])


def _centred_int8(rows: torch.Tensor) -> Answer:
    """Grey level − 128 as int8, padded with zeros to what cuBLAS takes (32 rows at least, multiples of 8), and
    squared norms [N]."""
    n, d = rows.shape
    centred = torch.zeros(max(32, _multiple(n, 8)), _multiple(d, 8), dtype=torch.int8, device=rows.device)
    norms = torch.empty(n, dtype=torch.int64, device=rows.device)
    for start in range(0, n, TRAINING_BLOCK):
        block = rows[start : start + TRAINING_BLOCK].to(torch.int16) - 128
        centred[start : start + len(block), :d] = block
        norms[start : start + len(block)] = block.float().square_().sum(1, dtype=torch.float64).long()
    return centred, norms


def _centred_float(rows: torch.Tensor) -> torch.Tensor:
    return rows.to(torch.float32) - 128


def _multiple(value: int, of: int) -> int:
    return -(-value // of) * of
