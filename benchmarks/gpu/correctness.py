"""The tests of the device (`pytest -m gpu`), bfloat16 attention first, and compute-sanitizer on a small search."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.runner import ROOT
from benchmarks.gpu.target import Target

TESTS, SANITIZER = "tests.txt", "sanitizer.txt"
TOOLS = ("memcheck", "racecheck")


def run(out: Path, interpret: bool, deadline: float) -> None:
    """Raises SystemExit where a test fails or the sanitizer finds something."""
    sanitizers = start_sanitizers(out, interpret)
    wrong = []
    with (out / TESTS).open("w") as stream:
        # Warnings of other versions are no errors here. Most of the time kernels are compiled, side by side.
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-ra", "-v", "-W", "default", "-p", "no:cacheprovider",
                   *(["-n", "6"] if find_spec("xdist") and not interpret else []), "tests/gpu",
                   "tests/csrc/test_nearest_cuda.py"]  # fmt: skip
        limit = max(5.0, deadline - time.monotonic() - 5)
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, timeout=limit)
            if done.returncode != 0:
                wrong.append(f"pytest -m gpu: exit status {done.returncode}, see {TESTS}")
        except subprocess.TimeoutExpired:
            wrong.append(f"pytest -m gpu: not done after {limit:.0f} s, see {TESTS}")
    lines = (out / TESTS).read_text().splitlines()
    print("\n".join(line for line in lines if "FAILED" in line or "ERROR" in line)[:4000])
    wrong += finish_sanitizers(sanitizers, out, deadline)
    print(lines[-1] if lines else "no tests ran")
    if wrong:
        raise SystemExit("; ".join(wrong))


def start_sanitizers(out: Path, interpret: bool) -> dict[str, subprocess.Popen]:
    """Side by side with the tests; in a dry run the program that they would watch, once, unwatched."""
    stage = [sys.executable, "-m", "benchmarks.gpu", "--stage", "sanitized", "--out", str(out)]
    if interpret:
        commands = {"nothing": [*stage, "--interpret"]}
    elif tool := shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin"):
        filters = ["--kernel-name", "kns=nearest", "--error-exitcode", "86", "--print-limit", "20"]
        commands = {name: [tool, "--tool", name, *filters, *stage] for name in TOOLS}
    else:
        print("compute-sanitizer was not found")
        return {}
    # The allocator hands out parts of larger blocks, in which the sanitizer would miss an overrun.
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return {
        name: subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True)
        for name, command in commands.items()
    }  # fmt: skip


def finish_sanitizers(processes: dict[str, subprocess.Popen], out: Path, deadline: float) -> list[str]:
    wrong, texts = [], []
    for name, process in processes.items():
        try:
            text, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic() - 2))
            if process.returncode != 0:
                wrong.append(f"{name}: exit status {process.returncode}, see {SANITIZER}")
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            wrong.append(f"{name}: not done in time")
        texts.append(f"== {name}\n{text}")
    if texts:
        (out / SANITIZER).write_text("\n".join(texts))
    return wrong


def sanitized(target: Target) -> list[str]:
    """What the sanitizer watches."""
    from benchmarks.gpu.search import sanitized

    return sanitized(target)
