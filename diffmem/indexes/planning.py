"""What a build is going to do, before it begins: shards, blocks, and the memory that a worker needs at most."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffmem.data.storage import memory_bytes
from diffmem.errors import InputError
from diffmem.indexes import remote
from diffmem.indexes.images import image_blocks
from diffmem.indexes.reading import Features, Reading
from diffmem.indexes.sources import Part
from diffmem.indexes.vectors import row_blocks

LARGEST_BLOCK = 4096  # rows
BLOCK_BYTES = 2**27  # of a block where no memory is given
BASE = 450e6  # bytes of a process that has loaded PyTorch and the decoders
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclass(frozen=True)
class MemoryPlan:
    """What a worker holds at most, in bytes.

    Attributes:
        process: Its program and libraries, and the network.
        rows: Of a block.
        block: The rows of a block, as files, as pixels and as vectors, and what is computed of them.
        buffers: Of files that are read from elsewhere.
    """

    process: int
    rows: int
    block: int
    buffers: int

    @property
    def total(self) -> int:
        return self.process + self.block + self.buffers

    def __str__(self) -> str:
        parts = [
            f"{size_text(self.process)} the process itself",
            f"{size_text(self.block)} {self.rows:,} rows at a time",
        ]
        if self.buffers:
            parts.append(f"{size_text(self.buffers)} what is on its way")
        return f"at most {size_text(self.total)} per worker ({', '.join(parts)})"


def size_text(size: float) -> str:
    """Bytes in words: "1.2 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def parse_memory(value: str | float | None) -> int | None:
    """Bytes from "2GB", "500 MB" or a number; raises InputError."""
    if value is None:
        return None
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?)i?b?\s*", str(value).lower())
    try:
        if match is None:
            raise ValueError
        return int(float(match[1]) * _UNITS[match[2]])
    except ValueError:
        raise InputError(f"memory is {value!r}, but must be a size such as 2GB or 500MB") from None


def first_rows(parts: Sequence[Part], features: Features, reading: Reading) -> np.ndarray:
    """The first rows of all: vectors [n, d], or images [n, C, H, W]."""
    if features.precomputed:
        return next(row_blocks(parts[0], 256))[0]
    for part in parts:
        for block in image_blocks(part, reading, 1):
            if len(block.images):
                return block.images
    raise InputError(f"{parts[0].where}: none of its files is a usable image, nor is one of the others")


def plan_memory(
    parts: Sequence[Part], features: Features, reading: Reading, first: np.ndarray, memory: int | None, device: str
) -> MemoryPlan:
    """What a worker needs, with as many rows at a time as the memory that is allowed has room for.

    Raises:
        InputError: The memory is less than the least that is needed.
    """
    row = first[:1].nbytes
    away = any(remote.is_remote(part.file) for part in parts)
    buffers = 3 * remote.BLOCK if away else 0
    process, network = BASE, 0
    if features.precomputed:
        fixed, per_row = None, row + 24 * first.shape[1]  # as read, in float64 and as stored
        whole = [part.bytes for part in parts if part.file.lower().endswith((".npz", ".pt", ".pth"))]
    else:
        # The file's bytes, rarely more than the pixels; these in Pillow's image, in the block and without bad ones.
        per_row = 5 * row
        whole = [part.bytes for part in parts if part.kind == "images" and part.stop is None]
        fixed = None
        if features.name not in ("pixels", "hash"):
            # Its batch is the block, since the last bits of a vector depend on what else is in the batch.
            maker = features.extractor(device)
            fixed = maker.batch
            images = np.repeat(first[:1], maker.batch, axis=0)
            network = measured_peak(lambda: maker(images))
            process = max(process, resident())
    process += max(whole, default=0)
    least = process + network + buffers + per_row * (fixed or 16)
    if memory is not None and least > memory:
        raise InputError(f"memory is {size_text(memory)}, but must be at least {size_text(least * 1.001)} here")
    room = BLOCK_BYTES if memory is None else memory - process - network - buffers
    rows = fixed or int(np.clip(room // per_row, 16, LARGEST_BLOCK))
    return MemoryPlan(int(process), rows, int(network + per_row * rows), int(buffers))


def resident() -> int:
    """Bytes of memory that this process holds."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def measured_peak(work: Callable[[], Any]) -> int:
    """Bytes that `work()` takes at most beyond what the process holds; 0 where the system does not say."""
    before = resident()
    if not sys.platform.startswith("linux"):
        work()
        return 0
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the highest use so far is forgotten
    except OSError:
        work()
        return 0
    work()
    with open("/proc/self/status") as file:
        peak = next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:")), 0)
    return max(0, peak - before)


def warn_of_machine(plan: MemoryPlan, workers: int) -> str | None:
    """A note where the workers of this machine need more than it has."""
    if plan.total * workers <= memory_bytes():
        return None
    return (
        f"{workers} workers of {size_text(plan.total)} need more than this machine's {size_text(memory_bytes())}: use "
        "fewer with workers=…, or less for each with memory=…"
    )


def with_metric(features: Features, first: np.ndarray) -> Features:
    """Precomputed features with the metric that their first rows suggest, where none is given."""
    if not features.precomputed or features.metric is not None:
        return features
    if first.dtype == np.uint8:
        return replace(features, metric="hamming" if first.max(initial=0) <= 1 else "euclidean")
    return replace(features, metric="cosine")
