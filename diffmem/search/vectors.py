"""`VectorIndex`: the exact nearest among float vectors in one or many memory-mapped arrays."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.data import ImageSet
from diffmem.errors import InputError
from diffmem.lazy import torch
from diffmem.ops.nearest.blocked import exact_squared_distances, nearest_of_blocks
from diffmem.ops.registry import native_module, native_unavailable
from diffmem.progress import Progress, silent
from diffmem.search import vector_codes
from diffmem.search.index import QueryStats
from diffmem.search.neighbors import Neighbors
from diffmem.search.rows import Images
from diffmem.search.tiles import squared_tile_maxima
from diffmem.search.vector_shards import VectorMetric, VectorShards

METHODS = ("auto", "codes", "torch")
SMALL = 1024  # training sets below this are compared without a code by "auto"
QUERY_BLOCK = 4096
SEEDS = 16  # parts of the set that are scanned first, so that sorted sets have tight bounds early, too
SEED_ROWS = 1024  # kBlockRows of csrc/vector_scan/vector_scan_cpu.cpp
SCAN_PAIRS = 1 << 25  # per call of the core: what bounds memory where no pair can be left out
PENDING = 1 << 23  # pairs that wait for their exact distances
FIRST = 4  # pairs of each query whose exact distances are computed first
GATHERED = 1 << 24  # values of training vectors read at a time for exact distances: 64 MiB


class VectorIndex:
    """Float vectors in shards, searchable for the exact nearest of any query vectors.

    The answer is that of a comparison with every vector, in float64 of the stored values, equal distances to the lower
    index; it does not depend on how the vectors are divided into shards.

    Args:
        shards: Arrays [n, d] of float16 or float32, memory-mapped ones stay on disk; or paths of `.npy` files.
        metric: "euclidean", or "cosine" (vectors are compared as if they had length 1; squared distances are
            2 − 2 cos).
        method: "codes" (bounds from a byte per coordinate, exact distances of what they leave over: needs the compiled
            core and at most 4,096 values per vector), "torch" (float32 products of all pairs, with a proven margin), or
            "auto": codes where they can be used and the set has at least 1,024 vectors.
        codes: A folder for the codes, d + 24 bytes per vector, where they stay memory-mapped; those that it holds
            already are not made again. Default: they are made in memory.
        names: What to call each shard in messages; default its file, or its number.
        keys: Names of the shards' contents (their hashes), where these are known already: the fingerprint is made of
            them. By default the shards are read once to hash them when the fingerprint is asked for.
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: No vectors, a dtype other than float16 and float32, lengths that differ, values that are not
            finite (the message names shard and row), or an unknown metric or method.

    Example:
        >>> shards = [np.array([[0, 0], [3, 4]], np.float16), np.array([[9, 9]], np.float16)]
        >>> found = VectorIndex(shards).query(np.array([[0, 1]], np.float32))
        >>> found.indices.tolist(), found.squared_distances.tolist()
        ([[0, 1]], [[1.0, 18.0]])
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray | str | Path] | np.ndarray,
        *,
        metric: VectorMetric = "euclidean",
        method: str = "auto",
        codes: str | Path | None = None,
        names: Sequence[str] | None = None,
        keys: Sequence[str] | None = None,
        progress: Progress = silent,
    ) -> None:
        if method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
        self.shards = VectorShards(shards, metric, names)
        if keys is not None and len(keys) != len(self.shards.arrays):
            raise InputError(f"keys: {len(keys)} for {len(self.shards.arrays)} shards")
        self._keys = None if keys is None else list(keys)
        reason = self._no_codes(method)
        if reason is not None and method == "codes":
            raise InputError(f"method 'codes' cannot be used here: {reason}")
        self.method = "torch" if reason is not None else "codes"
        self.device = torch.device("cpu")
        self.codes: vector_codes.Codes | None = None
        if self.method == "torch":
            for start, _ in self.shards.blocks():  # every value is looked at once
                progress("checking training vectors", start, len(self))
        elif codes is None:
            self.codes = vector_codes.make(self.shards, progress)
        else:
            self.codes = vector_codes.open_folder(Path(codes), self.shards, keys, progress)
        self.stats = QueryStats(self.method, 0, len(self))

    def _no_codes(self, method: str) -> str | None:
        """Why this is to be searched without codes, or None."""
        if method == "torch":
            return "another method is asked for"
        if (reason := native_unavailable("cpu")) is not None:
            return reason
        if self.dimension > vector_codes.LARGEST_DIMENSION:
            return f"vectors have {self.dimension} values, and codes at most {vector_codes.LARGEST_DIMENSION}"
        if method == "auto" and len(self) < SMALL:
            return f"there are fewer than {SMALL} vectors"
        return None

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def dimension(self) -> int:
        """d, the number of values of one vector."""
        return self.shards.dimension

    @property
    def metric(self) -> VectorMetric:
        """How two vectors are compared."""
        return self.shards.metric

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over metric, dimension, and rows and contents of the shards, in their order."""
        if self._keys is not None:
            keys = self._keys
        elif self.codes is not None:
            keys = self.codes.digests
        else:
            keys = [self.shards.digest(shard) for shard in range(len(self.shards.arrays))]
        parts = [(len(array), key) for array, key in zip(self.shards.arrays, keys, strict=True)]
        return hashlib.sha256(repr((self.metric, self.dimension, parts)).encode()).hexdigest()

    def holds(self, images: Images | Sequence[np.ndarray]) -> bool:
        """Whether the index was made of exactly these vectors [N, d], in this order; both are read where they are not
        the same arrays."""
        if images is self.shards.arrays:
            return True
        if isinstance(images, torch.Tensor):
            images = images.detach().cpu().numpy()
        if isinstance(images, ImageSet):
            return False
        try:
            return self.shards.same(VectorShards(images))
        except InputError:
            return False

    def query(self, images: Images, k: int = 2, *, progress: Progress = silent) -> Neighbors:
        """The k nearest training vectors of each query vector, exactly, ties to the lower index.

        Args:
            images: [Q, d] float16 or float32. With "cosine" they are divided by their length, but for those whose
                length is 1 as far as float32 tells: they are compared as they are.
            k: How many neighbors, 1 … N.
            progress: Called as `progress(stage, done, total)`.

        Returns:
            Indices and squared distances, [Q, k] each; `stats` then says what the search did.

        Raises:
            InputError: Another dtype or length, values that are not finite, or k out of range.
        """
        queries = self.shards.compared(images)
        if not (isinstance(k, Integral) and 1 <= k <= len(self)):
            raise InputError(f"k must be between 1 and the number of training images, {len(self)}; got {k}")
        k = int(k)
        squared, indices = np.empty((len(queries), k), np.float64), np.empty((len(queries), k), np.int64)
        search = _Search(self, k, progress)
        progress("searching nearest training images", 0, len(queries))
        for start in range(0, len(queries), QUERY_BLOCK):
            part = slice(start, start + QUERY_BLOCK)
            squared[part], indices[part] = search(queries[part])
            progress("searching nearest training images", min(len(queries), part.stop), len(queries))
        self.stats = search.stats(len(queries))
        return Neighbors(indices, squared, self.dimension)


class _Search:
    """One query: searches block after block and keeps count."""

    def __init__(self, index: VectorIndex, k: int, progress: Progress) -> None:
        self.index, self.shards, self.k, self.progress = index, index.shards, k, progress
        self.bounded = self.fine = self.refined = self.dense_queries = 0
        self.seconds: dict[str, float] = {}

    def __call__(self, queries: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        codes = self.index.codes
        if codes is None:
            return self._dense(queries)
        near = codes.rotation.reaches(queries)
        if bool(near.all()):
            return self._coded(queries, codes)
        # Farther out than codes reach, and there are few such queries.
        squared, indices = np.empty((len(queries), self.k), np.float64), np.empty((len(queries), self.k), np.int64)
        for some, search in ((near, lambda part: self._coded(part, codes)), (~near, self._dense)):
            if bool(some.any()):
                squared[some.numpy()], indices[some.numpy()] = search(queries[some].contiguous())
        return squared, indices

    def stats(self, queries: int) -> QueryStats:
        return QueryStats(
            self.index.method,
            queries,
            len(self.index),
            self.bounded,
            self.fine,
            self.refined,
            self.dense_queries,
            {phase: round(seconds, 6) for phase, seconds in self.seconds.items()},
        )

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def _dense(self, queries: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        with self._timed("dense"):
            found = nearest_of_blocks(
                queries, self.shards.blocks(), self.k, single=True, exact_of=exact_float_distances
            )
        self.dense_queries += len(queries)
        return found[0].numpy(), found[1].numpy()

    def _coded(self, queries: torch.Tensor, codes: vector_codes.Codes) -> tuple[np.ndarray, np.ndarray]:
        rotation = codes.rotation
        with self._timed("encode"):
            code, terms = rotation.encode(queries, True)
        answer = _Answer(len(queries), self.k)
        upper = np.full((len(queries), self.k), 4 * vector_codes.LARGEST)
        pending = _Pending()
        rows_done = 0
        for shard, first, count in self._spans(len(queries)):
            with self._timed("scan"):
                work = native_module().vector_scan(
                    code=codes.code[shard][first:].ctypes.data,
                    terms=codes.terms[shard][first:].ctypes.data,
                    count=count,
                    first=int(self.shards.starts[shard]) + first,
                    query_code=code.ctypes.data,
                    query_terms=terms.ctypes.data,
                    queries=len(queries),
                    width=rotation.width,
                    shift=rotation.shift,
                    stretch=rotation.stretch,
                    k=self.k,
                    upper=upper.ctypes.data,
                    threads=torch.get_num_threads(),
                )
            self.bounded += work.bounded
            self.fine += work.fine
            pending.add(work)
            rows_done += count
            self.progress("scanning training vectors", rows_done, len(self.index))
            if pending.count > PENDING:
                pending.keep_within(upper[:, -1])
                if pending.count > PENDING // 2:
                    self._refine(queries, answer, pending, upper, rotation.unit)
        self._refine(queries, answer, pending, upper, rotation.unit)
        return answer.squared, answer.indices

    def _spans(self, queries: int) -> Iterator[tuple[int, int, int]]:
        """What the core scans at a time: shard, first row in it, and count. A few rows from all over the set come
        first."""
        size = max(SEED_ROWS, SCAN_PAIRS // max(1, queries) // SEED_ROWS * SEED_ROWS)
        parts = [
            (shard, first, min(size, len(array) - first))
            for shard, array in enumerate(self.shards.arrays)
            for first in range(0, len(array), size)
        ]
        if len(parts) > 1:
            for i in np.unique(np.linspace(0, len(parts) - 1, SEEDS).astype(np.int64)):
                shard, first, count = parts[i]
                yield shard, first, min(SEED_ROWS, count)
                parts[i] = (shard, first + SEED_ROWS, count - SEED_ROWS)
        yield from (part for part in parts if part[2] > 0)

    def _refine(
        self, queries: torch.Tensor, answer: _Answer, pending: _Pending, upper: np.ndarray, unit: float
    ) -> None:
        """Exact distances of the pairs that wait, the likeliest first; leaves `upper` as tight as these allow."""
        with self._timed("refine"):
            query, row, lower = pending.take(upper[:, -1])
            rank = _ranks(query)
            for part in (np.flatnonzero(rank < max(FIRST, self.k)), np.flatnonzero(rank >= max(FIRST, self.k))):
                some = part[lower[part] <= upper[query[part], -1]]
                self._exact(queries, answer, query[some], row[some])
                full = answer.indices[:, -1] >= 0
                upper[full] = np.minimum(upper[full], np.sqrt(answer.squared[full]) * unit * (1 + 1e-9))

    def _exact(self, queries: torch.Tensor, answer: _Answer, query: np.ndarray, row: np.ndarray) -> None:
        order = np.argsort(row, kind="stable")
        query, row = query[order], row[order]
        wanted, where = np.unique(row, return_inverse=True)
        step = max(1, GATHERED // self.index.dimension)
        for start in range(0, len(wanted), step):
            low, high = np.searchsorted(where, [start, start + step])
            gathered = self.shards.gather(wanted[start : start + step])
            some, others = (torch.from_numpy(part[low:high].astype(np.int64)) for part in (query, where - start))
            squared = exact_float_distances(queries, gathered, some, others).numpy()
            answer.add(query[low:high], row[low:high], squared)
        self.refined += len(row)


class _Answer:
    """The best k exact distances so far, by (distance, index); index −1 where there are fewer."""

    def __init__(self, queries: int, k: int) -> None:
        self.squared = np.full((queries, k), np.inf)
        self.indices = np.full((queries, k), -1, np.int64)

    def add(self, query: np.ndarray, row: np.ndarray, squared: np.ndarray) -> None:
        touched = np.unique(query)
        known, column = np.nonzero(self.indices[touched] >= 0)
        query = np.concatenate([touched[known], query])
        row = np.concatenate([self.indices[touched[known], column], row])
        squared = np.concatenate([self.squared[touched[known], column], squared])
        order = np.lexsort((row, squared, query))
        query, row, squared = query[order], row[order], squared[order]
        rank = _ranks(query)
        best = rank < self.squared.shape[1]
        self.squared[query[best], rank[best]] = squared[best]
        self.indices[query[best], rank[best]] = row[best]


class _Pending:
    """Pairs that may be in the answer, with lower bounds of their distances in the codes' unit."""

    def __init__(self) -> None:
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.count = 0

    def add(self, work: Any) -> None:
        part = (np.empty(work.found, np.int32), np.empty(work.found, np.int64), np.empty(work.found, np.float32))
        if work.found:
            work.copy(*(values.ctypes.data for values in part))
            self.parts.append(part)
            self.count += work.found

    def keep_within(self, reach: np.ndarray) -> None:
        """Leaves out those that are beyond their query's reach."""
        self.parts = [
            tuple(values[lower <= reach[query]] for values in (query, row, lower)) for query, row, lower in self.parts
        ]
        self.count = sum(len(query) for query, _, _ in self.parts)

    def take(self, reach: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Those within reach, by query and lower bound; none wait then."""
        self.keep_within(reach)
        empty = (np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.float32))
        query, row, lower = (np.concatenate(parts) for parts in zip(empty, *self.parts, strict=True))
        self.parts, self.count = [], 0
        order = np.lexsort((lower, query))
        return query[order], row[order], lower[order]


def _ranks(groups: np.ndarray) -> np.ndarray:
    """The place of each element in its group, of ascending groups."""
    places = np.arange(len(groups))
    new = np.concatenate([[True], groups[1:] != groups[:-1]]) if len(groups) else np.empty(0, bool)
    return places - np.maximum.accumulate(np.where(new, places, 0))


def exact_float_distances(
    queries: torch.Tensor, training: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """‖queries[rows] − training[columns]‖² of float rows, float64, summed in the order of csrc/nearest/nearest.h where
    the core is there."""
    if native_module() is None:
        return exact_squared_distances(queries, training, rows, columns)
    return squared_tile_maxima(queries[:, None], training[:, None], rows, columns)
