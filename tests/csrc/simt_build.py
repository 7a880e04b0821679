"""Builds kernels and their test entry points against the host stand-in for CUDA (csrc/simt)."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
HERE = Path(__file__).resolve().parent
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]  # #pragma unroll is nvcc's
# Misaligned vector accesses are errors on a GPU; here the sanitizer makes them so, and ends the process.
PLAIN = ["-O2", "-fPIC", "-shared", "-fno-sanitize-recover=all"]
PLAIN += ["-fsanitize=alignment,bounds,shift,signed-integer-overflow"]
RACES = ["-O1", "-g", "-fsanitize=thread"]


def compile_host(sources: list[Path], output: Path, flags: list[str]) -> Path:
    """`sources` compiled by g++ against the stand-in, warnings as errors."""
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found")
    command = ["g++", "-std=c++20", *WARNINGS, *flags, f"-I{CSRC}", "-x", "c++", *map(str, sources), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def compile_for_races(sources: list[Path], output: Path, flags: list[str]) -> Path:
    """The same under ThreadSanitizer; skips where g++ comes without it."""
    if shutil.which("g++") is not None:
        probe = subprocess.run(
            ["g++", "-fsanitize=thread", "-x", "c++", "-", "-o", str(output)],
            input="int main() {}", capture_output=True, text=True,
        )  # fmt: skip
        if probe.returncode != 0:
            pytest.skip("g++ has no ThreadSanitizer here")
    return compile_host(sources, output, RACES + flags)


def run_for_races(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a program built by `compile_for_races`; its status is 66 when a race was reported.

    Systems that randomize addresses over more than 28 bits leave no room for ThreadSanitizer's shadow memory (gcc 12
    and 13), so randomization is switched off where `setarch` may do that.
    """
    fixed_addresses = ["setarch", platform.machine(), "-R"]
    if (
        shutil.which("setarch") is None
        or subprocess.run([*fixed_addresses, "true"], capture_output=True).returncode != 0
    ):
        fixed_addresses = []
    done = subprocess.run(
        [*fixed_addresses, str(program), *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, "TSAN_OPTIONS": "exitcode=66"},
    )  # fmt: skip
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot map its memory under this kernel's address randomization")
    return done
