"""Launches, bytes and widths of the Triton kernels of group_norm_silu and attention, counted; needs no GPU.

    python -m benchmarks.kernel_traffic        # writes benchmarks/results/kernel_traffic.csv

Triton's interpreter runs the op's own host code on one image, and every address that a kernel loads or stores is
looked at: per element of the map (of x or qkv), how many bytes are asked for, and how many come in the sectors of 32
bytes that hold them, one instruction of one program at a time (what the L2 cache hands out where the first-level cache
keeps nothing). `touched` are the bytes of all sectors that are touched at all: what memory has to move at least.
load_width is of the code compiled for sm_90: bytes of the load instructions that move most. Rows named "before" were
counted by the same command at commit 11483ee, before tiles of channels that lie side by side and maps packed (3, heads,
channels); they stay as they are, the others are made again.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from unittest import mock

import numpy as np
import torch

from benchmarks.harness import RESULTS
from benchmarks.rows import read_table, write_table

RESULT = RESULTS / "kernel_traffic.csv"
COLUMNS = (
    "version", "op", "workload", "step", "launches", "loaded", "loaded_sectors", "stored", "stored_sectors", "touched",
    "load_width",
)  # fmt: skip
SECTOR = 32
STEPS = ("forward", "backward")

# Group norm: (channels, side) of bfloat16 channels_last maps in 32 groups, of DDPM++ at 32×32 and ADM at 64×64.
MAPS = ((256, 32), (256, 8), (192, 32), (576, 32), (1344, 16), (1536, 8))
# Attention: (heads, channels of a head, side), of DDPM++ at 16×16 and ADM at 32×32 and 8×8.
HEADS = ((1, 256, 16), (6, 64, 32), (12, 64, 8))


@dataclass
class Traffic:
    """What the kernels launched meanwhile have moved, in bytes."""

    launches: int = 0
    loaded: int = 0
    loaded_sectors: int = 0
    stored: int = 0
    stored_sectors: int = 0
    sectors: list[np.ndarray] = field(default_factory=list)

    def count(self, addresses: np.ndarray, itemsize: int, stored: bool) -> None:
        """Of the elements at `addresses` by one instruction of one program."""
        sectors = np.unique(addresses // SECTOR)
        self.sectors.append(sectors)
        if stored:
            self.stored += len(addresses) * itemsize
            self.stored_sectors += len(sectors) * SECTOR
        else:
            self.loaded += len(addresses) * itemsize
            self.loaded_sectors += len(sectors) * SECTOR

    @property
    def touched(self) -> int:
        return len(np.unique(np.concatenate(self.sectors))) * SECTOR


@contextmanager
def counted(module) -> Iterator[Traffic]:
    """Counts what the launches of `module`, an op's triton_kernels, do in Triton's interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = Traffic()
    load, store, launch = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store, module.launch

    def counting_load(self, pointers, mask, *rest):
        traffic.count(pointers.data[mask.data], pointers.get_element_ty().primitive_bitwidth // 8, False)
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        traffic.count(pointers.data[mask.data], pointers.get_element_ty().primitive_bitwidth // 8, True)
        return store(self, pointers, value, mask, *rest)

    def counting_launch(*arguments, **options):
        traffic.launches += 1
        launch(*arguments, **options)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counting_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counting_store),
        mock.patch.object(module, "launch", counting_launch),
    ):
        yield traffic


def group_norm(channels: int, side: int, step: str, batch: int = 1):
    """(module, elements of the map, function that launches) of group_norm_silu with a scale and a shift."""
    kernels = importlib.import_module("diffmem.ops.group_norm_silu.triton_kernels")
    x = torch.zeros(batch, channels, side, side, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    weight, rows = torch.zeros(channels), torch.zeros(batch, channels)
    forward = (x, 32, weight, weight, 1e-5, rows, rows, True, None)
    y, mean, rstd = kernels.launch_forward(*forward)
    if step == "forward":
        return kernels, x.numel(), lambda: kernels.launch_forward(*forward)
    return (
        kernels,
        x.numel(),
        lambda: kernels.launch_backward(y, x, mean, rstd, 32, weight, weight, rows, rows, True, None),
    )


def attention(heads: int, channels: int, side: int, step: str, batch: int = 1):
    """(module, elements of the packed map, function that launches) of attention."""
    kernels = importlib.import_module("diffmem.ops.attention.triton_kernels")
    qkv = torch.zeros(batch, 3 * heads * channels, side, side, dtype=torch.float16)
    qkv = qkv.to(memory_format=torch.channels_last)
    out, lse = kernels.launch_forward(qkv, heads)
    if step == "forward":
        return kernels, qkv.numel(), lambda: kernels.launch_forward(qkv, heads)
    return kernels, qkv.numel(), lambda: kernels.launch_backward(out, qkv, out, lse, heads)


@dataclass(frozen=True)
class Case:
    """One line of the table: make(step) returns (module, elements of the map, function that launches)."""

    op: str
    workload: str
    step: str
    make: Callable[[str], tuple]


def cases() -> Iterator[Case]:
    for (channels, side), step in product(MAPS, STEPS):
        workload = f"{channels} channels in 32 groups, {side}x{side}, bfloat16"
        yield Case("group_norm_silu", workload, step, partial(group_norm, channels, side))
    for (heads, channels, side), step in product(HEADS, STEPS):
        workload = f"{heads} heads of {channels}, {side}x{side}, float16"
        yield Case("attention", workload, step, partial(attention, heads, channels, side))


def counts_of(case: Case) -> dict[str, str]:
    """The case's columns of bytes and launches, by the interpreter."""
    kernels, elements, run = case.make(case.step)
    with counted(kernels) as traffic:
        run()
    moved = ("loaded", "loaded_sectors", "stored", "stored_sectors", "touched")
    values = {name: getattr(traffic, name) for name in moved}
    return {"launches": str(traffic.launches)} | {name: f"{value / elements:.4g}" for name, value in values.items()}


def load_width(case: Case) -> str:
    """Bytes of the load instructions that move most of what the case's kernels load, compiled for sm_90."""
    from benchmarks.triton_resources import compile_launch, recorded

    widths: Counter[int] = Counter()
    with torch.device("meta"), recorded(importlib.import_module(f"diffmem.ops.{case.op}.triton_kernels")) as launches:
        case.make(case.step)[2]()
    for launch in launches:
        ptx = compile_launch(launch, 90).ptx
        for count, bits in re.findall(r"ld\.global(?!\S*evict_last)\S*?(?:\.v(\d))?\.b(\d+) ", ptx):
            widths[int(count or 1) * int(bits) // 8] += int(count or 1) * int(bits) // 8
        for width in re.findall(r"cp\.async\.c[ag]\.shared\.global\S* \[[^\]]*\], \[[^\]]*\], (0x\w+|\d+)", ptx):
            widths[int(width, 0)] += int(width, 0)
    return str(widths.most_common(1)[0][0])


def read_rows() -> list[dict[str, str]]:
    """The table as it lies there."""
    return read_table(RESULT)


def main(version: str = "now") -> None:
    command = [sys.executable, "-m", "benchmarks.kernel_traffic"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, check=True)
    kept = [row for row in read_rows() if row["version"] != version]
    made = [
        {"version": version, "op": case.op, "workload": case.workload, "step": case.step, **counts,
         "load_width": load_width(case)}
        for case, counts in zip(cases(), json.loads(done.stdout), strict=True)
    ]  # fmt: skip
    write_table(RESULT, [*kept, *made], COLUMNS)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":  # started by main()
        print(json.dumps([counts_of(case) for case in cases()]))
    else:
        main(*sys.argv[1:])
