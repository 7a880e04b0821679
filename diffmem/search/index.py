"""`TrainingIndex`: a training set made ready to be searched."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.data import ImageSet
from diffmem.devices import is_cpu, pick_device
from diffmem.errors import InputError
from diffmem.lazy import torch
from diffmem.logs import logger
from diffmem.ops.nearest import dtype_name, search_dense
from diffmem.ops.registry import Backend, Op, native_unavailable, register
from diffmem.progress import Progress, silent
from diffmem.search import filtered, stored
from diffmem.search.faiss_index import FaissIndex, FaissStats
from diffmem.search.filtered import FilteredRows
from diffmem.search.neighbors import Neighbors
from diffmem.search.rows import Images, as_rows, byte_rows, check_finite, fingerprint, same_images

METHODS = ("auto", "filtered", "dense", "faiss", "torch", "reference")
SMALL = 1024  # training sets below this are searched densely by "auto": a code would not pay for itself
PROBE = 64  # queries of a block that are tried first when it is open whether the bounds prune
ALLOWANCE = 0.25  # share of pairs refined beyond which "auto" gives a block up: refining costs about 3 dense pairs
NEVER = math.inf  # an allowance at which no block is given up, however many of its pairs are refined
FILTERED_PAIRS = 1 << 31  # pairs per call of the core, between which progress is told and Ctrl-C is heeded
DENSE_PRODUCTS = 1 << 39  # multiplications per call, for the same reason
SMALL_PROBLEM = 1 << 27  # multiplications that "auto" does not try to avoid
QUERY_BLOCK = 4096
_log = logger(__name__)


@dataclass(frozen=True)
class QueryStats:
    """What the last query did.

    Attributes:
        method: "filtered", "dense", "filtered and dense" (auto switched on the way), "gpu", "torch" or "reference".
        queries: Q, query images.
        training: N, training images; `pairs` is the product of both.
        bounded: Pairs put to the coarse bound.
        fine: Those that passed it and were put to the finer ones.
        refined: Those whose distance was computed.
        dense_queries: Queries answered by the dense search.
        seconds: Wall time by phase.
    """

    method: str
    queries: int
    training: int
    bounded: int = 0
    fine: int = 0
    refined: int = 0
    dense_queries: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def pairs(self) -> int:
        return self.queries * self.training


class TrainingIndex:
    """The training images, searchable for the exact nearest of any query images.

    Args:
        images: [N, ...] uint8, float32 or float64; arrays on disk stay there.
        method: "filtered" (bounds from principal components, exact refinement), "dense" (every product), "torch" and
            "reference" (`diffmem.ops.nearest`), or "auto": filtered where bounds prune and dense where they do not,
            decided by measuring while it searches; on a GPU the fastest of the backends of `diffmem.search.gpu`, by
            measurement at the first query. All these give the same exact answer. "faiss" may miss neighbors
            (`FaissIndex`).
        components: How many principal components the finest bound uses (rounded up to a multiple of 60); default 180.
        factory: FAISS's factory string, for "faiss"; for its other options make a `FaissIndex` and pass that around.
        device: "cpu", "cuda" or "auto" (a GPU where there is one).
        code_file: For an ImageSet that nobody writes to, a file that keeps the code of the images, which is used where
            it is that of these images and is written where there is none; None: it is computed.
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: An empty set, another dtype, values that are not finite, or a method that cannot be used here.

    Example:
        >>> images = np.array([[0, 0], [3, 4], [9, 9]], np.uint8)
        >>> found = TrainingIndex(images).query(np.array([[0, 1]], np.uint8))
        >>> found.indices.tolist(), found.squared_distances.tolist()
        ([[0, 1]], [[1, 18]])
    """

    method: str
    filtered: filtered.FilteredRows | None
    _rows: np.ndarray | torch.Tensor  # an array where the core alone searches it
    _faiss: FaissIndex | None

    def __init__(
        self,
        images: Images,
        *,
        method: str = "auto",
        components: int | None = None,
        factory: str = "Flat",
        device: str = "auto",
        code_file: Path | None = None,
        progress: Progress = silent,
    ):
        rows: Any = None
        if method in ("auto", "filtered", "dense") and native_unavailable("cpu") is None and is_cpu(device):
            rows = byte_rows(images)
        rows = as_rows(images, "training images") if rows is None else rows
        if math.prod(rows.shape) == 0:
            raise InputError("the training set is empty")
        if components is not None and components < 1:
            raise InputError(f"components must be at least 1, got {components}")
        self._prepare(rows, method, device)
        self.filtered = None
        if self.method == "faiss":
            self._faiss = FaissIndex(rows, factory, device=device, progress=progress)
        if code_file is not None and isinstance(images, ImageSet):
            self.fingerprint = images.pixel_fingerprint
        self.fingerprint  # noqa: B018  taken now: the caller's array may be written to later
        if self.method == "filtered" or (self.method == "auto" and len(rows) >= SMALL):
            if code_file is None or components is not None:
                self.filtered = filtered.build(self._rows, components, progress)
            else:
                self.filtered = self._kept_code(code_file, progress)

    def _kept_code(self, file: Path, progress: Progress) -> FilteredRows:
        """The code in the file, or a new one, which is then kept there if that can be done."""
        if file.exists():
            try:
                return stored.load_code(file, self._rows, self.fingerprint)
            except InputError as error:
                _log.info("%s: it is made again", error)
        code = filtered.build(self._rows, None, progress)
        with suppress(InputError):
            stored.save_code(file, code, self.fingerprint)
        return code

    @property
    def rows(self) -> torch.Tensor:
        """[N, d], the training images."""
        return as_rows(self._rows) if isinstance(self._rows, np.ndarray) else self._rows

    @property
    def device(self) -> torch.device:
        """Where the training images are searched."""
        return torch.device("cpu") if self._device is None else self._device

    @property
    def device_name(self) -> str:
        """The same as a string."""
        return "cpu" if self._device is None else str(self._device)

    def _prepare(self, rows: Any, method: str, device: str) -> None:
        if method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
        # Arrays are for the core alone, which needs no PyTorch.
        self._device = None if isinstance(rows, np.ndarray) else pick_device(device)
        self._faiss = None
        # Rows whose values are not adjacent are copied: the core reads whole rows.
        adjacent = isinstance(rows, np.ndarray) or rows.stride(1) == 1 or rows.shape[1] == 1
        self._rows = rows if adjacent else rows.contiguous()
        kind = "cpu" if self._device is None else self._device.type
        if method == "auto":
            selected = OP.select(kind, None, rows).name
            method = selected if selected != "filtered" else "auto"  # which goes over to "dense" where that is faster
        elif method != "faiss" and (reason := OP[method].supports(kind, rows)) is not None:
            raise InputError(f"method {method!r} cannot be used here: {reason}")
        self.gpu = None
        if method == "gpu":
            from diffmem.search.gpu import GpuRows

            self.gpu = GpuRows(self.rows, self.device)
        if method not in ("torch", "reference"):  # these look for themselves
            check_finite(self._rows, "training images")
        self.method = method
        self.stats: QueryStats | FaissStats = QueryStats(method, 0, len(rows))
        self._dense_seconds_per_pair: float | None = None

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the images that the index was made of, in their order."""
        return fingerprint(self._rows) if self._faiss is None else self._faiss.fingerprint

    def holds(self, images: Images) -> bool:
        """Whether the index was made of exactly these images [N, ...], in this order."""
        return same_images(images, self.rows, self.fingerprint)

    @property
    def dimension(self) -> int:
        """d, the number of values of one image."""
        return self._rows.shape[1]

    def query(self, images: Images, k: int = 2, *, progress: Progress = silent) -> Neighbors:
        """The k nearest training images of each query image, exactly, ties to the lower index.

        Args:
            images: [Q, ...], of the training images' size and dtype.
            k: How many neighbors, 1 … N.
            progress: Called as `progress(stage, done, total)`.

        Returns:
            Indices and squared distances, [Q, k] each; `stats` then says what the search did.

        Raises:
            InputError: The images differ from the training images in size or dtype, or k is out of range.
        """
        if self._faiss is not None:
            answer = self._faiss.query(images, k, progress=progress)
            assert self._faiss.stats is not None
            self.stats = self._faiss.stats
            return answer
        queries: Any = byte_rows(images) if isinstance(self._rows, np.ndarray) else None
        if queries is None:
            queries = as_rows(images, "query images")
        if queries.shape[1] != self.dimension or dtype_name(queries) != dtype_name(self._rows):
            raise InputError(
                f"query images must be like the training images, {self.dimension} values of torch."
                f"{dtype_name(self._rows)}; got {queries.shape[1]} values of torch.{dtype_name(queries)}"
            )
        if isinstance(self._rows, np.ndarray) and not isinstance(queries, np.ndarray):
            queries = byte_rows(queries.detach().cpu().numpy())
        if not (isinstance(k, Integral) and 1 <= k <= len(self)):
            raise InputError(f"k must be between 1 and the number of training images, {len(self)}; got {k}")
        search = _Search(self, k)
        squared = np.empty((len(queries), k), np.int64 if dtype_name(queries) == "uint8" else np.float64)
        indices = np.empty((len(queries), k), np.int64)
        start = 0
        progress("searching nearest training images", 0, len(queries))
        while start < len(queries):
            end = min(len(queries), start + search.block())
            squared[start:end], indices[start:end] = search(queries[start:end])
            start = end
            progress("searching nearest training images", end, len(queries))
        self.stats = search.stats(len(queries))
        return Neighbors(indices, squared, self.dimension)

    def save(self, folder: str | Path) -> None:
        """Writes the index, training images included, to a folder: beside it first, renamed when complete.

        Args:
            folder: Where to; an index that is there is replaced.

        Raises:
            InputError: `folder` exists and is not an index.
        """
        if self._faiss is not None:
            self._faiss.save(folder)
        else:
            stored.save(Path(folder), "auto" if self.gpu is not None else self.method, self.rows, self.filtered)

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "auto") -> TrainingIndex:
        """The index that `save` wrote, memory-mapped.

        Args:
            folder: Folder of the index.
            device: "cpu", "cuda" or "auto".

        Raises:
            InputError: `folder` holds no index, one of another format, or one whose contents do not match their
                fingerprint.
        """
        index = cls.__new__(cls)
        if FaissIndex.is_saved_in(folder):
            faiss = FaissIndex.load(folder, device=device)
            index._prepare(faiss.rows, "faiss", "cpu")
            index._faiss, index.filtered = faiss, None
            return index
        method, rows, code = stored.load(Path(folder))
        index._prepare(rows, method, device)
        index.filtered = code if index.method in ("auto", "filtered") else None
        return index


class _Search:
    """One query: searches block after block and keeps count."""

    def __init__(self, index: TrainingIndex, k: int) -> None:
        self.index = index
        self.k = k
        # Under "auto" it is open at first whether the bounds prune; how a block goes decides it for the next.
        self.trusted = index.method == "filtered"
        self.bounded = self.fine = self.refined = self.filtered_queries = self.dense_queries = 0
        self.seconds: dict[str, float] = {}

    def block(self) -> int:
        """Queries of the next block."""
        n, d = self.index._rows.shape
        if self.index.gpu is not None:
            return self.index.gpu.query_block()
        if self.index.filtered is None:
            return int(np.clip(DENSE_PRODUCTS // (n * d), 256, QUERY_BLOCK))
        return int(np.clip(FILTERED_PAIRS // n, 256, QUERY_BLOCK))

    def __call__(self, queries: Any) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(queries, np.ndarray):
            queries = queries.to(self.index.device)
        if self.index.gpu is not None:
            check_finite(queries, "query images")
            start = time.perf_counter()
            squared, indices = self.index.gpu(queries, self.k)
            answer = squared.cpu().numpy(), indices.cpu().numpy()
            self._count(f"gpu: {self.index.gpu.backend}", time.perf_counter() - start)
            return answer
        if self.index.method in ("torch", "reference"):
            return self._op(queries, self.index.method)
        if not isinstance(queries, np.ndarray) and queries.stride(1) != 1:
            queries = queries.contiguous()
        check_finite(queries, "query images")
        if self.index.filtered is None:
            return self._dense(queries)
        if self.index.method == "filtered":
            certain = self._filtered(queries, NEVER)
            assert certain is not None  # it never gives up
            return certain
        if len(queries) * math.prod(self.index._rows.shape) <= SMALL_PROBLEM:
            return self._dense(queries)
        if not self.trusted and len(queries) > 4 * PROBE:
            probe = queries[np.linspace(0, len(queries) - 1, PROBE).astype(np.int64)]
            before = self.filtered_queries
            self.trusted = self._filtered(probe, ALLOWANCE) is not None
            self.filtered_queries = before
        if not self.trusted and len(queries) > 4 * PROBE:
            return self._dense(queries)
        start = time.perf_counter()
        found = self._filtered(queries, ALLOWANCE)
        self.trusted = found is not None
        if found is None:
            return self._dense(queries)
        if len(queries) > 4 * PROBE:
            per_pair = (time.perf_counter() - start) / (len(queries) * len(self.index))
            self.trusted = per_pair < self._dense_seconds_per_pair(queries)
        return found

    def stats(self, queries: int) -> QueryStats:
        used = [
            name
            for name, count in (("filtered", self.filtered_queries), ("dense", self.dense_queries))
            if count > 0 or self.index.method == name
        ]
        method = " and ".join(used) if used else self.index.method
        return QueryStats(
            method,
            queries,
            len(self.index),
            self.bounded,
            self.fine,
            self.refined,
            self.dense_queries,
            {phase: round(seconds, 6) for phase, seconds in self.seconds.items()},
        )

    def _count(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def _op(self, queries: torch.Tensor, impl: str) -> tuple[np.ndarray, np.ndarray]:
        from diffmem.ops.nearest import nearest

        start = time.perf_counter()
        squared, indices = nearest(queries, self.index.rows, self.k, impl=impl)
        answer = squared.cpu().numpy(), indices.cpu().numpy()
        self._count(impl, time.perf_counter() - start)
        return answer

    def _filtered(self, queries: Any, allowance: float) -> tuple[np.ndarray, np.ndarray] | None:
        """None where the bounds prune too little."""
        index = self.index.filtered
        assert index is not None
        near = None if dtype_name(queries) == "uint8" else index.within_reach(queries)
        if near is not None and not bool(near.all()):
            # Farther out than the code reaches: no training image is near, and there are few such queries.
            inside, outside = self._filtered(queries[near], allowance), self._dense(queries[~near])
            if inside is None:
                return None
            squared, indices = (np.empty((len(queries), self.k), part.dtype) for part in outside)
            for rows, (some_squared, some_indices) in ((near.numpy(), inside), (~near.numpy(), outside)):
                squared[rows], indices[rows] = some_squared, some_indices
            return squared, indices
        start = time.perf_counter()
        code = index.encode(queries)
        self._count("encode", time.perf_counter() - start)
        squared, indices, work = index.search(queries, code, self.k, allowance)
        self.bounded += work.bounded
        self.fine += work.fine
        self.refined += work.refined
        self._count("seed", work.seed_seconds)
        self._count("scan", work.scan_seconds)
        if work.gave_up:
            return None
        self.filtered_queries += len(queries)
        return squared, indices

    def _dense(self, queries: np.ndarray | torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        start = time.perf_counter()
        squared, indices = search_dense(queries, self.index._rows, self.k)
        self._count("dense", time.perf_counter() - start)
        self.dense_queries += len(queries)
        return squared, indices

    def _dense_seconds_per_pair(self, queries: np.ndarray | torch.Tensor) -> float:
        """Measured once, on a part small beside the query."""
        if self.index._dense_seconds_per_pair is None:
            rows, some = self.index._rows[:2048], queries[:96]
            start = time.perf_counter()
            search_dense(some, rows, 1)
            self.index._dense_seconds_per_pair = (time.perf_counter() - start) / (len(rows) * len(some))
        return self.index._dense_seconds_per_pair


def _on_gpu(device_type: str) -> str | None:
    return None if device_type == "cuda" else "searches on a GPU"


def _on_cpu(device_type: str) -> str | None:
    return native_unavailable("cpu") if device_type == "cpu" else f"it searches on the CPU, not on {device_type}"


def _faiss_missing(device_type: str) -> str | None:
    try:
        import faiss  # noqa: F401
    except ImportError:
        return "FAISS is not installed (pip install 'diffmem[faiss]')"
    return None


def _takes(*dtypes: str) -> Callable[[np.ndarray | torch.Tensor], str | None]:
    def unfit(rows: np.ndarray | torch.Tensor) -> str | None:
        return None if dtype_name(rows) in dtypes else f"it does not take torch.{dtype_name(rows)} rows"

    return unfit


def _off_the_cpu(rows: np.ndarray | torch.Tensor) -> str | None:
    on_cpu = isinstance(rows, np.ndarray) or rows.device.type == "cpu"
    return None if on_cpu else f"the training images are on {rows.device}"


# What `method="auto"` selects, and `diffmem info` explains: the first that supports the device and the training rows.
OP = register(
    Op(
        "search",
        (
            Backend(
                "gpu",
                "exact, by the fastest backend of gpu search",
                TrainingIndex,
                _on_gpu,
                _takes("uint8", "float32"),
            ),
            Backend(
                "filtered",
                f"exact, bounds from principal components; dense below {SMALL:,} images and where bounds do not prune",
                partial(TrainingIndex, method="filtered"),
                _on_cpu,
                _off_the_cpu,
            ),
            Backend(
                "dense",
                "exact, integer products of all pairs",
                partial(TrainingIndex, method="dense"),
                _on_cpu,
                _off_the_cpu,
            ),
            Backend("torch", "exact, op nearest by torch", partial(TrainingIndex, method="torch")),
            Backend("reference", "exact, every difference", partial(TrainingIndex, method="reference")),
            Backend(
                "faiss",
                "approximate, FAISS proposes candidates, exact distances decide",
                partial(TrainingIndex, method="faiss"),
                _faiss_missing,
                _takes("uint8", "float32"),
            ),
        ),
        cases={
            "images": (np.empty((0, 1), np.uint8),),
            "float32 vectors": (np.empty((0, 1), np.float32),),
        },
    )
)
