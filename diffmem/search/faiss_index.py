"""Search through FAISS: for training sets so large that an approximate answer is the only affordable one, and for
its GPUs.

FAISS proposes candidates; they are re-ranked exactly, so every distance that comes back is exact. What an
approximate index can still do is miss a neighbor: a missed second neighbor makes a false alarm, a missed first
hides a copy. So each answer says how far away everything is at least that was not looked at (`Neighbors.unseen`), and
an audit searches a sample of its images exactly (`diffmem.memorization.verification`).
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.devices import SETTING
from diffmem.errors import InputError, MissingExtraError
from diffmem.inert.boundary import parsing
from diffmem.integrity import check_file, file_sha256
from diffmem.lazy import torch
from diffmem.ops.nearest import exact_squared_distances
from diffmem.progress import Progress, silent
from diffmem.search import stored
from diffmem.search.candidates import Candidates
from diffmem.search.neighbors import Neighbors
from diffmem.search.rows import Images, as_rows, fingerprint, same_images

BLOCK = 4096
MOST_CANDIDATES = 1024
FORMAT = "diffmem-faiss-index-3"
FAISS_FILE = "index.faiss"


@dataclass(frozen=True)
class FaissStats:
    """What the last query did.

    Attributes:
        factory: FAISS's factory string.
        device: "cpu" or "cuda".
        candidates: Proposals per image that were re-ranked.
        nprobe: Inverted lists visited, or None where there are none.
        completed: Images for which FAISS proposed fewer than k candidates and which were searched exactly.
        seconds: Seconds of the search, re-ranking included.
    """

    factory: str
    device: str
    candidates: int
    nprobe: int | None
    completed: int
    seconds: float


def faiss_factory(text: str, count: int) -> str:
    """FAISS's factory string for a name that people use.

    Args:
        text: "flat": every vector, exact up to float32. "ivf": inverted lists, about 4 √count of them, as FAISS's
            guidelines advise; "ivf1024": that many. "hnsw": a graph with 32 links per vector. Anything else is a
            factory string already.
        count: Training images.

    Example:
        >>> faiss_factory("ivf", 50_000), faiss_factory("hnsw", 50_000)
        ('IVF894,Flat', 'HNSW32,Flat')
    """
    name = text.strip()
    kind, number = name.lower()[:3], name[3:]
    if name.lower() == "flat":
        return "Flat"
    if name.lower() == "hnsw":
        return "HNSW32,Flat"
    if kind == "ivf" and (not number or number.isdigit()):
        # FAISS wants 39 training vectors for each list.
        return f"IVF{int(number) if number else max(1, min(round(4 * count**0.5), count // 39))},Flat"
    return name


class FaissIndex:
    """A FAISS index of the training images whose answers are re-ranked exactly.

    Args:
        images: [N, ...] uint8 or float32.
        factory: FAISS's factory string: "Flat", "IVF1024,Flat", "PCA128,IVF4096,PQ64", …
        float16: Store vectors in half precision (half the memory); for "Flat" and "IVF…,Flat".
        nprobe: Inverted lists visited per query; default a 32nd of them, at least 8, until `tune` chooses.
        candidates: Proposals per image that are re-ranked; default 8 k, at least 32, until `tune` chooses.
        device: "cpu", "cuda" (all GPUs, the vectors divided among them) or "auto" (GPUs where FAISS has them).
        progress: Called as `progress(stage, done, total)`.

    Raises:
        MissingExtraError: FAISS is not installed.
        InputError: The set or the factory string is one that FAISS cannot use.
    """

    def __init__(
        self,
        images: Images,
        factory: str = "Flat",
        *,
        float16: bool = False,
        nprobe: int | None = None,
        candidates: int | None = None,
        device: str = "auto",
        progress: Progress = silent,
    ):
        faiss = _faiss()
        self.rows = _checked_rows(images, "training images")
        self.fingerprint  # noqa: B018  taken now: the caller's array may be written to later
        self.device = _pick_device(faiss, device)
        self.factory = _with_float16(factory) if float16 and self.device == "cpu" else factory
        self.candidates = candidates
        self.tunable = nprobe is None and candidates is None
        self.stats: FaissStats | None = None
        try:
            index = faiss.index_factory(self.rows.shape[1], self.factory, faiss.METRIC_L2)
            if self.device == "cuda":
                index = _to_gpus(faiss, index, float16)
            if not index.is_trained:
                index.train(_floats(self.rows[_sample(len(self.rows), _training_points(faiss, index))]))
            index_on_cpu = faiss.index_gpu_to_cpu(index) if self.device == "cuda" else index
            self._bounds = Candidates(faiss, index_on_cpu)
            for start in range(0, len(self.rows), BLOCK):
                progress("building the FAISS index", start, len(self.rows))
                block = _floats(self.rows[start : start + BLOCK])
                index.add(block)
                self._bounds.note(block)
        except RuntimeError as error:
            raise InputError(
                f"FAISS cannot build {self.factory!r} for {len(self.rows):,} images: {_reason(error)}"
            ) from error
        progress("building the FAISS index", len(self.rows), len(self.rows))
        self._index = index
        self.nprobe = self._set_nprobe(faiss, nprobe)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lists(self) -> int | None:
        """How many inverted lists there are; None: none."""
        return self._bounds.lists

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the images that the index was made of, in their order."""
        return fingerprint(self.rows)

    def holds(self, images: Images) -> bool:
        """Whether the index was made of exactly these images [N, ...], in this order."""
        return same_images(images, self.rows, self.fingerprint)

    def query(self, images: Images, k: int = 2, *, progress: Progress = silent) -> Neighbors:
        """The k nearest training images that FAISS finds for each image, with exact distances, nearest first.

        Raises InputError for images of another size or dtype, and for k > N.
        """
        queries = _checked_rows(images, "query images")
        if queries.shape[1] != self.rows.shape[1] or queries.dtype != self.rows.dtype:
            raise InputError(
                f"query images are {queries.shape[1]} values of {queries.dtype}, training images "
                f"{self.rows.shape[1]} of {self.rows.dtype}"
            )
        if not (isinstance(k, Integral) and 1 <= k <= len(self)):
            raise InputError(f"k must be between 1 and the number of training images, {len(self)}; got {k}")
        width = min(len(self), max(k, self.candidates or max(8 * k, 32)))
        started = time.perf_counter()
        squared, indices, unseen, completed = [], [], [], 0
        for start in range(0, len(queries), BLOCK):
            progress("searching with FAISS", start, len(queries))
            block = queries[start : start + BLOCK]
            floats = _floats(block)
            coded, proposed = self._index.search(floats, width)
            bound = self._bounds.unseen(floats, proposed, coded, self.nprobe, len(self))
            block_squared, block_indices, short = self._rerank(block, torch.from_numpy(proposed), k)
            bound[short.numpy()] = np.inf
            squared.append(block_squared)
            indices.append(block_indices)
            unseen.append(bound)
            completed += len(short)
        progress("searching with FAISS", len(queries), len(queries))
        seconds = time.perf_counter() - started
        integer = self.rows.dtype == torch.uint8
        empty = torch.empty(0, k, dtype=torch.int64 if integer else torch.float64)
        answer = Neighbors(
            torch.cat([*indices, empty.long()]).numpy(),
            torch.cat([*squared, empty]).numpy(),
            queries.shape[1],
            unseen=np.concatenate([*unseen, np.empty(0)]),
        )
        self.stats = FaissStats(self.factory, self.device, width, self.nprobe, completed, seconds)
        return answer

    def tune(self, images: Images, recall: float, *, progress: Progress = silent) -> None:
        """Chooses the least `nprobe` and `candidates` with which the nearest and the second nearest training image of
        these images are among the candidates for at least the share `recall` of them each, as exact search says; or the
        largest there are. Not where they were given.

        Args:
            images: [Q, ...], such as those that come: a hundred will do.
            recall: From 0 to 1.
            progress: Called as `progress(stage, done, total)`.
        """
        if not self.tunable or not len(images):
            return
        self.tunable = False
        queries = _checked_rows(images, "query images")
        progress("choosing how widely FAISS searches", 0, 1)
        from diffmem.ops.nearest import nearest

        truth = nearest(queries, self.rows, min(2, len(self)))[1].numpy()
        floats, most = _floats(queries), min(len(self), MOST_CANDIDATES)
        probes: int | None = None if self.nprobe is None else 1
        while True:
            self.nprobe = self._set_nprobe(_faiss(), probes)
            _, proposed = self._index.search(floats, most)
            hits = proposed[:, :, None] == truth[:, None, :]
            places = np.where(hits.any(axis=1), hits.argmax(axis=1), most)
            lists = self._bounds.lists
            if (places < most).mean(axis=0).min() >= recall or probes is None or lists is None or probes >= lists:
                break
            probes *= 2
        needed = np.sort(places, axis=0)[min(len(places) - 1, int(np.ceil(recall * len(places))) - 1)].max()
        self.candidates = int(min(most, max(32, 2 * (needed + 1))))
        progress("choosing how widely FAISS searches", 1, 1)

    def save(self, folder: str | Path) -> None:
        """Write the index, training images included, to `folder`: beside it first, renamed when complete.

        Raises InputError where `folder` exists and is not an index.
        """
        faiss = _faiss()
        on_cpu = faiss.index_gpu_to_cpu(self._index) if self.device == "cuda" else self._index
        description: dict[str, Any] = {
            "format": FORMAT,
            "factory": self.factory,
            "nprobe": self.nprobe,
            "candidates": self.candidates,
            "tunable": self.tunable,
            "fingerprint": self.fingerprint,
        }
        with stored.new_index_folder(Path(folder), description) as beside:
            np.save(beside / "images.npy", np.ascontiguousarray(self.rows.numpy()))
            faiss.write_index(on_cpu, str(beside / FAISS_FILE))
            description["files"] = {FAISS_FILE: file_sha256(beside / FAISS_FILE)}
            description["bounds"] = {"error": self._bounds.error, "largest": self._bounds.largest}

    @staticmethod
    def is_saved_in(folder: str | Path) -> bool:
        """Whether `folder` holds what `save` writes (rather than an exact index)."""
        return (Path(folder) / FAISS_FILE).is_file()

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "auto") -> FaissIndex:
        """The index that `save` wrote, its images memory-mapped.

        Raises InputError where `folder` holds no complete index, or images that do not match their fingerprint.
        """
        faiss = _faiss()
        folder = Path(folder)
        with parsing(folder, "a usable index", "rebuild it"):
            description = stored.read_description(folder, FORMAT)
            images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
            stored.check_array(images, "images", (None, None), images.dtype)
            rows = _checked_rows(images, "training images")
            if fingerprint(rows) != description["fingerprint"]:
                raise InputError(f"{folder}: the images do not match their fingerprint (damaged?); rebuild it")
            check_file(folder / FAISS_FILE, description["files"][FAISS_FILE], "rebuild the index")
            index = faiss.read_index(str(folder / FAISS_FILE))
            if (index.ntotal, index.d) != tuple(rows.shape):
                raise ValueError(f"FAISS's index holds {index.ntotal} rows of {index.d} values")
            self = cls.__new__(cls)
            self.rows, self.stats, self.factory = rows, None, description["factory"]
            self.candidates, probes = description["candidates"], description["nprobe"]
            self.tunable = bool(description["tunable"])
            self.fingerprint = description["fingerprint"]
            self._bounds = Candidates(faiss, index, **description["bounds"])
        self.device = _pick_device(faiss, device)
        self._index = _to_gpus(faiss, index, False) if self.device == "cuda" else index
        self.nprobe = self._set_nprobe(faiss, probes)
        return self

    def _rerank(
        self, queries: torch.Tensor, proposed: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The k best of the proposed indices [q, width] (−1: none) by exact (distance, index), and the rows for which
        there were fewer than k, which were searched exactly."""
        valid = proposed >= 0
        rows, columns = valid.nonzero(as_tuple=True)
        exact = exact_squared_distances(queries, self.rows, rows, proposed[rows, columns])
        largest = torch.iinfo(torch.int64).max if exact.dtype == torch.int64 else torch.inf
        squared = torch.full(proposed.shape, largest, dtype=exact.dtype)
        squared[rows, columns] = exact
        order = proposed.argsort(dim=1, stable=True)
        order = order.gather(1, squared.gather(1, order).argsort(dim=1, stable=True))[:, :k]
        squared, indices = squared.gather(1, order), proposed.gather(1, order)
        short = (valid.sum(dim=1) < k).nonzero().flatten()
        if len(short):
            from diffmem.ops.nearest import nearest

            squared[short], indices[short] = nearest(queries[short], self.rows, k)
        return squared, indices, short

    def _set_nprobe(self, faiss: Any, nprobe: int | None) -> int | None:
        if "IVF" not in self.factory:
            return None
        lists = int(self.factory.split("IVF")[1].split(",")[0].split("_")[0])
        nprobe = nprobe or max(8, lists // 32)
        space = faiss.GpuParameterSpace() if self.device == "cuda" else faiss.ParameterSpace()
        space.set_index_parameter(self._index, "nprobe", min(nprobe, lists))
        return min(nprobe, lists)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("faiss-cpu (or, on GPUs, faiss-gpu)", "faiss", 'method="faiss"') from error
    return faiss


def _checked_rows(images: Images, what: str) -> torch.Tensor:
    rows = as_rows(images, what)
    if rows.dtype == torch.float64:
        raise InputError(f"{what} are float64; FAISS works in float32: convert them first")
    return rows


def _pick_device(faiss: Any, device: str) -> str:
    gpus = faiss.get_num_gpus()
    if device == "auto":
        return "cuda" if gpus and not os.environ.get(SETTING, "").startswith("cpu") else "cpu"
    if device.startswith("cuda") and not gpus:
        raise InputError(
            'this FAISS has no GPU support or sees no GPU: device="cpu", or install a FAISS with GPU '
            "support instead (pip uninstall faiss-cpu; pip install 'diffmem[gpu]')"
        )
    if device != "cpu" and not device.startswith("cuda"):
        raise InputError(f'device must be "cpu", "cuda" or "auto", got {device!r}')
    return device.split(":")[0]


def _to_gpus(faiss: Any, index: Any, float16: bool) -> Any:
    """On one GPU as it is; on several with the vectors divided among them, so that the largest sets fit."""
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    options.useFloat16 = float16
    return faiss.index_cpu_to_all_gpus(index, co=options)


def _with_float16(factory: str) -> str:
    """The factory string with its full-precision vectors stored in half precision."""
    head, _, last = factory.rpartition(",")
    if last != "Flat":
        raise InputError(f"float16 storage needs a factory string that ends in Flat, got {factory!r}")
    return f"{head},SQfp16" if head else "SQfp16"


def _floats(rows: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(rows.to(torch.float32).numpy())


def _sample(total: int, size: int) -> np.ndarray:
    """`size` evenly spaced indices, all of them where there are fewer."""
    size = min(size, total)
    return np.arange(size) * total // size if size else np.empty(0, np.int64)


def _training_points(faiss: Any, index: Any) -> int:
    """Vectors that FAISS's own training makes use of: 256 for each of the larger of its lists and codes."""
    ivf = faiss.try_extract_index_ivf(index)
    return 256 * max(256, ivf.nlist if ivf is not None else 0)


def _reason(error: Exception) -> str:
    """The last line of FAISS's message, without its source locations."""
    line = str(error).strip().splitlines()[-1]
    return re.sub(r"^Error in .* at \S+:\d+: ", "", line).split("Error: ")[-1][:200]
