"""Search of an index folder in two levels: candidates from the codes of its shards, then exact distances to what is
stored; or exactly, where there are no codes or it is asked for."""

from __future__ import annotations

import time
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmem.errors import InputError
from diffmem.lazy import torch
from diffmem.ops.nearest import exact_squared_distances, pairs_within
from diffmem.progress import Progress, silent
from diffmem.search import FaissStats, Neighbors, TrainingIndex, VectorIndex
from diffmem.search.candidates import Candidates
from diffmem.search.rows import Images, as_rows

if TYPE_CHECKING:
    from diffmem.indexes.folder import IndexFolder

MEMORY = 4e9  # bytes of codes, and of stored pixels made ready for exact search, that are held at once
MOST_CANDIDATES = 1024
BLOCK = 4096


class FolderSearch:
    """An index folder as an audit searches it.

    Args:
        folder: The index.
        exactly: Whether codes are left alone.
        device: "cpu", "cuda" or "auto", for exact search.

    Attributes:
        factory: FAISS's factory string of the codes, or "exact".
        lists: Inverted lists of the codes.
        nprobe: How many of them are visited per query.
        candidates: How many per query are compared exactly, of each part of the index that is loaded at once.
        tunable: Whether `tune` has yet to choose these.
        stats: What the last query did.
    """

    def __init__(self, folder: IndexFolder, *, exactly: bool = False, device: str = "auto") -> None:
        self.folder, self._device = folder, device
        self.device = torch.device("cpu")
        self.stats: Any = None
        quantizer = None if exactly else folder.quantizer
        self.factory: str = "exact" if quantizer is None else quantizer.factory
        self.lists: int | None = None if quantizer is None else quantizer.lists
        self.nprobe = None if self.lists is None else min(self.lists, max(8, self.lists // 32))
        self.candidates = 32
        self.tunable = self.approximate
        self._loaded: list[tuple[Any, Candidates]] | None = None
        self._indexes: dict[int, TrainingIndex] = {}
        self._held = 0

    def __len__(self) -> int:
        return len(self.folder)

    @property
    def approximate(self) -> bool:
        """Whether it may miss neighbors."""
        return self.lists is not None

    @cached_property
    def exact(self) -> FolderSearch:
        """The same, searched exactly."""
        return self if not self.approximate else FolderSearch(self.folder, exactly=True, device=self._device)

    @property
    def fingerprint(self) -> str:
        """Of the folder."""
        return self.folder.fingerprint

    def holds(self, images: Images) -> bool:
        """Whether the index was made of exactly these rows, in this order."""
        return self.folder.holds(images)

    def query(self, images: Images, k: int = 2, *, progress: Progress = silent) -> Neighbors:
        """The k nearest rows of each query: by candidates, with exact distances and what was not looked at
        (`Neighbors.unseen`), or exactly.

        Args:
            images: [Q, d], as `IndexFolder.rows_of` gives them; pixels also as images.
            k: How many, 1 … N.
            progress: Called as `progress(stage, done, total)`.

        Raises:
            InputError: The queries differ in size or dtype, k is out of range, or a shard is missing or damaged.
        """
        queries = as_rows(images, "query images")
        wanted = torch.uint8 if self.folder.dtype == np.uint8 else torch.float32
        if queries.shape[1] != self.folder.dimension or queries.dtype != wanted:
            raise InputError(
                f"query images are {queries.shape[1]:,} values of {queries.dtype}, rows of {self.folder.path} "
                f"{self.folder.dimension:,} of {wanted}"
            )
        if not (isinstance(k, Integral) and 1 <= k <= len(self)):
            raise InputError(f"k must be between 1 and the number of training images, {len(self)}; got {k}")
        if not self.approximate or k > MOST_CANDIDATES:
            return self.exact._exactly(queries, int(k), progress)
        return self._by_candidates(queries, int(k), progress)

    def tune(self, images: Images, recall: float, *, progress: Progress = silent) -> None:
        """Chooses `nprobe` and `candidates`, once: as `FaissIndex.tune` does."""
        if not self.tunable or not len(images):
            return
        self.tunable = False
        assert self.lists is not None
        queries = as_rows(images, "query images")
        truth = self.exact.query(queries, min(2, len(self)), progress=progress).indices
        most, probes = min(len(self), MOST_CANDIDATES), 1
        floats = _floats(queries)
        while True:
            places = np.full(truth.shape, most)
            for index, _ in self._parts():
                _, proposed = _searched(index, floats, min(most, index.ntotal), probes)
                hits = proposed[:, :, None] == truth[:, None, :]
                places = np.minimum(places, np.where(hits.any(axis=1), hits.argmax(axis=1), most))
            if (places < most).mean(axis=0).min() >= recall or probes >= self.lists:
                break
            probes = min(2 * probes, self.lists)
        needed = np.sort(places, axis=0)[max(0, int(np.ceil(recall * len(places))) - 1)].max()
        self.nprobe, self.candidates = probes, int(min(most, max(32, 2 * (needed + 1))))

    def within(self, view: np.ndarray, limit: int | float) -> np.ndarray:
        """Rows within a squared distance of one row [1, …], ascending."""
        row, found = as_rows(view), []
        for shard in self.folder.shards:
            for start in range(0, shard.rows, 16 * BLOCK):
                rows = as_rows(shard.take(slice(start, min(start + 16 * BLOCK, shard.rows))))
                found.append(pairs_within(row, rows, limit)[1].numpy() + shard.start + start)
        return np.concatenate(found)

    def _by_candidates(self, queries: torch.Tensor, k: int, progress: Progress) -> Neighbors:
        began = time.perf_counter()
        floats, width = _floats(queries), min(len(self), max(k, self.candidates))
        proposals, bounds = [], []
        stage = "searching codes of shards"
        for number, (index, candidates) in enumerate(self._parts()):
            progress(stage, number, self._groups)
            some = min(width, index.ntotal)
            coded, proposed = _searched(index, floats, some, self.nprobe)
            for start in range(0, len(floats), BLOCK):
                part = slice(start, start + BLOCK)
                bounds.append(
                    (part, candidates.unseen(floats[part], proposed[part], coded[part], self.nprobe, index.ntotal))
                )
            proposals.append(proposed)
        progress(stage, self._groups, self._groups)
        unseen = np.full(len(floats), np.inf)
        for part, bound in bounds:
            unseen[part] = np.minimum(unseen[part], bound)
        proposed = np.hstack(proposals)
        integer = queries.dtype == torch.uint8
        squared = np.empty((len(queries), k), np.int64 if integer else np.float64)
        indices = np.empty((len(queries), k), np.int64)
        step = max(1, min(BLOCK, (1 << 28) // (proposed.shape[1] * self.folder.dimension)))
        for start in range(0, len(queries), step):
            progress("computing exact distances", start, len(queries))
            part = slice(start, start + step)
            squared[part], indices[part] = self._reranked(queries[part], proposed[part], k)
        progress("computing exact distances", len(queries), len(queries))
        short = np.flatnonzero((proposed >= 0).sum(axis=1) < k)
        if len(short):
            found = self.exact._exactly(queries[short], k, progress)
            squared[short], indices[short], unseen[short] = found.squared_distances, found.indices, np.inf
        seconds = time.perf_counter() - began
        self.stats = FaissStats(self.factory, "cpu", proposed.shape[1], self.nprobe, len(short), seconds)
        return Neighbors(indices, squared, self.folder.dimension, unseen=unseen)

    def _reranked(self, queries: torch.Tensor, proposed: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best proposals by (exact distance, row)."""
        rows, columns = np.nonzero(proposed >= 0)
        which, where = np.unique(proposed[rows, columns], return_inverse=True)
        stored = torch.from_numpy(self.folder.take(which))
        exact = exact_squared_distances(queries, stored, torch.from_numpy(rows), torch.from_numpy(where)).numpy()
        largest = np.iinfo(np.int64).max if exact.dtype == np.int64 else np.inf
        squared = np.full(proposed.shape, largest, exact.dtype)
        squared[rows, columns] = exact
        order = np.lexsort((proposed, squared), axis=1)[:, :k]
        return np.take_along_axis(squared, order, 1), np.take_along_axis(proposed, order, 1)

    @cached_property
    def _groups_of_shards(self) -> list[list[int]]:
        """Shards whose codes are held at once."""
        quantizer = self.folder.quantizer
        assert quantizer is not None
        groups: list[list[int]] = [[]]
        size = 0.0
        for number, shard in enumerate(self.folder.shards):
            more = shard.rows * (quantizer.code_bytes + 8)
            if groups[-1] and size + more > MEMORY:
                groups.append([])
                size = 0.0
            groups[-1].append(number)
            size += more
        return groups

    @property
    def _groups(self) -> int:
        return len(self._groups_of_shards)

    def _parts(self) -> Any:
        """(FAISS index, its bounds) of each group of shards; kept where there is one alone."""
        import faiss

        quantizer = self.folder.quantizer
        assert quantizer is not None
        if self._loaded is not None:
            yield from self._loaded
            return
        parts = []
        for shards in self._groups_of_shards:
            index = quantizer.load(shards)
            bounds = Candidates(faiss, index)
            measured = [each for each in map(quantizer.bounds, shards) if each is not None]
            if len(measured) < len(shards):
                bounds.bounded = False  # made before they were measured
            else:
                bounds.error, bounds.largest = (max(values) for values in zip(*measured, strict=True))
            if self._groups == 1:
                parts.append((index, bounds))
            yield index, bounds
        self._loaded = parts or None

    def _exactly(self, queries: torch.Tensor, k: int, progress: Progress) -> Neighbors:
        if self.folder.dtype != np.uint8 and self.folder.metric != "hamming":
            return self._vectors.query(queries, k, progress=progress)
        best: tuple[np.ndarray, np.ndarray] | None = None
        for number, shard in enumerate(self.folder.shards):
            progress("searching shards", number, len(self.folder.shards))
            found = self._index_of(number).query(queries, min(k, shard.rows))
            squared, indices = found.squared_distances, found.indices + shard.start
            if best is not None:
                squared, indices = np.hstack([best[0], squared]), np.hstack([best[1], indices])
                order = np.lexsort((indices, squared), axis=1)[:, :k]
                squared, indices = (np.take_along_axis(values, order, 1) for values in (squared, indices))
            best = squared, indices
        progress("searching shards", len(self.folder.shards), len(self.folder.shards))
        assert best is not None
        return Neighbors(best[1], best[0], self.folder.dimension)

    def _index_of(self, number: int) -> TrainingIndex:
        """A shard of pixels or bits, ready; as many are kept as there is memory for."""
        if number not in self._indexes:
            index = TrainingIndex(self.folder.shards[number].take(slice(None)), device=self._device)
            self._held += index.rows.numel()
            if self._held > MEMORY:
                return index
            self._indexes[number] = index
        return self._indexes[number]

    @cached_property
    def _vectors(self) -> VectorIndex:
        shards = self.folder.shards
        metric: Any = self.folder.metric
        names = [str(shard.folder / "vectors.npy") for shard in shards]
        return VectorIndex([shard.vectors for shard in shards], metric=metric, names=names)

    def __getstate__(self) -> dict[str, Any]:
        made = ("_vectors", "exact", "_groups_of_shards")
        kept = {name: value for name, value in self.__dict__.items() if name not in made}
        return {**kept, "_loaded": None, "_indexes": {}, "_held": 0}


def _floats(rows: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(rows.to(torch.float32).numpy())


def _searched(index: Any, queries: np.ndarray, count: int, nprobe: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(squared distances to codes, rows) that FAISS proposes."""
    import faiss

    inverted: Any = faiss.extract_index_ivf(index)
    inverted.nprobe = nprobe
    found = index.search(queries, count)
    return found[0], found[1]
