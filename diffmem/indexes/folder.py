"""`open_index`: an index of a training set as it lies in its folder, memory-mapped."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from diffmem.errors import InputError
from diffmem.features import FeatureSet
from diffmem.features.feature_set import Metric
from diffmem.indexes.duplicates import StoredDuplicates, read_duplicates
from diffmem.indexes.reading import Features, Reading
from diffmem.indexes.shards import DESCRIPTION, SHARDS, content_digests
from diffmem.inert.boundary import parsing
from diffmem.inert.documents import read_json
from diffmem.integrity import unsealed
from diffmem.lazy import torch
from diffmem.progress import Progress, silent
from diffmem.search import Neighbors, TrainingIndex, VectorIndex
from diffmem.search.rows import Images, as_rows

if TYPE_CHECKING:
    from diffmem.indexes.quantizer import Quantizer

FORMAT = "diffmem-sharded-index-1"
INDEX = "index.json"
UNFINISHED = "build.json"
CODES = "codes"  # of the exact search over float vectors, made when it is first used
_BLOCK = 4096


def read_index(path: Path) -> dict[str, Any]:
    """The description of a finished index.

    Raises:
        InputError: There is none, or it is damaged, or of another kind or version.
    """
    file = path / INDEX
    if not file.is_file():
        if (path / UNFINISHED).is_file():
            raise InputError(
                f"{path}: its build has not ended: run the same `diffmem index build` again, which continues it"
            )
        there = "no index" if path.is_dir() else "no such folder"
        raise InputError(f"{path}: {there}: make one with `diffmem index build SOURCE {path}`")
    found = read_json(file, "run the same `diffmem index build` again")
    form = found.get("format") if isinstance(found, dict) else None
    if isinstance(form, str) and form.startswith(("diffmem-index-", "diffmem-faiss-index-")):
        raise InputError(f"{path}: an index that TrainingIndex.save wrote, in one piece: TrainingIndex.load reads it")
    if form != FORMAT:
        raise InputError(f"{path}: an index of another version of diffmem: build it in another folder")
    return unsealed(found, file, "run the same `diffmem index build` again")


@dataclass(frozen=True, eq=False)
class Shard:
    """One shard of an index.

    Attributes:
        folder: Where it lies.
        address: Its name: a hash of what it was made from.
        rows: How many rows it holds.
        start: The number of its first row in the index.
        label: What the names of its rows begin with.
        metric: How rows are compared.
    """

    folder: Path
    address: str
    rows: int
    start: int
    label: str
    metric: Metric

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}  # without what is mapped

    @cached_property
    def vectors(self) -> np.ndarray:
        """[rows, d] as stored, memory-mapped: uint8, float16 or float32."""
        return self._array("vectors")

    @cached_property
    def digests(self) -> np.ndarray:
        """uint8 [rows, 16] of each row's contents, memory-mapped."""
        return self._array("digests")

    @cached_property
    def image_digests(self) -> np.ndarray | None:
        """The same of the images, where the rows are features of images; else None."""
        return self._array("images") if (self.folder / "images.npy").is_file() else None

    @cached_property
    def places(self) -> np.ndarray | None:
        """int64 [rows, 2] of images in a tar archive: where their bytes begin, and how many there are; else None."""
        return self._array("places") if (self.folder / "places.npy").is_file() else None

    @cached_property
    def lengths(self) -> np.ndarray | None:
        """float64 [rows], of vectors that are compared by the cosine and not stored with length 1; else None."""
        return self._array("lengths") if (self.folder / "lengths.npy").is_file() else None

    def take(self, rows: slice | np.ndarray) -> np.ndarray:
        """Some rows as the search compares them by Euclidean distance: `FeatureSet.rows`. uint8 or float32."""
        vectors = np.asarray(self.vectors[rows])
        if self.lengths is not None:
            return (vectors.astype(np.float64) / self.lengths[rows][:, None]).astype(np.float32)
        return vectors.astype(np.float32) if vectors.dtype == np.float16 else vectors

    def names(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Names of rows; "#number", counted through the index, where the source has none."""
        stop = self.rows if stop is None else stop
        if not (self.folder / "name_ends.npy").is_file():
            return [f"{self.label}#{row if self.label else self.start + row}" for row in range(start, stop)]
        ends, text = self._array("name_ends"), self._array("names")
        begin = int(ends[start - 1]) if start else 0
        found = []
        for end in ends[start:stop].tolist():
            found.append(self.label + bytes(text[begin:end]).decode("utf-8", "replace"))
            begin = end
        return found

    def description(self) -> dict[str, Any]:
        """What `shard.json` says of it, unchecked."""
        found = read_json(self.folder / DESCRIPTION, "run `diffmem index verify`")
        return dict(found)

    def _array(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        with parsing(path, "a file of this index", "run `diffmem index verify`, which says how to repair it"):
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            if name != "names" and len(found) != self.rows:
                raise ValueError(f"{len(found):,} rows instead of {self.rows:,}")
            return found


class Names(Sequence[str]):
    """The names of all rows, read as they are asked for."""

    def __init__(self, index: IndexFolder) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        number = int(row) + (len(self) if row < 0 else 0)
        shard, local = self._index.locate(number)
        return self._index.shards[shard].names(local, local + 1)[0]

    def __iter__(self) -> Iterator[str]:
        for shard in self._index.shards:
            for start in range(0, shard.rows, _BLOCK):
                yield from shard.names(start, min(start + _BLOCK, shard.rows))


class IndexFolder:
    """An index of a training set in its folder; made by `open_index`. Nothing of it is in memory until it is read.

    Attributes:
        path: The folder.
        shards: In order; without those that have no rows.
        features: What the rows are.
        reading: How the images were read.
        metric: How two rows are compared: "euclidean", "cosine" or "hamming".
        dimension: d, the values of one row.
        dtype: Of the stored vectors.
        image_shape: (C, H, W) of pixels and of the images that features were made of; None for vectors.
        sources: What it was built from, as given.
        device: Where `query` computes.
        stats: What the last query did; None.
    """

    stats = None

    def __init__(self, path: Path, description: dict[str, Any], device: str = "auto") -> None:
        self.path, self._description = path, description
        self.features = Features.from_json(description["features"])
        self.reading = Reading.from_json(description["reading"])
        assert self.features.metric is not None
        self.metric: Metric = self.features.metric
        self.dimension: int = description["dimension"]
        self.dtype = np.dtype(description["dtype"])
        shape = description["image_shape"]
        self.image_shape: tuple[int, ...] | None = None if shape is None else tuple(shape)
        self.sources: tuple[str, ...] = tuple(description["sources"])
        self.device = torch.device("cpu")
        self._device = device
        shards, start = [], 0
        for entry in description["shards"]:
            if entry["rows"]:
                folder = path.absolute() / SHARDS / entry["address"]
                shards.append(Shard(folder, entry["address"], entry["rows"], start, entry["label"], self.metric))
                start += entry["rows"]
        self.shards: tuple[Shard, ...] = tuple(shards)
        self._starts = [shard.start for shard in shards]
        self._rows = start

    def __len__(self) -> int:
        return self._rows

    def __reduce__(self) -> tuple[Any, ...]:
        return open_index, (self.path,)  # no arrays travel

    def __repr__(self) -> str:
        kind = f"{self.dtype} {len(self)}×{self.dimension}, {self.metric}"
        return f"IndexFolder({self.path}: {self.features.name}, {kind}, {len(self.shards)} shards)"

    @property
    def description(self) -> dict[str, Any]:
        """What `index.json` says."""
        return self._description

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what the rows are and the contents of all shards in their order."""
        entries = [[entry["rows"], entry["vectors"]] for entry in self._description["shards"] if entry["rows"]]
        text = json.dumps([self.features.decides(), self.dimension, self.dtype.name, entries], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def skipped(self) -> int:
        """Files (or vectors) that could not be used and were skipped."""
        return sum(entry["skipped"] for entry in self._description["shards"])

    @cached_property
    def names(self) -> Names:
        """The names of all rows, read as they are asked for."""
        return Names(self)

    def name(self, row: int) -> str:
        """What to call a row in a report."""
        return self.names[row]

    @cached_property
    def duplicates(self) -> StoredDuplicates:
        """Which rows are duplicates of which, across all shards, as found when the index was built."""
        return read_duplicates(self.path, self._description["duplicates"], len(self))

    @cached_property
    def quantizer(self) -> Quantizer | None:
        """The codes that propose candidates; None where there are none ("flat")."""
        from diffmem.indexes.quantizer import Quantizer

        return None if self._description["quantizer"] is None else Quantizer(self)

    def vectors(self, shard: int) -> np.ndarray:
        """[rows, d] of a shard as stored, memory-mapped: uint8, float16 or float32."""
        return self.shards[shard].vectors

    def locate(self, row: int) -> tuple[int, int]:
        """Which shard holds a row, and its number in there."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = bisect_right(self._starts, row) - 1
        return shard, row - self._starts[shard]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows by their numbers in the index, as the search compares them: [n, d] uint8 or float32.

        Args:
            rows: int64 [n], in any order.
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        out = np.empty((len(rows), self.dimension), np.uint8 if self.dtype == np.uint8 else self._compared)
        of = np.searchsorted(self._starts, rows, side="right") - 1
        for shard in np.unique(of):
            mine = np.flatnonzero(of == shard)
            out[mine] = self.shards[shard].take(rows[mine] - self._starts[shard])
        return out

    @property
    def _compared(self) -> np.dtype:
        return np.dtype(np.float64 if self.dtype == np.float64 else np.float32)

    def rows_of(self, images: FeatureSet) -> np.ndarray:
        """The vectors of other images as this index compares them.

        Raises:
            InputError: They were made by another network, have another length, or are compared in another way.
        """
        ours, theirs = f"features ({images.source})", f"the index {self.path}"
        if images.fingerprint and self.features.fingerprint and images.fingerprint != self.features.fingerprint:
            raise InputError(
                f"{ours} and {theirs} were made by different networks or preprocessing: {images.fingerprint}; "
                f"{self.features.fingerprint}: compute both with the same one"
            )
        if images.dimension != self.dimension or images.metric != self.metric:
            raise InputError(
                f"{ours} have {images.dimension:,} values each, compared by {images.metric} distance; {theirs} has "
                f"{self.dimension:,}, compared by {self.metric}"
            )
        return images.rows if images.vectors.dtype == np.uint8 else images.rows.astype(self._compared, copy=False)

    def holds(self, images: Images) -> bool:
        """Whether the index was made of exactly these rows [N, ...], in this order."""
        rows = as_rows(images)
        if tuple(rows.shape) != (len(self), self.dimension):
            return False
        for shard in self.shards:
            for start in range(0, shard.rows, _BLOCK):
                stop = min(start + _BLOCK, shard.rows)
                theirs = rows[shard.start + start : shard.start + stop].cpu().numpy()
                if not np.array_equal(theirs, shard.take(slice(start, stop))):
                    return False
        return True

    def query(self, images: Images, k: int = 2, *, progress: Progress = silent) -> Neighbors:
        """The k nearest rows of each query, exactly, ties to the lower index: shard after shard, merged.

        Args:
            images: [Q, d], as `rows_of` gives them; pixels also as images [Q, C, H, W].
            k: How many neighbors, 1 … N.
            progress: Called as `progress(stage, done, total)`.

        Raises:
            InputError: The queries differ in size or dtype, or k is out of range.
        """
        if not (isinstance(k, Integral) and 1 <= k <= len(self)):
            raise InputError(f"k must be between 1 and the number of training images, {len(self)}; got {k}")
        if self.dtype in (np.float16, np.float32):
            return self._vector_index.query(images, int(k), progress=progress)
        queries = as_rows(images, "query images")
        best: tuple[np.ndarray, np.ndarray] | None = None
        for number, shard in enumerate(self.shards):
            progress("searching shards", number, len(self.shards))
            index = TrainingIndex(shard.take(slice(None)), device=self._device)
            found = index.query(queries, min(int(k), shard.rows))
            squared, indices = found.squared_distances, found.indices + shard.start
            if best is not None:
                squared, indices = np.hstack([best[0], squared]), np.hstack([best[1], indices])
                order = np.lexsort((indices, squared), axis=1)[:, : int(k)]
                squared, indices = (np.take_along_axis(values, order, 1) for values in (squared, indices))
            best = squared, indices
        progress("searching shards", len(self.shards), len(self.shards))
        assert best is not None
        return Neighbors(best[1], best[0], self.dimension)

    @cached_property
    def _vector_index(self) -> VectorIndex:
        """The exact search over float vectors, with codes that are kept in the folder where that can be written to."""
        entries = [entry for entry in self._description["shards"] if entry["rows"]]
        return VectorIndex(
            [shard.vectors for shard in self.shards],
            metric="cosine" if self.metric == "cosine" else "euclidean",
            codes=self.path / CODES if os.access(self.path, os.W_OK) else None,
            names=[str(shard.folder / "vectors.npy") for shard in self.shards],
            keys=[entry["vectors"] for entry in entries],
        )

    def digests_of(self, images: np.ndarray) -> np.ndarray:
        """Digests as the index keeps them, of rows or images [n, …]."""
        return content_digests(images.reshape(len(images), -1))


def open_index(path: str | Path, *, device: str = "auto") -> IndexFolder:
    """The index that `diffmem index build` or `build_index` made in a folder, memory-mapped.

    Args:
        path: The folder.
        device: Where queries are computed: "cpu", "cuda" or "auto".

    Raises:
        InputError: There is no finished index, or its description is damaged. The shards are not read: `diffmem index
            verify` does that.

    Example:
        >>> import diffmem
        >>> index = diffmem.build_index(["builtin:digits"], "digits.index")
        >>> len(diffmem.open_index("digits.index")), index.vectors(0).shape
        (1797, (1797, 64))
    """
    path = Path(path).expanduser()
    description = read_index(path)
    with parsing(path / INDEX, "an index of this version", "run the same `diffmem index build` again"):
        return IndexFolder(path, description, device)
