"""LMDB databases whose values are image files, as LSUN's are; read by a reader of our own, without the library lmdb.

The library follows whatever pointers a file holds, so that a damaged or forged one crashes the process. This reader
knows the format (version 1, 64 bits, little endian) and holds every page and length against the file's size.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffmem import system
from diffmem.data.decode import MAX_FILE_BYTES
from diffmem.data.depth import BadImage
from diffmem.errors import InputError
from diffmem.inert.boundary import parsing
from diffmem.text import printable

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_HEADER = 16  # bytes of a page's header
_EMPTY = 2**64 - 1
_BRANCH, _LEAF = 1, 2
_BIG, _PLAIN = 1, 0  # flags of a node: its value lies on pages of its own
_DEEPEST = 32
_IMAGE_STARTS = (
    b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51",
    b"P5", b"P6",
)  # fmt: skip


class Value(NamedTuple):
    """Where a value lies in the file."""

    start: int
    size: int


def lmdb_file(path: Path) -> Path | None:
    """The file of the database that `path` is, a folder or the file itself; None where it is none."""
    if path.is_dir():
        return path / "data.mdb" if (path / "data.mdb").is_file() else None
    return path if path.suffix.lower() in (".lmdb", ".mdb") else None


class LmdbImages:
    """The values of an LMDB database that begin as image files do, in the order of their keys."""

    def __init__(self, path: Path, description: str) -> None:
        self.description = description
        self._path = path
        self.fork_safe = True
        self.mode: str | None = None
        self.labels: np.ndarray | None = None
        self.notes: tuple[str, ...] = ()
        self._values: list[Value] = []
        names: list[str] = []
        others: list[str] = []
        with parsing(path, "a complete LMDB database", "copy it again"), open(path, "rb", buffering=0) as file:
            database = _Database(file.fileno())
            for key, value in database.items():
                name = _name(key)
                if database.read(value.start, min(value.size, 8)).startswith(_IMAGE_STARTS):
                    self._values.append(value)
                    names.append(name)
                else:
                    others.append(name)
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        if not names:
            held = f"the values of its {len(others):,} keys ({shown}) are none" if others else "it is empty"
            raise InputError(
                f"{description}: no image files in this database: {held} (pickles and serialized arrays are not read:"
                " store the bytes of PNG or JPEG files)"
            )
        if others:
            self.notes = (f"{description}: {len(others):,} values that are no image files were skipped ({shown})",)
        self.names: Sequence[str] = names

    def read(self, index: int) -> bytes:
        """The bytes of image `index`; raises `BadImage`."""
        value = self._values[index]
        if value.size > MAX_FILE_BYTES:
            raise BadImage(f"has {value.size / 1e6:,.0f} MB, more than any image that is read")
        try:
            with open(self._path, "rb", buffering=0) as file:
                data = system.read_at(file.fileno(), value.size, value.start)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from None
        if len(data) != value.size:
            raise BadImage("is cut short: its database has changed")
        return data


def _name(key: bytes) -> str:
    try:
        return printable(key.decode())
    except UnicodeDecodeError:
        return key.hex()


class _Database:
    """The main database of the newest snapshot in an LMDB file; raises ValueError where anything does not fit."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        self._page_size = 4096
        first = self._meta(0)
        if first is None:
            raise ValueError("it does not begin as a database of LMDB's version 1 of 64 bits does")
        self._page_size = first[1]
        if self._page_size not in [2**power for power in range(8, 17)]:
            raise ValueError(f"pages of {self._page_size:,} bytes")
        metas = [first, self._meta(self._page_size)]
        _, _, self._root, self._pages = max(meta for meta in metas if meta is not None)
        if self._pages * self._page_size > self._size:
            raise ValueError(f"cut short: {self._pages:,} pages are declared, {self._size // self._page_size:,} there")
        self._seen: set[int] = set()

    def _meta(self, start: int) -> tuple[int, int, int, int] | None:
        """(transaction, page size, root of the main database, pages in use)."""
        data = self.read(start, 152)
        if len(data) < 152 or struct.unpack_from("<II", data, _HEADER) != (_MAGIC, _VERSION):
            return None
        (page_size,) = struct.unpack_from("<I", data, 40)
        root, last, transaction = struct.unpack_from("<QQQ", data, 128)
        return transaction, page_size, root, last + 1

    def read(self, start: int, size: int) -> bytes:
        return system.read_at(self._descriptor, size, start)

    def items(self) -> Iterator[tuple[bytes, Value]]:
        """Keys and places of values, in order of the keys."""
        return iter(()) if self._root == _EMPTY else self._walk(self._root, 0)

    def _walk(self, number: int, depth: int) -> Iterator[tuple[bytes, Value]]:
        if number >= self._pages or number in self._seen or depth > _DEEPEST:
            raise ValueError(f"page {number:,} is not where one belongs")
        self._seen.add(number)
        page = self.read(number * self._page_size, self._page_size)
        own, _, flags, lower = struct.unpack_from("<QHHH", page)
        if own != number or not _HEADER <= lower <= self._page_size or flags & ~0x10 not in (_BRANCH, _LEAF):
            raise ValueError(f"page {number:,} is damaged")
        for place in struct.unpack_from(f"<{(lower - _HEADER) // 2}H", page, _HEADER):
            low, high, node_flags, key_size = struct.unpack_from("<HHHH", page, place)
            if flags & _BRANCH:
                yield from self._walk(low | high << 16 | node_flags << 32, depth + 1)
                continue
            size, data = low | high << 16, place + 8 + key_size
            if data > self._page_size or node_flags not in (_PLAIN, _BIG):
                raise ValueError(f"page {number:,} holds several values of a key, a database of its own, or damage")
            start = number * self._page_size + data
            end = self._page_size * (number + 1)
            if node_flags == _BIG:
                (first,) = struct.unpack_from("<Q", page, data)
                start, end = first * self._page_size + _HEADER, self._pages * self._page_size
                (at,) = struct.unpack("<Q", self.read(first * self._page_size, 8)) if first < self._pages else (-1,)
                if at != first:
                    raise ValueError(f"page {first:,} of a value is damaged")
            if start + size > end:
                raise ValueError(f"a value on page {number:,} reaches beyond its place")
            yield page[place + 8 : data], Value(start, size)
