"""Codes by which candidates are found: one quantizer, trained on a sample of all shards, and each shard's codes.

FAISS (extra `faiss`) trains it and makes the codes; a code is the number of the inverted list, and what is stored
of the vector in there. The codes of a shard depend on nothing but the shard and the quantizer, so that they are made
wherever there is a worker, and any shards can be loaded together.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.atomic_io import atomic_file, atomic_write
from diffmem.errors import InputError, MissingExtraError
from diffmem.indexes.folder import IndexFolder, Shard
from diffmem.indexes.planning import size_text
from diffmem.indexes.shards import address_of
from diffmem.inert.boundary import one_line, parsing
from diffmem.integrity import check_file, file_sha256, read_sealed, sealed
from diffmem.search import faiss_factory
from diffmem.search.candidates import Candidates
from diffmem.system import usable_cores

QUANTIZERS = "quantizers"
FILE, DESCRIPTION = "quantizer.faiss", "quantizer.json"
AUTO = "auto"
FLAT_BYTES = 16e9  # up to which "auto" leaves it to the exact search: minutes for 10,000 images
GROWTH = 4  # times the rows that a quantizer was trained for, beyond which a note says so
CODE_BYTES = 64  # of a product quantizer that is chosen here
SAMPLE_BYTES = 2e9
SEED = 0
_BLOCK = 4096
_ADVICE = "run `diffmem index verify`, which says how to repair it"


def chosen_factory(text: str, rows: int, dimension: int, size: int) -> tuple[str | None, str]:
    """FAISS's factory string for what is asked for, or None for no codes; and why, in words.

    Args:
        text: "flat", "auto", "ivf", "ivf1024" or a factory string with inverted lists.
        rows: N.
        dimension: d.
        size: Bytes of all vectors.
    """
    name = text.strip()
    if name.lower() == "flat":
        return None, "flat, as asked for: no codes, the search is exact"
    if name.lower() == AUTO:
        if size <= FLAT_BYTES:
            return (
                None,
                f"flat: {size_text(size)} of vectors are searched exactly (codes from {size_text(FLAT_BYTES)} on)",
            )
        if not has_faiss():
            return None, (
                f"flat: codes would find candidates in {size_text(size)} of vectors faster, but are made by FAISS: "
                "pip install 'diffmem[faiss]', then run the same command again; what is finished is kept"
            )
        name = "ivf"
    if re.fullmatch(r"ivf[0-9]*", name.lower()):
        lists = faiss_factory(name, rows).partition(",")[0]
        pieces = max(m for m in range(1, CODE_BYTES + 1) if dimension % m == 0)
        name = f"{lists},PQ{pieces}" if rows >= 256 * 39 and pieces >= CODE_BYTES // 4 else f"{lists},SQ8"
    if not re.search(r"\bIVF[0-9]+", name):
        raise InputError(
            f"index={text!r}: codes of shards need inverted lists: flat, auto, ivf, ivf1024, or a factory string of "
            "FAISS such as IVF4096,PQ64"
        )
    why = "are too many to search all of them each time" if text.strip().lower() == AUTO else "get codes, as asked for"
    return name, f"{name}: {size_text(size)} of vectors {why}"


def check_choice(text: str | None) -> None:
    """Raises what `chosen_factory` and FAISS's absence would raise once all shards are made."""
    if text is not None and text.strip().lower() != AUTO and chosen_factory(text, 10**6, 512, 0)[0] is not None:
        _faiss()


def keeps(text: str | None, factory: str) -> bool:
    """Whether an index that has codes by this factory string may keep them where `text` is asked for."""
    asked = (text or AUTO).strip().lower()
    return asked in (AUTO, "ivf", factory.lower()) or bool(
        re.fullmatch(r"ivf[0-9]+", asked) and factory.lower().startswith(f"{asked},")
    )


def has_faiss() -> bool:
    """Whether FAISS is installed."""
    return importlib.util.find_spec("faiss") is not None


def plan_quantizer(factory: str, shards: Sequence[Shard], dimension: int) -> dict[str, Any]:
    """What decides a quantizer, and its name, `id`."""
    about = {"factory": factory, "dimension": dimension, "seed": SEED, "shards": [shard.address for shard in shards]}
    return {
        "id": address_of({"quantizer": about})[:16],
        "factory": factory,
        "rows": sum(shard.rows for shard in shards),
    }


def train(folder: Path, plan: dict[str, Any], index: IndexFolder, memory: int | None) -> dict[str, Any]:
    """Trains a quantizer on a sample of the rows of all shards, unless it is there; returns its description.

    Raises:
        InputError: FAISS cannot train it.
    """
    home = folder / QUANTIZERS / plan["id"]
    if (home / DESCRIPTION).is_file():
        return read_quantizer(folder, plan["id"])
    faiss = _faiss()
    home.mkdir(parents=True, exist_ok=True)
    try:
        made = faiss.index_factory(index.dimension, plan["factory"], faiss.METRIC_L2)
        inverted = faiss.try_extract_index_ivf(made)
        wanted = 256 * max(256, inverted.nlist)
        room = int((memory or SAMPLE_BYTES) // (8 * index.dimension))
        rows = sample_rows(len(index), min(wanted, max(room, inverted.nlist)))
        made.train(np.ascontiguousarray(index.take(rows), np.float32))
    except RuntimeError as error:
        raise InputError(
            f"FAISS cannot train {plan['factory']!r} for {len(index):,} rows: {one_line(error)[-160:]}"
        ) from None
    with atomic_file(home / FILE) as partial:
        faiss.write_index(made, str(partial))
    description = {
        **plan,
        "dimension": index.dimension,
        "trained_on": len(rows),
        "seed": SEED,
        "code_bytes": int(made.sa_code_size()),
        "lists": int(inverted.nlist),
        "sha256_of_file": file_sha256(home / FILE),
    }
    atomic_write(home / DESCRIPTION, json.dumps(sealed(description), indent=1) + "\n")
    return description


def sample_rows(total: int, size: int) -> np.ndarray:
    """int64, ascending: one row drawn from each of `size` equal stretches of all rows, by a fixed seed."""
    if size >= total:
        return np.arange(total)
    edges = np.arange(size + 1) * total // size
    return edges[:-1] + np.random.default_rng(SEED).integers(0, np.diff(edges))


def read_quantizer(folder: Path, name: str) -> dict[str, Any]:
    """The description of a quantizer; raises InputError where it is damaged."""
    return read_sealed(folder / QUANTIZERS / name / DESCRIPTION, _ADVICE)


@dataclass(frozen=True)
class CodeJob:
    """The codes of one shard to make.

    Attributes:
        folder: Of the index.
        quantizer: Its id.
        shard: Of the index.
    """

    folder: str
    quantizer: str
    shard: Shard

    @property
    def address(self) -> str:
        return self.shard.address

    @property
    def where(self) -> str:
        return f"codes of shard {self.shard.address}"

    @property
    def target(self) -> Path:
        return Path(self.folder) / QUANTIZERS / self.quantizer / f"{self.shard.address}.npy"


def make_codes(job: CodeJob, device: str = "cpu") -> None:
    """Makes the codes of a shard, unless they are there."""
    if job.target.is_file():
        return
    quantizer = _loaded(str(Path(job.folder) / QUANTIZERS / job.quantizer / FILE))
    codes = np.empty((job.shard.rows, quantizer.sa_code_size()), np.uint8)
    bounds = Candidates(_faiss(), quantizer)
    for start in range(0, job.shard.rows, _BLOCK):
        rows = slice(start, min(start + _BLOCK, job.shard.rows))
        vectors = np.ascontiguousarray(job.shard.take(rows), np.float32)
        codes[rows] = quantizer.sa_encode(vectors)
        bounds.note(vectors, codes[rows])
    document = sealed({"error": bounds.error, "largest": bounds.largest})
    atomic_write(job.target.with_suffix(".json"), json.dumps(document) + "\n")
    with atomic_file(job.target) as partial, open(partial, "xb") as file:
        np.save(file, codes)


@lru_cache(maxsize=2)
def _loaded(path: str) -> Any:
    with parsing(path, "a quantizer of FAISS", _ADVICE):
        return _faiss().read_index(path)


class Quantizer:
    """The codes of an index, from which candidates are proposed.

    Args:
        index: The index, which has a quantizer.

    Attributes:
        factory: FAISS's factory string.
        lists: How many inverted lists there are.
        code_bytes: Bytes of a code: the number of the list, and the vector in it.
        trained_on: Rows that it was trained on.
    """

    def __init__(self, index: IndexFolder) -> None:
        about = index.description["quantizer"]
        self._index, self._about = index, about
        self._home = index.path / QUANTIZERS / about["id"]
        self.factory: str = about["factory"]
        self.lists: int = about["lists"]
        self.code_bytes: int = about["code_bytes"]
        self.trained_on: int = about["trained_on"]
        self._faiss: Any = None

    def codes(self, shard: int) -> np.ndarray:
        """uint8 [rows, code_bytes] of a shard, memory-mapped."""
        address = self._index.shards[shard].address
        path = self._home / f"{address}.npy"
        with parsing(path, "codes of this index", _ADVICE):
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            if found.shape != (self._index.shards[shard].rows, self.code_bytes) or found.dtype != np.uint8:
                raise ValueError(f"codes of shape {found.shape}")
            return found

    def bounds(self, shard: int) -> tuple[float, float] | None:
        """(error, largest) of a shard: how far a row is from what its code stands for at most, and the length of the
        longest row; None where they were not measured."""
        path = self._home / f"{self._index.shards[shard].address}.json"
        if not path.is_file():
            return None
        found = read_sealed(path, _ADVICE)
        return float(found["error"]), float(found["largest"])

    def damaged(self) -> list[Path]:
        """Files that are not what they were when they were written; all are read, several at a time."""
        expected = {f"{address}.npy": digest for address, digest in self._about["codes"].items()}
        expected[FILE] = self._about["sha256_of_file"]
        files = [self._home / name for name in expected]
        with ThreadPoolExecutor(usable_cores()) as pool:  # hashing leaves the interpreter to the others
            found = pool.map(lambda file: file_sha256(file) if file.is_file() else None, files)
            return [file for file, digest in zip(files, found, strict=True) if digest != expected[file.name]]

    def load(self, shards: Sequence[int] | None = None) -> Any:
        """A FAISS index of the codes of some shards, or of all, whose ids are rows of the whole index: in memory.

        Args:
            shards: Numbers of shards.
        """
        faiss = _faiss()
        check_file(self._home / FILE, self._about["sha256_of_file"], _ADVICE)
        made = faiss.read_index(str(self._home / FILE))
        outer = faiss.downcast_index(made)
        inner = faiss.downcast_index(outer.index) if isinstance(outer, faiss.IndexPreTransform) else outer
        for number in range(len(self._index.shards)) if shards is None else shards:
            codes, shard = self.codes(number), self._index.shards[number]
            for start in range(0, shard.rows, 16 * _BLOCK):
                block = np.ascontiguousarray(codes[start : start + 16 * _BLOCK])
                inner.add_sa_codes(block, np.arange(len(block), dtype=np.int64) + shard.start + start)
        outer.ntotal = inner.ntotal
        return made

    def candidates(self, queries: np.ndarray, count: int, nprobe: int | None = None) -> np.ndarray:
        """int64 [Q, count]: rows that the codes propose for each query, best first; −1 where there are fewer.

        Args:
            queries: [Q, d], as `IndexFolder.rows_of` gives them.
            count: How many.
            nprobe: Inverted lists looked at; default a 32nd of them, at least 8.
        """
        faiss = _faiss()
        if self._faiss is None:
            self._faiss = self.load()
        inverted = faiss.extract_index_ivf(self._faiss)
        inverted.nprobe = min(self.lists, nprobe or max(8, self.lists // 32))
        _, found = self._faiss.search(np.ascontiguousarray(queries, np.float32), count)
        return found


def growth_note(quantizer: dict[str, Any], rows: int) -> str | None:
    """A note where an index has grown far beyond what its quantizer was trained for."""
    if rows <= GROWTH * quantizer["rows"]:
        return None
    return (
        f"the index has {rows:,} rows now, its codes were trained when it had {quantizer['rows']:,}: lists are long "
        "and candidates slower to find: train them again with retrain=True"
    )


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingExtraError("faiss-cpu (or, on GPUs, faiss-gpu)", "faiss", "codes of an index") from None
    return faiss
