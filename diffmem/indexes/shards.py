"""The folder of one shard: how it is written, block by block, and how its address comes about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from diffmem.errors import InputError
from diffmem.integrity import file_sha256, read_sealed, sealed

FORMAT = "diffmem-shard-1"
SHARDS = "shards"
DESCRIPTION = "shard.json"
DIGEST_BYTES = 16
_HEADER_BYTES = 128  # of an .npy file whose number of rows is written at the end
_BLOCK = 4096


def address_of(made_from: Mapping[str, Any]) -> str:
    """The name of the shard that is made from this (JSON types): 32 hexadecimal digits."""
    text = json.dumps({"format": FORMAT, **made_from}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def content_digests(rows: np.ndarray) -> np.ndarray:
    """uint8 [n, 16]: SHA-256 of each row's values, cut short; −0.0 and 0.0 are the same value."""
    rows = np.ascontiguousarray(rows)
    if rows.dtype.kind == "f":
        rows = rows + np.zeros(1, rows.dtype)
    found = b"".join(hashlib.sha256(row.data).digest()[:DIGEST_BYTES] for row in rows)
    return np.frombuffer(found, np.uint8).reshape(len(rows), DIGEST_BYTES)


class RowFile:
    """An `.npy` file [n, …] that grows by blocks of rows; n is written into its header at the end."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, 0
        self._form: tuple[np.dtype, tuple[int, ...]] | None = None
        self._file: IO[bytes] = open(path, "xb")  # noqa: SIM115 (closed by finish)
        self._file.write(bytes(_HEADER_BYTES))

    def append(self, block: np.ndarray) -> None:
        """Rows of the dtype and shape of those before; raises ValueError for others."""
        form = block.dtype, block.shape[1:]
        if self._form is None:
            self._form = form
        if form != self._form:
            raise ValueError(f"rows {form[0]} {form[1]} after rows {self._form[0]} {self._form[1]}")
        self._file.write(np.ascontiguousarray(block).data)
        self.rows += len(block)

    def finish(self) -> None:
        """Writes the header and closes the file; rows have been written to it."""
        assert self._form is not None
        dtype, shape = self._form
        fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (self.rows, *shape)}
        text = repr(fields).encode()
        start = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")
        self._file.seek(0)
        self._file.write(start + text + b" " * (_HEADER_BYTES - len(start) - len(text) - 1) + b"\n")
        self._file.close()

    def close(self) -> None:
        self._file.close()


class ShardWriter:
    """Writes the files of a shard into a folder, in the order in which rows come."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = self.unit_rows = 0
        self.dimension: int | None = None
        self.dtype: np.dtype | None = None
        self._files: dict[str, RowFile] = {}

    def append(
        self,
        vectors: np.ndarray,
        names: Sequence[str] | None,
        images: np.ndarray | None = None,
        lengths: np.ndarray | None = None,
        places: np.ndarray | None = None,
    ) -> None:
        """A block of rows.

        Args:
            vectors: [n, d].
            names: n names, or None where the source has none.
            images: Digests of the images that the vectors are features of.
            lengths: Of vectors that are compared by the cosine and are not stored with length 1.
            places: int64 [n, 2], where the bytes of these images begin in their archive and how many there are.
        """
        self._file("vectors").append(vectors)
        self._file("digests").append(content_digests(vectors))
        if images is not None:
            self._file("images").append(images)
        if lengths is not None:
            self._file("lengths").append(lengths)
        if places is not None:
            self._file("places").append(places)
        if names is not None:
            encoded = [name.encode("utf-8", "backslashreplace") for name in names]
            before = self._file("names").rows
            ends = before + np.cumsum([len(name) for name in encoded], dtype=np.int64)
            self._file("names").append(np.frombuffer(b"".join(encoded), np.uint8))
            self._file("name_ends").append(ends)
        self.rows += len(vectors)
        self.dimension, self.dtype = vectors.shape[1], vectors.dtype

    def _file(self, name: str) -> RowFile:
        if name not in self._files:
            self._files[name] = RowFile(self.folder / f"{name}.npy")
        return self._files[name]

    def finish(
        self, description: Mapping[str, Any], skipped: Sequence[tuple[str, str]], order: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Completes the files and writes the description, which is returned.

        order: in which the rows are to lie, where that is not the order in which they came.
        """
        for file in self._files.values():
            file.finish()
        if order is not None:
            sort_rows(self.folder, order)
        if skipped:
            document = sealed({"skipped": [list(each) for each in skipped]})
            (self.folder / "skipped.json").write_text(json.dumps(document, indent=1) + "\n")
        files = {path.name: file_sha256(path) for path in sorted(self.folder.iterdir())}
        complete = {
            "format": FORMAT,
            **description,
            "rows": self.rows,
            "dimension": self.dimension,
            "dtype": None if self.dtype is None else self.dtype.name,
            "unit_rows": self.unit_rows,
            "skipped": len(skipped),
            "files": files,
        }
        (self.folder / DESCRIPTION).write_text(json.dumps(sealed(complete), indent=1) + "\n")
        return complete

    def close(self) -> None:
        """Closes what is open, finished or not."""
        for file in self._files.values():
            file.close()


def sort_rows(folder: Path, order: np.ndarray) -> None:
    """Puts the rows of all files of a shard that is not described yet into the order of `order`."""
    for path in sorted(folder.glob("*.npy")):
        if path.stem in ("names", "name_ends"):
            continue
        values, beside = np.load(path, mmap_mode="r"), path.with_suffix(".sorted")
        file = RowFile(beside)
        for start in range(0, len(order), _BLOCK):
            file.append(values[order[start : start + _BLOCK]])
        file.finish()
        beside.replace(path)
    if (folder / "name_ends.npy").is_file():
        text, ends = np.load(folder / "names.npy"), np.load(folder / "name_ends.npy")
        starts = np.concatenate([[0], ends[:-1]])
        names = [text[starts[row] : ends[row]] for row in order]
        for name, values in (
            ("names", np.concatenate(names)),
            ("name_ends", np.cumsum([len(each) for each in names], dtype=np.int64)),
        ):
            (folder / f"{name}.npy").unlink()
            file = RowFile(folder / f"{name}.npy")
            file.append(values)
            file.finish()


def read_shard(folder: Path) -> dict[str, Any] | None:
    """The description of a finished shard; None where there is none, or not a complete one."""
    try:
        found = read_sealed(folder / DESCRIPTION, "it is built again")
    except InputError:
        return None
    complete = found.get("format") == FORMAT and all((folder / name).is_file() for name in found.get("files", ()))
    return found if complete else None
