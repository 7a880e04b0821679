"""Registers, spills, shared memory and occupancy of every CUDA kernel on every shipped architecture; needs no GPU.

    python benchmarks/cuda_resources.py        # writes benchmarks/results/nearest_cuda_kernels.csv

Needs nvcc and g++: ptxas reports what each kernel uses, and the size of the shared memory that a launcher asks for
comes from compiling the same source for the host (csrc/simt).
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "csrc" / "nearest" / "nearest_cuda.cu"
RESULT = ROOT / "benchmarks" / "results" / "nearest_cuda_kernels.csv"
ARCHITECTURES = (80, 90, 100, 120)  # as in CMakeLists.txt
THREADS = 256  # of a block, for every kernel of SOURCE


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor holds (CUDA programming guide, compute capabilities)."""

    warps: int
    blocks: int
    shared_kib: int
    registers: int = 65536


MULTIPROCESSORS = {
    80: Multiprocessor(warps=64, blocks=32, shared_kib=164),
    90: Multiprocessor(warps=64, blocks=32, shared_kib=228),
    100: Multiprocessor(warps=64, blocks=32, shared_kib=228),
    120: Multiprocessor(warps=48, blocks=24, shared_kib=100),
}


@dataclass(frozen=True)
class KernelResources:
    """What one kernel uses on one architecture; sizes in bytes, registers per thread."""

    kernel: str
    architecture: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int
    dynamic_shared_bytes: int
    blocks_per_multiprocessor: int
    occupancy: float  # resident warps over the most that the multiprocessor holds


def readable_name(mangled: str) -> str:
    """search_kernel<Narrow>, refine_kernel<uint4>, merge_kernel, …"""
    base = re.search(r"(search|merge|center|refine)_kernel", mangled)[0]
    argument = re.match(r"I(?:NS\w*?6TilingILi(\d+)|5(uint4)|(h|j)E)", mangled[mangled.index(base) + len(base) :])
    if argument is None:
        return base
    tile, vector, scalar = argument.groups()
    names = {"128": "Narrow", "64": "Wide", "uint4": "uint4", "h": "uint8_t", "j": "uint32_t"}
    return f"{base}<{names[tile or vector or scalar]}>"


def compile_for(architecture: int, output: Path) -> str:
    """Compiles SOURCE to the cubin `output` with warnings as errors; returns what ptxas reports."""
    command = [
        "nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{architecture}", "-Werror", "all-warnings",
        "-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-cubin", str(SOURCE), "-o", str(output),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed for sm_{architecture}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def dynamic_shared_bytes() -> dict[str, int]:
    """Shared memory that each launcher asks for, by kernel (0 where not listed)."""
    program = f"""
#include "{SOURCE}"
#include <cstdio>
using namespace diffmem::nearest::cuda;
int main() {{ std::printf("%zu %zu", sizeof(SearchMemory<Narrow>), sizeof(SearchMemory<Wide>)); }}
"""
    with tempfile.TemporaryDirectory() as folder:
        binary = str(Path(folder) / "sizes")
        command = ["g++", "-std=c++20", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}", "-x", "c++", "-", "-o", binary]
        subprocess.run(command, input=program, text=True, check=True)
        narrow, wide = subprocess.run([binary], capture_output=True, text=True, check=True).stdout.split()
    return {"search_kernel<Narrow>": int(narrow), "search_kernel<Wide>": int(wide)}


def blocks_per_multiprocessor(architecture: int, registers: int, shared_bytes: int, warps: int) -> int:
    """Resident blocks of `warps` warps; registers go to warps in units of 256, 1 KiB per block is reserved."""
    limits = MULTIPROCESSORS[architecture]
    registers_per_warp = -(-registers * 32 // 256) * 256
    return min(
        limits.warps // warps,
        limits.blocks,
        limits.registers // registers_per_warp // warps,
        limits.shared_kib * 1024 // (shared_bytes + 1024),
    )


def read_report(architecture: int, report: str, dynamic: dict[str, int]) -> list[KernelResources]:
    """The kernels in what `ptxas -v` printed."""
    kernels = []
    for section in report.split("Compiling entry function '")[1:]:
        name = readable_name(section.split("'")[0])
        numbers = {
            "registers": r"Used (\d+) registers",
            "stack_bytes": r"(\d+) bytes stack frame",
            "static_shared_bytes": r"(\d+) bytes smem",
        }
        found = {
            key: int(match[1]) if (match := re.search(pattern, section)) else 0 for key, pattern in numbers.items()
        }
        spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", section)))
        shared = found["static_shared_bytes"] + dynamic.get(name, 0)
        blocks = blocks_per_multiprocessor(architecture, found["registers"], shared, THREADS // 32)
        occupancy = round(blocks * THREADS / 32 / MULTIPROCESSORS[architecture].warps, 3)
        kernels.append(
            KernelResources(
                kernel=name,
                architecture=f"sm_{architecture}",
                spill_bytes=spills,
                dynamic_shared_bytes=dynamic.get(name, 0),
                blocks_per_multiprocessor=blocks,
                occupancy=occupancy,
                **found,
            )
        )
    return sorted(kernels, key=lambda each: each.kernel)


def main() -> None:
    for tool in ("nvcc", "g++"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} was not found")
    dynamic = dynamic_shared_bytes()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for architecture in ARCHITECTURES:
            report = compile_for(architecture, Path(folder) / "kernels.cubin")
            rows += read_report(architecture, report, dynamic)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    with RESULT.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(KernelResources)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print(f"{len(rows)} rows in {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
