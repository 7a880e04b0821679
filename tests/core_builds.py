"""Builds of the core that tests share: what an earlier call compiled, in whichever process, is not compiled again."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def found(*tools: str) -> None:
    """Skips where a tool is missing."""
    for tool in tools:
        if shutil.which(tool, path=PATH) is None:
            pytest.skip(f"{tool} was not found")


def built(name: str, options: Sequence[str], targets: Sequence[str] = ()) -> Path:
    """build/`name`, where CMake has built the targets (none named: all) with these options."""
    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make = ["cmake", "--build", folder, *(["--target", *targets] if targets else [])]
        for command in (["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options], make):
            done = subprocess.run(
                [str(word) for word in command], capture_output=True, text=True, env={**os.environ, "PATH": PATH}
            )
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        without_old_objects(folder)
    return folder


def distribution(kind: str, source: Path, into: Path, **environment: str) -> tuple[Path, str]:
    """The distribution ("sdist" or "wheel") that `source` gives by its build backend, as pip asks for it, and the
    build's output."""
    code = f"import sys; from setuptools.build_meta import build_{kind} as b; b(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, into], cwd=source, capture_output=True, text=True,
        env={**os.environ, "DIFFMEM_CUDA": "off", **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    (made,) = into.iterdir()
    return made, result.stdout + result.stderr


def checkout(into: Path) -> Path:
    """A copy of what a build needs, so that the checkout's own is left alone. As a checkout does, it has more."""
    files = "setup.py pyproject.toml MANIFEST.in CMakeLists.txt README.md LICENSE constraints.txt csrc diffmem"
    subprocess.run(f"cp -rp {files} {into} && rm -f {into}/diffmem/_C*", shell=True, check=True, cwd=ROOT)
    for stray in ("tests/test_stray.py", "benchmarks/stray.py", "build/lib/diffmem/stray.py"):
        (into / stray).parent.mkdir(parents=True)
        (into / stray).touch()
    return into


def preloaded() -> str | None:
    """What has to be preloaded where the core is instrumented: libasan, and libstdc++, whose exceptions it has to find.
    None: g++ has no AddressSanitizer here."""
    if shutil.which("g++") is None:
        return None
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return " ".join(libraries) if all(map(os.path.isabs, libraries)) else None


@dataclass(frozen=True)
class Instrumented:
    """The wheel that the source distribution gives, and the core in it.

    Attributes:
        files: Of the source distribution, by their paths in it.
        wheel: Its core is under sanitizers where g++ has them.
        core: That module, beside the program core_check and what both are linked of.
    """

    files: frozenset[str]
    wheel: Path
    core: Path


def instrumented(temporary: Path) -> Instrumented:
    """Builds them; the wheel lies in `temporary`, an empty folder."""
    folder = ROOT / "build" / f"sanitize-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    source, cmake = folder / "source", folder / "cmake"
    for name in ("checkout", "sdist", "wheel"):
        (temporary / name).mkdir()
    archive, _ = distribution("sdist", checkout(temporary / "checkout"), temporary / "sdist")
    options = ["-DDIFFMEM_CHECK=ON", "-DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF"]
    if preloaded() is None:
        options += ["-DCMAKE_CXX_FLAGS_RELEASE=-O0"]
    else:
        # -Og takes half of -O1's time, and what it gives is as fast.
        options += ["-DCMAKE_CXX_FLAGS_RELEASE=-Og", "-DCMAKE_CXX_COMPILER=g++", "-DDIFFMEM_SANITIZE=ON"]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(source, ignore_errors=True)
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
        next(folder.glob("diffmem-*")).rename(source)
        files = frozenset(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
        # What no distribution holds: the program.
        (source / "tests" / "csrc").mkdir(parents=True)
        shutil.copy2(ROOT / "tests" / "csrc" / "core_check.cpp", source / "tests" / "csrc")
        wheel, _ = distribution(
            "wheel", source, temporary / "wheel", DIFFMEM_NATIVE="on", DIFFMEM_BUILD_DIR=str(cmake),
            CMAKE_ARGS=" ".join(options),
        )  # fmt: skip
        without_old_objects(cmake)
    return Instrumented(files, wheel, next(cmake.glob("_C*.so")))


def without_old_objects(folder: Path) -> None:
    """Deletes what an earlier build made of files that are no longer there, or put elsewhere."""
    environment = {**os.environ, "PATH": PATH}
    subprocess.run(["ninja", "-C", folder, "-t", "cleandead"], capture_output=True, check=True, env=environment)
