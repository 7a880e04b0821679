"""Build of the compiled core `diffmem._C` (CMake + Ninja + pybind11).

The build needs neither torch nor a GPU. Two environment variables steer it:

DIFFMEM_NATIVE = auto | on | off
    auto (default): build the core; where that fails (no C++20 compiler, say), install without it and say why.
    on: a failing build fails the installation. off: do not build; the PyTorch implementations are used.
DIFFMEM_CUDA = auto | on | off
    auto (default): compile the CUDA sources where nvcc is found. on: fail without nvcc. off: CPU only.

A wheel that must hold the CUDA kernels (DIFFMEM_CUDA=on) bears CUDA's version in its own: diffmem-0.1.0+cu130.

Further options for CMake are taken from CMAKE_ARGS, as conda-forge and others set it. A wheel without the core runs on
every platform and is tagged so: py3-none-any.

What was built, and why not what was not, is written to `diffmem/_build_info.json`, which `diffmem info` prints.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


def option(name: str) -> str:
    value = os.environ.get(name, "auto").lower()
    if value not in ("auto", "on", "off"):
        raise SystemExit(f"{name}={value}: choose auto, on or off")
    return value


WITHOUT_CORE = "warning: diffmem is built without its compiled core (see `diffmem info`): {}"
NATIVE, CUDA = option("DIFFMEM_NATIVE"), option("DIFFMEM_CUDA")


class BuildFailed(Exception):
    """The native core could not be built; the message is the reason in one line."""


def tool(name: str) -> str:
    """Path of a build tool: the one beside this Python (a build environment's), else the one on PATH."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if not found:
        raise BuildFailed(f"{name} was not found")
    return found


def cuda_label() -> str:
    """What the version of a wheel with CUDA kernels ends in, "+cu130" for CUDA 13.0; "" for others, and for sources."""
    if NATIVE == "off" or CUDA != "on" or "sdist" in sys.argv or not (nvcc := shutil.which("nvcc")):
        return ""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    return f"+cu{release[1]}{release[2]}" if release else ""


def run(command: list[str]) -> None:
    """Run a build step, showing its output; a failure's reason is the first error it printed."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildFailed(f"{Path(command[0]).name} cannot be run: {error.strerror}") from error
    print(done.stdout)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        first = next((number for number, line in enumerate(lines) if "error" in line.lower()), len(lines) - 1)
        if lines[first].startswith("CMake Error at"):  # where; the lines after it say what
            first += 1
        reason = " ".join(lines[first : first + 2])[:240]
        raise BuildFailed(f"{Path(command[0]).name} failed: {reason}")


class BuildNative(build_ext):
    """Configure and build with CMake, then put the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        info = {"native": False, "native_reason": "", "cuda": False, "cuda_reason": ""}
        try:
            info.update(self.cmake(Path(self.get_ext_fullpath(ext.name)).resolve()))
        except BuildFailed as failure:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # of an earlier build
            if NATIVE == "on":
                raise SystemExit(f"DIFFMEM_NATIVE=on, but the core was not built: {failure}") from failure
            info["native_reason"] = info["cuda_reason"] = str(failure)
            print(WITHOUT_CORE.format(failure), file=sys.stderr)
        write_build_info(self.package_folder(), info)

    def cmake(self, target: Path) -> dict:
        if missing := [name for name in ("CMakeLists.txt", "csrc/module.cpp") if not (ROOT / name).exists()]:
            raise BuildFailed(f"these sources are incomplete: {missing[0]} is missing")
        try:
            import pybind11  # present in every build environment that pyproject.toml describes
        except ImportError as error:
            raise BuildFailed("pybind11 was not found") from error
        # One folder for all builds of this checkout, so that rebuilding after an edit is quick.
        build = Path(os.environ.get("DIFFMEM_BUILD_DIR", ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"))
        build.mkdir(parents=True, exist_ok=True)
        status = build / "diffmem_build_info.json"
        status.unlink(missing_ok=True)
        configure = [
            tool("cmake"), "-S", str(ROOT), "-B", str(build), *self.generator(),
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDIFFMEM_CUDA={CUDA}", *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        run(configure)
        run([tool("cmake"), "--build", str(build), "--config", "Release"])
        module = next(build.glob("_C*.so"), None) or next(build.glob("_C*.pyd"), None)
        if module is None:
            raise BuildFailed("CMake ended without building the module _C")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a process that has the old module mapped keeps it.
        shutil.copy2(module, target.with_suffix(".new"))
        os.replace(target.with_suffix(".new"), target)
        return json.loads(status.read_text())

    def generator(self) -> list[str]:
        if sys.platform == "win32" and not shutil.which("cl"):  # Visual Studio's own, which finds its compiler
            return ["-A", "ARM64" if self.plat_name == "win-arm64" else "x64"]
        options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-DCMAKE_BUILD_TYPE=Release"]
        if sys.platform == "darwin" and (wanted := re.findall(r"-arch (\S+)", os.environ.get("ARCHFLAGS", ""))):
            options.append(f"-DCMAKE_OSX_ARCHITECTURES={';'.join(wanted)}")
        return options

    def package_folder(self) -> Path:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        return ROOT / "diffmem" if in_place else Path(self.build_lib).resolve() / "diffmem"

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


class BuildWheel(bdist_wheel):
    """The wheel's name says whether it holds the core, which is known once that has been built, or has not."""

    def run(self) -> None:
        library = Path(self.get_finalized_command("build").build_lib)
        shutil.rmtree(library, ignore_errors=True)  # files that an earlier build left would be packed, too
        self.run_command("build")
        if not json.loads((library / "diffmem" / "_build_info.json").read_text())["native"]:
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()


class BuildPython(build_py):
    """Where no extension is asked for, the reason still has to be on record."""

    def run(self) -> None:
        super().run()
        if NATIVE == "off":
            reason = "DIFFMEM_NATIVE=off when it was installed"
            folder = ROOT if getattr(self, "editable_mode", False) else Path(self.build_lib)
            info = {"native": False, "native_reason": reason, "cuda": False, "cuda_reason": reason}
            write_build_info(folder / "diffmem", info)
            print(WITHOUT_CORE.format(reason), file=sys.stderr)


def write_build_info(folder: Path, info: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")


setup(
    ext_modules=[] if NATIVE == "off" else [Extension("diffmem._C", sources=[], optional=False)],
    options={"egg_info": {"tag_build": cuda_label()}},
    cmdclass={"bdist_wheel": BuildWheel, "build_ext": BuildNative, "build_py": BuildPython},
)
