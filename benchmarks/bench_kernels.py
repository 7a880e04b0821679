"""What every Triton kernel uses of a GPU, in every configuration that can be launched; needs no GPU.

Writes benchmarks/results/kernels.triton-<version>.csv: registers, shared memory, spills, occupancy, instructions and
bytes moved, per kernel, configuration and architecture. Another Triton compiles to other code, so each version has a
table of its own. A row is made again only where the kernel's source has changed.

    python -m benchmarks kernels                       # what has changed, about a second a row; may be interrupted
    python -m benchmarks kernels --only attention      # rows whose name contains this; all others stay

What can be launched is what the ops' own host code launches: `every_launch` calls it and collects. Each tile is there
in each dtype and layout with everything a kernel can do: SiLU, scale and shift, an added embedding, float32
parameters, aligned addresses. Every combination of what can be switched off (in bfloat16; for maps of several tiles
nothing, and all), half-precision parameters, and sizes and addresses that nothing divides, are there for one tile of
each kernel (GROUP_NORM_EXAMPLES, ODD_EXAMPLES).

load_bytes and store_bytes: of all threads of a program, from PTX, but for loads marked evict_last (parameters and
statistics). loads_by_width and stores_by_width: bytes of an instruction, and how many such instructions the code has,
of the same loads and of the stores; asynchronous_copies: how many of the loads go to shared memory while the thread
goes on. loads_by_depth and stores_by_depth: of one program, from Triton's IR: outside of loops, then in one round of a
loop, then in one round of the loop inside of that.

To add an op, add a KernelSubject to SUBJECTS.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from benchmarks.harness import RESULTS, Bench
from benchmarks.rows import read_table, write_table
from benchmarks.triton_resources import ARCHITECTURES, Launch, bytes_by_depth, compile_launch, recorded, source_digest

COLUMNS = (
    "op", "kernel", "configuration", "architecture", "registers", "stack_bytes", "spill_bytes", "shared_bytes", "warps",
    "blocks_per_multiprocessor", "occupancy", "instructions", "matrix_instructions", "load_bytes", "store_bytes",
    "loads_by_depth", "stores_by_depth", "loads_by_width", "stores_by_width", "asynchronous_copies", "source",
)  # fmt: skip
VALUES, MINUTES = "kernels.*.csv", 25  # where the kernels have changed
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class KernelSubject:
    """An op whose Triton kernels are to be compiled.

    op: its folder in diffmem.ops, whose `triton_kernels.py` launches by a module-level name `launch`.
    run(kernels, dtype): calls host code of that module on "meta" tensors in every configuration that it can launch.
    """

    op: str
    run: Callable[[ModuleType, torch.dtype], None]


# (channels of a group, pixels) of maps: one tile, and several.
GROUP_NORM_EXAMPLES = ((8, 64), (8, 256))
ODD_EXAMPLES = ((3, 7 * 7), (3, 15 * 15))


def _map(batch: int, channels: int, pixels: int, dtype: torch.dtype, last: bool) -> torch.Tensor:
    x = torch.empty((batch, channels, pixels // 8, 8), dtype=dtype)
    return x.to(memory_format=torch.channels_last) if last else x


def _run_group_norm(kernels: ModuleType, dtype: torch.dtype) -> None:
    from diffmem.ops.group_norm_silu.tiles import every_tile

    def launch(x, groups, parameters=torch.float32, embedding=torch.float32, silu=True, adaptive=True, added=True,
               one_row=False):  # fmt: skip
        channels = x.shape[1]
        weight, rows = torch.empty(channels, dtype=parameters), torch.empty(len(x), channels, dtype=embedding)
        rows = rows[:1] if one_row else rows
        scale, added = rows if adaptive else None, rows if added else None
        y, mean, rstd = kernels.launch_forward(x, groups, weight, weight, 1e-5, scale, scale, silu, added)
        kernels.launch_backward(y, x, mean, rstd, groups, weight, weight, scale, scale, silu, added)

    for last in (False, True):
        for group_channels, pixels, batch in every_tile(last):
            launch(_map(batch, 32 * group_channels, pixels, dtype, last), 32)
        for group_channels, pixels in ODD_EXAMPLES:
            channels = 5 * group_channels
            strides = (channels * pixels, 1, channels, channels) if last else (channels * pixels, pixels, 1, 1)
            memory = torch.empty(4 * channels * pixels + 1, dtype=dtype)
            launch(memory.as_strided((4, channels, pixels, 1), strides, 1), 5)
    for group_channels, pixels in GROUP_NORM_EXAMPLES:
        x = _map(40, 32 * group_channels, pixels, dtype, True)
        launch(x, 32, one_row=True)  # as of a network without classes at one noise level, or of a convolution's bias
        options = product((False, True), repeat=3) if pixels == 64 else product((False,), repeat=3)
        for silu, adaptive, added in options if dtype == torch.bfloat16 else ():
            launch(x, 32, silu=silu, adaptive=adaptive, added=added)
        if dtype != torch.float32:
            launch(x, 32, embedding=dtype)  # as under autocast
            launch(x, 32, parameters=dtype, embedding=dtype)


def _run_attention(kernels: ModuleType, dtype: torch.dtype) -> None:
    from diffmem.ops.attention.tiles import KERNELS, every_tile

    for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
        sizes = {size for kernel in KERNELS for size in every_tile(kernel, dtype, precision)}
        with mock.patch.object(kernels, "precision_of", lambda _, precision=precision: precision):
            for last in (False, True):
                for channels in sorted(sizes):
                    qkv = _map(4, 3 * 2 * channels, 64, dtype, last)
                    out, lse = kernels.launch_forward(qkv, 2)
                    kernels.launch_backward(out, qkv, out, lse, 2)


def _run_posterior_mean(kernels: ModuleType, dtype: torch.dtype) -> None:
    del dtype  # its numbers have the same types always
    n, d = 3000, 3072
    for queries, planes in product((8, 256), (2, 3)):
        words = torch.empty(queries, planes, dtype=torch.int32)
        rows, numbers = torch.empty(n, d, dtype=torch.uint8), torch.empty(queries)
        scores, tops, _ = kernels.launch_scores(
            torch.empty(queries, planes, d, dtype=torch.int8), words, words.float(), numbers, rows, torch.empty(n)
        )
        kernels.launch_weighted_sums(scores, numbers, tops > 0, rows, torch.empty(d))


SUBJECTS = (
    KernelSubject("group_norm_silu", _run_group_norm),
    KernelSubject("attention", _run_attention),
    KernelSubject("posterior_mean", _run_posterior_mean),
)


def every_launch(subject: KernelSubject, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[Launch]:
    """Each kernel of `subject` in each configuration that can be launched, once."""
    kernels = importlib.import_module(f"diffmem.ops.{subject.op}.triton_kernels")
    seen = set()
    for dtype in dtypes:
        with torch.device("meta"), recorded(kernels) as launches:
            subject.run(kernels, dtype)
        for launch in launches:
            if (key := (launch.name, launch.configuration)) not in seen:
                seen.add(key)
                yield launch


def row_of(op: str, launch: Launch, architecture: int) -> dict[str, str]:
    """One line of the table."""
    compiled = compile_launch(launch, architecture)
    loads, stores = compiled.map_bytes()
    values = {
        "op": op,
        "kernel": launch.name,
        "configuration": launch.configuration,
        "architecture": f"sm_{architecture}",
        "load_bytes": loads,
        "store_bytes": stores,
        "loads_by_depth": " ".join(map(str, bytes_by_depth(compiled.ttir, "load"))),
        "stores_by_depth": " ".join(map(str, bytes_by_depth(compiled.ttir, "store"))),
        "loads_by_width": _widths(compiled.loads_by_width),
        "stores_by_width": _widths(compiled.stores_by_width),
        "source": source_digest(launch.kernel),
    }
    measured = (
        "registers", "stack_bytes", "spill_bytes", "shared_bytes", "warps", "blocks_per_multiprocessor", "occupancy",
        "instructions", "matrix_instructions", "asynchronous_copies",
    )  # fmt: skip
    return {name: str(values[name] if name in values else getattr(compiled, name)) for name in COLUMNS if name in values
            or name in measured}  # fmt: skip


def _widths(counts: dict[int, int]) -> str:
    """{16: 4, 2: 1} as "16:4 2:1"."""
    return " ".join(f"{width}:{count}" for width, count in counts.items())


def result(folder: Path = RESULTS) -> Path:
    """The table of the Triton that is installed."""
    return folder / f"kernels.triton-{importlib.metadata.version('triton')}.csv"


def read_rows() -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of this Triton's table by kernel, configuration and architecture, and op."""
    return {key_of(row): row for row in read_table(result())}


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("op", "kernel", "configuration", "architecture"))


def run(bench: Bench) -> None:
    """Compiles what is not in the table, with --quick for one architecture only."""
    known, rows = read_rows(), {}
    for subject in SUBJECTS:
        for launch in every_launch(subject):
            source = source_digest(launch.kernel)
            for architecture in ARCHITECTURES:
                key = (subject.op, launch.name, launch.configuration, f"sm_{architecture}")
                if not bench.wants(" ".join(key)) or (bench.quick and architecture != 90):
                    if key in known:
                        rows[key] = known[key]
                elif known.get(key, {}).get("source") == source and known[key].keys() == set(COLUMNS):
                    rows[key] = known[key]
                else:
                    rows[key] = row_of(subject.op, launch, architecture)
                    print(" ".join(key), rows[key]["registers"], "registers", flush=True)
                    if len(rows) % 25 == 0:
                        _write(known | rows)
    _write(rows)


def _write(rows: dict[tuple[str, ...], dict[str, str]]) -> None:
    write_table(result(), (rows[key] for key in sorted(rows)), COLUMNS)
