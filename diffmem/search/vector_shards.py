"""`VectorShards`: float vectors in one or many arrays, most often memory-mapped, read as one list of rows.

Everything is read in blocks, so that memory is bounded however large the shards are. Stored float16 values are exact
numbers and are widened, not rounded.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from diffmem.errors import InputError
from diffmem.inert.boundary import parsing
from diffmem.lazy import torch
from diffmem.search.rows import Images

BLOCK_VALUES = 1 << 22  # values read at a time: 16 MiB as float32
METRICS = ("euclidean", "cosine")
VectorMetric = Literal["euclidean", "cosine"]
UNIT = 2.0**-22  # how far from 1 the length of a query can be that counts as normalized already


class VectorShards:
    """Rows [N, d] in shards.

    Args:
        shards: Arrays [n, d] of float16 or float32, or paths of `.npy` files of them, which are memory-mapped. Empty
            ones are allowed beside others.
        metric: "euclidean": rows are the stored values. "cosine": rows are the stored vectors divided by their length
            in float64 and rounded to float32, so that squared distances are 2 − 2 cos.
        names: What to call each shard in messages; default its file, or its number.

    Raises:
        InputError: No vectors, another dtype, vectors of different lengths, or a file that cannot be read.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray | str | Path] | np.ndarray,
        metric: VectorMetric = "euclidean",
        names: Sequence[str] | None = None,
    ) -> None:
        if metric not in METRICS:
            raise InputError(f"metric must be one of {', '.join(METRICS)} for vectors, got {metric!r}")
        self.metric: VectorMetric = metric
        given = [shards] if isinstance(shards, np.ndarray | str | Path) else list(shards)
        self.arrays = [shard if isinstance(shard, np.ndarray) else _mapped(Path(shard)) for shard in given]
        if not self.arrays:
            raise InputError("the index has no shards")
        if names is not None and len(names) != len(self.arrays):
            raise InputError(f"names: {len(names)} for {len(self.arrays)} shards")
        self.names = list(names) if names is not None else [_name(i, array) for i, array in enumerate(self.arrays)]
        for name, array in zip(self.names, self.arrays, strict=True):
            if array.ndim != 2 or array.shape[1] == 0:
                raise InputError(f"{name}: shards must hold vectors [n, d], got shape {array.shape}")
            if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4):
                raise InputError(f"{name}: vectors must be float16 or float32, got {array.dtype}: convert them first")
            if array.shape[1] != self.arrays[0].shape[1]:
                raise InputError(
                    f"{name}: vectors of {array.shape[1]} values, those of {self.names[0]} have "
                    f"{self.arrays[0].shape[1]}: index each kind by itself"
                )
        self.dimension: int = self.arrays[0].shape[1]
        self.starts = np.concatenate([[0], np.cumsum([len(array) for array in self.arrays], dtype=np.int64)])
        if len(self) == 0:
            raise InputError("the training set is empty")

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def block_rows(self) -> int:
        """Rows read at a time."""
        return max(1, BLOCK_VALUES // self.dimension)

    def block(self, start: int, stop: int) -> torch.Tensor:
        """Rows start … stop − 1 as they are compared, float32 [n, d].

        Raises:
            InputError: A value is not finite or too large to be squared, or with "cosine" a vector is zero; the message
                names shard and row.
        """
        parts = []
        for shard in range(int(np.searchsorted(self.starts, start, "right")) - 1, len(self.arrays)):
            first = int(self.starts[shard])
            if first >= stop:
                break
            low, high = max(start, first) - first, min(stop, int(self.starts[shard + 1])) - first
            if high > low:
                parts.append(self._rows(shard, low, self.arrays[shard][low:high]))
        return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def blocks(self, size: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """All rows in blocks, each with the number of its first one."""
        size = self.block_rows if size is None else size
        for start in range(0, len(self), size):
            yield start, self.block(start, min(len(self), start + size))

    def gather(self, rows: np.ndarray) -> torch.Tensor:
        """Some rows, float32 [len(rows), d], as they are compared. Fastest where `rows` ascends."""
        values = np.empty((len(rows), self.dimension), np.float32)
        shards = np.searchsorted(self.starts, rows, "right") - 1
        for shard in np.unique(shards):
            chosen = np.flatnonzero(shards == shard)
            local = rows[chosen] - self.starts[shard]
            values[chosen] = self._rows(int(shard), local, self.arrays[shard][local])
        return torch.from_numpy(values)

    def compared(self, queries: Images) -> torch.Tensor:
        """Query vectors as they are compared, float32 [Q, d]; with "cosine" those of length 1, as far as float32 tells,
        are taken as they are.

        Raises:
            InputError: Another dtype or length, or values that cannot be compared.
        """
        if isinstance(queries, torch.Tensor):
            queries = queries.detach().cpu().numpy()
        if not isinstance(queries, np.ndarray):
            raise InputError(f"queries must be an array or a tensor, got {type(queries).__name__}")
        if queries.ndim < 2 or int(np.prod(queries.shape[1:])) != self.dimension:
            raise InputError(f"queries must be vectors of {self.dimension} values, got shape {queries.shape}")
        if queries.dtype.kind != "f" or queries.dtype.itemsize not in (2, 4):
            raise InputError(f"queries must be float16 or float32 as the vectors are, got {queries.dtype}")
        flat = queries.reshape(len(queries), self.dimension)
        return torch.from_numpy(self._normal(flat, "query images", 0, keep_unit=True))

    def sample(self, count: int) -> torch.Tensor:
        """At most `count` evenly spaced rows."""
        return self.gather(np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64))

    def same(self, others: VectorShards) -> bool:
        """Whether both hold the same stored values, however they are divided, or `others`, taken as they are stored,
        the rows that these are compared as."""
        if (len(self), self.dimension) != (len(others), others.dimension):
            return False
        mine, theirs = (VectorShards(part.arrays, "euclidean", part.names) for part in (self, others))
        return any(
            all(torch.equal(some, other) for (_, some), (_, other) in zip(rows.blocks(), theirs.blocks(), strict=True))
            for rows in ((mine,) if self.metric == "euclidean" else (mine, self))
        )

    def digest(self, shard: int) -> str:
        """SHA-256 over dtype, shape and values of a shard; reads it all."""
        digest = self.new_digest(shard)
        for start in range(0, len(self.arrays[shard]), self.block_rows):
            self.add_to_digest(digest, shard, slice(start, start + self.block_rows))
        return str(digest.hexdigest())

    def new_digest(self, shard: int) -> hashlib._Hash:
        """The beginning of a shard's digest."""
        array = self.arrays[shard]
        return hashlib.sha256(repr((array.shape, array.dtype.newbyteorder("<").str)).encode())

    def add_to_digest(self, digest: hashlib._Hash, shard: int, part: slice) -> None:
        """Adds rows of the shard, which come in their order."""
        stored = self.arrays[shard][part]
        digest.update(np.ascontiguousarray(stored, stored.dtype.newbyteorder("<")).data)

    def _rows(self, shard: int, where: int | np.ndarray, stored: np.ndarray) -> np.ndarray:
        """Stored values as they are compared; `where` says which rows of the shard these are."""
        return self._normal(stored, self.names[shard], where)

    def _normal(self, stored: np.ndarray, name: str, where: int | np.ndarray, keep_unit: bool = False) -> np.ndarray:
        values = _float32(stored)
        largest = values.abs().amax(dim=1).numpy() if len(values) else np.zeros(0, np.float32)
        if not np.isfinite(largest).all():
            bad = int((~np.isfinite(largest)).argmax())
            overflow = stored.dtype.itemsize == 2 and np.isinf(largest[bad])
            raise InputError(
                f"{name}: vector {_row(where, bad)} holds {'infinity' if np.isinf(largest[bad]) else 'NaN'}: "
                + ("it overflowed float16: store float32" if overflow else "recompute or remove it")
            )
        if self.metric != "cosine":
            return values.numpy()
        lengths = np.sqrt(np.einsum("nd,nd->n", stored, stored, dtype=np.float64))
        if not lengths.all():
            raise InputError(
                f"{name}: vector {_row(where, int((lengths == 0).argmax()))} is 0 in every value and has no direction: "
                "remove that image, or compare with metric='euclidean'"
            )
        if keep_unit:
            lengths[np.abs(lengths - 1) <= UNIT] = 1
        return (stored.astype(np.float64) / lengths[:, None]).astype(np.float32)


def _float32(stored: np.ndarray) -> torch.Tensor:
    """Widened by PyTorch, which is many times faster than numpy for float16."""
    native = np.ascontiguousarray(stored, stored.dtype.newbyteorder("="))
    with warnings.catch_warnings():  # a read-only memory map is only read here
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(native).float()


def _row(where: int | np.ndarray, offset: int) -> int:
    return where + offset if isinstance(where, int) else int(where[offset])


def _mapped(path: Path) -> np.ndarray:
    with parsing(path, "a .npy file of vectors", "write it again"):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def _name(number: int, array: np.ndarray) -> str:
    return str(array.filename) if isinstance(array, np.memmap) and array.filename else f"shard {number}"
