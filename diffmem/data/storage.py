"""Where pixels lie: in memory, or in an unnamed file that is memory-mapped when they would crowd the memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import Any, BinaryIO, cast

import numpy as np

from diffmem import system
from diffmem.errors import InputError

# Arrays above this share of the machine's memory are kept in a file.
MEMORY_SHARE = 0.25


def memory_bytes() -> int:
    """Bytes of memory this process may use: the machine's, or its control group's limit where that is lower."""
    total = system.physical_memory()
    try:
        with open("/sys/fs/cgroup/memory.max") as limit:
            return min(total, int(limit.read()))
    except (OSError, ValueError):  # no such file, or "max"
        return total


def crowds_memory(size: int) -> bool:
    """Whether an array of `size` bytes belongs in a file."""
    return size > MEMORY_SHARE * memory_bytes()


def allocate(shape: tuple[int, ...], dtype: np.dtype | type = np.uint8) -> np.ndarray:
    """An array with undefined contents, in memory or over an unnamed temporary file (in TMPDIR) that goes with it."""
    size = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    if not crowds_memory(size):
        return np.empty(shape, dtype)
    with temporary_file(size) as file:  # the mapping outlives the open file
        return np.memmap(file, dtype=dtype, mode="r+", shape=shape)


def temporary_file(size: int) -> BinaryIO:
    """An unnamed file of `size` bytes whose space is really there: a full disk must not become a bus error later."""
    file = tempfile.TemporaryFile(prefix="diffmem-")  # noqa: SIM115 (the caller's)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    except OSError as error:
        file.close()
        folder, free = tempfile.gettempdir(), shutil.disk_usage(tempfile.gettempdir()).free
        raise InputError(
            f"{size / 1e9:.1f} GB of pixels do not fit in the temporary folder {folder} ({free / 1e9:.1f} GB free,"
            f" {error.strerror}): set TMPDIR to a larger disk, or use resize or limit"
        ) from None
    return file


def discard_rows(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`array` without `rows` (sorted indices): a view of it, the rows behind each gap moved up in place."""
    if len(rows) == 0:
        return array
    end = int(rows[0])
    for row, following in zip(rows, [*rows[1:], len(array)], strict=True):
        for start in range(int(row) + 1, int(following), 4096):
            stop = min(start + 4096, int(following))
            array[end : end + stop - start] = array[start:stop]
            end += stop - start
    return array[:end]


class Gathering:
    """Blocks of equally shaped rows of unknown number, gathered into one array: in memory, then in a file.

    A context manager; the array outlives it.
    """

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self._file: BinaryIO | None = None
        self._shape: tuple[int, ...] = ()
        self._dtype: np.dtype | None = None
        self._bytes = 0

    def __enter__(self) -> Gathering:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, block: np.ndarray) -> None:
        """Add rows of the first block's dtype and row shape (the caller checks that)."""
        self._shape, self._dtype = block.shape[1:], block.dtype
        self._bytes += block.nbytes
        self._blocks.append(block)
        # At the end the blocks are copied into one array, so that together they take twice their size.
        if self._file is None and crowds_memory(2 * self._bytes):
            self._file = tempfile.TemporaryFile(prefix="diffmem-")  # noqa: SIM115 (closed by __exit__)
        if self._file is not None:
            for waiting in self._blocks:
                self._file.write(np.ascontiguousarray(waiting).data)
            self._blocks.clear()

    def array(self) -> np.ndarray:
        """All rows, in order."""
        if self._file is None:
            return np.concatenate(self._blocks)
        self._file.flush()
        assert self._dtype is not None
        rows = self._bytes // (int(np.prod(self._shape)) * self._dtype.itemsize)
        return np.memmap(cast(Any, self._file), dtype=self._dtype, mode="r+", shape=(rows, *self._shape))
