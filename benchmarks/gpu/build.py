"""The compiled core for the GPU that is there: what is importable, or CMake alone for this GPU's architecture, built in
a folder below build/ and put into the place of diffmem/_C."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.runner import ROOT

FOUND = """
import json
from diffmem.ops.registry import build_info, native_module
module = native_module()
# What is written of a build may be of another Python's: the module itself says whether it is there.
print(json.dumps({**build_info(), "present": module is not None, "cuda": bool(module and module.with_cuda)}))
"""


def run(out: Path, interpret: bool, deadline: float) -> None:
    """Raises SystemExit where a build is needed and fails."""
    found = core_there()
    if found.get("cuda") or interpret:
        print(f"the compiled core that is there: {json.dumps(found)}")
        if interpret:  # what would be run
            print(" ".join(configure("90", ROOT / "build" / "gpu-90")[0]))
        return
    architecture = compute_capability()
    folder = ROOT / "build" / f"gpu-{architecture}-{sys.implementation.cache_tag}"
    began = time.monotonic()
    try:
        module = build(architecture, folder, deadline - time.monotonic())
    except (OSError, subprocess.SubprocessError, ImportError) as error:
        raise SystemExit(f"the compiled core was not built: {reason(error)}") from error
    put(module, folder / "diffmem_build_info.json", ROOT / "diffmem")
    found = core_there()
    print(f"built for sm_{architecture} in {time.monotonic() - began:.0f} s: {json.dumps(found)}")
    if not found.get("cuda"):
        raise SystemExit("the core that was built cannot be used; see above")


def core_there() -> dict:
    """What a process of its own finds, so that what is built later can still be imported in another."""
    done = subprocess.run([sys.executable, "-c", FOUND], cwd=ROOT, capture_output=True, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"present": False, "cuda": False, "native_reason": done.stderr.strip()[-300:]}


def compute_capability() -> str:
    """Of the first GPU, as "90"; asks nvidia-smi, else PyTorch."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        return str(round(float(found) * 10))
    except (OSError, subprocess.SubprocessError, ValueError):
        import torch

        return "{}{}".format(*torch.cuda.get_device_capability(0))


def tool(name: str, *elsewhere: str) -> str | None:
    """Path of a tool: beside this Python, on PATH, or in one of these folders."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), *elsewhere]
    return shutil.which(name, path=os.pathsep.join(folders))


def configure(architecture: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """CMake's command for this architecture alone, and its environment."""
    cuda = [str(Path(home) / "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    command = [tool("cmake") or "cmake", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
    if (ninja := tool("ninja")) is not None:
        command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", "-DDIFFMEM_CUDA=on",
                f"-DDIFFMEM_CUDA_ARCHITECTURES={architecture}-real"]  # fmt: skip
    try:
        import pybind11

        command.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    except ImportError:
        pass  # CMake may know another
    variables = dict(os.environ)
    if (nvcc := tool("nvcc", *cuda)) is not None:
        variables["CUDACXX"] = nvcc
    return command, variables


def build(architecture: str, folder: Path, limit: float, run: Callable = subprocess.run) -> Path:
    """Configures, builds and returns the module."""
    folder.mkdir(parents=True, exist_ok=True)
    command, variables = configure(architecture, folder)
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for step in (command, [command[0], "--build", str(folder), "--parallel", str(jobs)]):
        run(step, check=True, env=variables, timeout=limit)
    modules = [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]
    if not modules:
        raise ImportError("CMake ended without building the module _C")
    return modules[0]


def put(module: Path, info: Path, package: Path) -> None:
    """The module and what was built into the package; a process that has the old module mapped keeps it."""
    for source, name in ((module, module.name), (info, "_build_info.json")):
        new = package / f".{name}.new"
        shutil.copy2(source, new)
        new.replace(package / name)


def reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{' '.join(map(str, error.cmd[:3]))} … failed, see above"
    return str(error)
