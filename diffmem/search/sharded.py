"""The training set divided among the ranks of `torch.distributed`: each searches its shard, and the answers are
merged exactly.

Every rank calls the same methods with the same arguments and gets the same, whole answer; it is the same for any
number of ranks, since the k nearest of the whole set are among the k nearest of the shards and equal distances go to
the lower index.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import numpy as np

from diffmem.errors import InputError
from diffmem.lazy import torch
from diffmem.progress import Progress, silent
from diffmem.search.index import TrainingIndex
from diffmem.search.neighbors import Neighbors
from diffmem.search.rows import Images, as_rows


class ShardedIndex:
    """An index of the training set of which this rank holds one part.

    Args:
        images: The complete training set (a memory map or a view costs nothing; only this rank's rows are read).
        device: "cpu", "cuda" or "auto".
        build: What to build over the shard; default `TrainingIndex`. Called with the shard's rows and `device`.
        group: The process group, default the world; gloo and NCCL both serve.

    Raises:
        InputError: `torch.distributed` is not initialized, or the set is empty.
    """

    def __init__(
        self,
        images: Images,
        *,
        device: str = "auto",
        build: Callable[..., TrainingIndex] = TrainingIndex,
        group: torch.distributed.ProcessGroup | None = None,
    ):
        if not torch.distributed.is_initialized():
            raise InputError(
                "torch.distributed is not initialized: start with torchrun and call init_process_group first"
            )
        rows = as_rows(images, "training images")
        if len(rows) == 0:
            raise InputError("the training set is empty")
        self.group = group
        rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        self.total = len(rows)
        self.dtype = rows.dtype
        self.start, self.stop = (self.total * part // ranks for part in (rank, rank + 1))
        # A rank of a set smaller than the world may have nothing to search, but still takes part in the merging.
        self.shard = build(rows[self.start : self.stop], device=device) if self.stop > self.start else None
        self.device = self.shard.device if self.shard is not None else torch.device("cpu")

    def __len__(self) -> int:
        return self.total

    def holds(self, images: Images) -> bool:
        """Whether the index was made of exactly these images [N, ...], in this order. Each rank compares its own part;
        all ranks get the same answer."""
        rows = as_rows(images, "images")
        mine = (len(rows), rows.dtype) == (self.total, self.dtype)
        if mine and self.shard is not None:
            mine = self.shard.holds(rows[self.start : self.stop])
        return all(bool(part.all()) for part in self._gather(np.array([mine], np.uint8)))

    def query(self, images: Images, k: int = 2, *, progress: Progress = silent) -> Neighbors:
        """The k nearest training images of the whole set for each query image, as `TrainingIndex.query` gives them."""
        if not (isinstance(k, Integral) and 1 <= k <= self.total):
            raise InputError(f"k must be between 1 and the number of training images, {self.total}; got {k}")
        queries = as_rows(images, "query images")
        held = min(k, self.stop - self.start)
        integer = self.dtype == torch.uint8
        squared = np.full(
            (len(queries), k), np.iinfo(np.int64).max if integer else np.inf, np.int64 if integer else np.float64
        )
        indices = np.full((len(queries), k), self.total, np.int64)
        if held:
            found = self.shard.query(queries, held, progress=progress)
            squared[:, :held], indices[:, :held] = found.squared_distances, found.indices + self.start
        squared, indices = (np.concatenate(self._gather(values), axis=1) for values in (squared, indices))
        order = np.lexsort((indices, squared), axis=1)[:, :k]
        return Neighbors(np.take_along_axis(indices, order, 1), np.take_along_axis(squared, order, 1), queries.shape[1])

    def _gather(self, values: np.ndarray) -> list[np.ndarray]:
        """Everybody's `values`, by rank."""
        device = f"cuda:{torch.cuda.current_device()}" if torch.distributed.get_backend(self.group) == "nccl" else "cpu"
        mine = torch.from_numpy(values).to(device)
        everybody = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(self.group))]
        torch.distributed.all_gather(everybody, mine, group=self.group)
        return [part.cpu().numpy() for part in everybody]
