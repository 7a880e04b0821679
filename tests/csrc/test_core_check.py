"""The instruction sets of 64-bit ARM processors, built by a cross-compiler and run under qemu; and builds for Windows.

core_check.cpp holds them against plain loops. Those of this processor are held so by test_sanitizers.py.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
ARM_LIBRARIES = Path("/usr/aarch64-linux-gnu")


def build(name: str, compiler: str, *options: str) -> Path:
    """The folder with core_check; what the last run of this test compiled is not compiled again."""
    for tool in (compiler, "cmake", "ninja"):
        if shutil.which(tool, path=PATH) is None:
            pytest.skip(f"{tool} was not found")
    folder = ROOT / "build" / f"core_check-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    configure = [
        "cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_CXX_COMPILER={compiler}", "-DDIFFMEM_MODULE=OFF",
        "-DDIFFMEM_CHECK=ON", *options,
    ]  # fmt: skip
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", folder]):
            done = subprocess.run(
                [str(word) for word in command], capture_output=True, text=True, env={**os.environ, "PATH": PATH}
            )
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return folder


def test_arm():
    """Without the products of bytes (a Cortex-A53 of 2012), and with them."""
    if shutil.which("qemu-aarch64") is None or not ARM_LIBRARIES.is_dir():
        pytest.skip("qemu-aarch64 was not found, or its processor's C library")
    folder = build(
        "aarch64", "aarch64-linux-gnu-g++", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O2",
    )  # fmt: skip
    for each in folder.rglob("*_neon*.o"):  # nothing that the linker could hand to a processor without the instructions
        listed = subprocess.run(
            ["aarch64-linux-gnu-nm", "-C", "--defined-only", each], capture_output=True, text=True, check=True
        )
        shared = [line.split()[-1] for line in listed.stdout.splitlines() if line[17:18] in "TWu"]
        op, level = each.name.split(".")[0].split("_neon")
        assert shared == [f"diffmem::{op}::neon{level}_kernels()"], shared
    for processor, levels in {"cortex-a53": "portable neon", "max": "portable neon neon-dotprod"}.items():
        done = subprocess.run(
            ["qemu-aarch64", "-cpu", processor, "-L", ARM_LIBRARIES, folder / "core_check"],
            capture_output=True, text=True, timeout=240, env={**os.environ, "DIFFMEM_CPU": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]
        assert done.stdout.splitlines()[0] == f"levels: {levels}"
        assert [f"checked {level}" in done.stdout for level in levels.split()] == [True] * len(levels.split())


def test_windows_compiles():
    """By MinGW's compiler, without running it: MSVC builds the wheels."""
    folder = build(
        "windows", "x86_64-w64-mingw32-g++-posix", "-DCMAKE_SYSTEM_NAME=Windows", "-DCMAKE_SYSTEM_PROCESSOR=AMD64",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O0",
    )  # fmt: skip
    assert (folder / "core_check.exe").is_file()
