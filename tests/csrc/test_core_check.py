"""The instruction sets of 64-bit ARM processors, built by a cross-compiler and run under qemu; and builds for Windows.

core_check.cpp holds them against plain loops. Those of this processor are held so by test_sanitizers.py.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from core_builds import built, found

ARM_LIBRARIES = Path("/usr/aarch64-linux-gnu")


def build(name: str, compiler: str, *options: str, targets: Sequence[str] = ()) -> Path:
    found(compiler, "cmake", "ninja")
    choice = (f"-DCMAKE_CXX_COMPILER={compiler}", "-DDIFFMEM_MODULE=OFF", "-DDIFFMEM_CHECK=ON")
    return built(f"core_check-{name}", [*choice, *options], targets)


@pytest.mark.parametrize(
    ("processor", "levels", "checked"),
    [
        pytest.param("cortex-a53", "portable neon", "portable neon", marks=pytest.mark.exhaustive),
        ("cortex-a76", "portable neon neon-dotprod", "neon-dotprod"),
    ],
)
def test_arm(processor, levels, checked):
    """Without the products of bytes (a Cortex-A53 of 2012), and with them (a Cortex-A76), whose other instructions are
    the same."""
    if shutil.which("qemu-aarch64") is None or not ARM_LIBRARIES.is_dir():
        pytest.skip("qemu-aarch64 was not found, or its processor's C library")
    folder = build(
        "aarch64", "aarch64-linux-gnu-g++", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
    )  # fmt: skip
    for each in folder.rglob("*_neon*.o"):  # nothing that the linker could hand to a processor without the instructions
        listed = subprocess.run(
            ["aarch64-linux-gnu-nm", "-C", "--defined-only", each], capture_output=True, text=True, check=True
        )
        shared = [line.split()[-1] for line in listed.stdout.splitlines() if line[17:18] in "TWu"]
        op, level = each.name.split(".")[0].split("_neon")
        assert shared == [f"diffmem::{op}::neon{level}_kernels()"], shared
    done = subprocess.run(
        ["qemu-aarch64", "-cpu", processor, "-L", ARM_LIBRARIES, folder / "core_check", *checked.split()],
        capture_output=True, text=True, timeout=240, env={**os.environ, "DIFFMEM_CPU": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"levels: {levels}", *(f"checked {level}" for level in checked.split())]


# What asks the system for something, and the largest op; the others are plain C++.
OF_WINDOWS = ("csrc/cpu/features", *(f"csrc/nearest/nearest_{part}" for part in ("cpu", "portable", "avx2", "avx512")))


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_windows_compiles(every):
    """By MinGW's compiler, without running it: MSVC builds the wheels."""
    targets = [f"CMakeFiles/diffmem_ops.dir/{each}.cpp.obj" for each in OF_WINDOWS]
    folder = build(
        "windows", "x86_64-w64-mingw32-g++-posix", "-DCMAKE_SYSTEM_NAME=Windows", "-DCMAKE_SYSTEM_PROCESSOR=AMD64",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O0",
        targets=() if every else [*targets, "CMakeFiles/core_check.dir/tests/csrc/core_check.cpp.obj"],
    )  # fmt: skip
    assert all((folder / target).is_file() for target in targets)
    assert (folder / "core_check.exe").is_file() or not every
