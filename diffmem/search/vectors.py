"""`VectorIndex`: the exact nearest among float vectors in one or many memory-mapped arrays."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path

import numpy as np
import torch

from diffmem.data import ImageSet
from diffmem.errors import InputError
from diffmem.ops.nearest.blocked import exact_squared_distances, nearest_of_blocks
from diffmem.ops.registry import native_module
from diffmem.progress import Progress, silent
from diffmem.search.index import QueryStats
from diffmem.search.neighbors import Neighbors
from diffmem.search.rows import Images
from diffmem.search.tiles import squared_tile_maxima
from diffmem.search.vector_shards import VectorMetric, VectorShards

METHODS = ("auto", "torch")
QUERY_BLOCK = 4096


class VectorIndex:
    """Float vectors in shards, searchable for the exact nearest of any query vectors.

    The answer is that of a comparison with every vector, in float64 of the stored values, equal distances to the lower
    index; it does not depend on how the vectors are divided into shards.

    Args:
        shards: Arrays [n, d] of float16 or float32, memory-mapped ones stay on disk; or paths of `.npy` files.
        metric: "euclidean", or "cosine" (vectors are compared as if they had length 1; squared distances are
            2 − 2 cos).
        method: "torch" (float32 products of all pairs, with a proven margin), or "auto": the fastest here.
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
        self.method = "torch"
        self.device = torch.device("cpu")
        for start, _ in self.shards.blocks():  # every value is looked at once
            progress("checking training vectors", start, len(self))
        self.stats = QueryStats(self.method, 0, len(self))

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
        keys = self._keys or [self.shards.digest(shard) for shard in range(len(self.shards.arrays))]
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
        squared = np.empty((len(queries), k), np.float64)
        indices = np.empty((len(queries), k), np.int64)
        began = time.perf_counter()
        for start in range(0, len(queries), QUERY_BLOCK):
            progress("searching nearest training images", start, len(queries))
            part = slice(start, start + QUERY_BLOCK)
            found = nearest_of_blocks(
                queries[part], self.shards.blocks(), int(k), single=True, exact_of=exact_float_distances
            )
            squared[part], indices[part] = (values.numpy() for values in found)
        progress("searching nearest training images", len(queries), len(queries))
        self.stats = QueryStats(
            self.method,
            len(queries),
            len(self),
            dense_queries=len(queries),
            seconds={"dense": round(time.perf_counter() - began, 6)},
        )
        return Neighbors(indices, squared, self.dimension)


def exact_float_distances(
    queries: torch.Tensor, training: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """‖queries[rows] − training[columns]‖² of float rows, float64, summed in the order of csrc/nearest/nearest.h where
    the core is there."""
    if native_module() is None:
        return exact_squared_distances(queries, training, rows, columns)
    return squared_tile_maxima(queries[:, None], training[:, None], rows, columns)
