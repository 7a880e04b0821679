"""Distributions: the source distribution gives a wheel with the compiled core; a wheel without it says so, installs,
and passes the core of this suite on PyTorch alone."""

import json
import os
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import core_builds
import pytest
from core_builds import distribution

from diffmem import __version__

ROOT = Path(__file__).parents[1]
# -S: without site's .pth files, or the editable installation of this checkout would lend its compiled core.
PYTHON = [sys.executable, "-S"]
PACKAGES = sysconfig.get_paths()["purelib"]
CORE = [
    *(f"tests/search/test_{name}.py" for name in ("index_exact", "index_stored", "duplicates")),
    "tests/ops/test_nearest.py",
    "tests/memorization/test_audit.py",
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return core_builds.checkout(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def pure(checkout, tmp_path_factory) -> dict[str, str]:
    """Environment of an installation made with DIFFMEM_NATIVE=off."""
    target = tmp_path_factory.mktemp("pure")
    wheel, said = distribution("wheel", checkout, tmp_path_factory.mktemp("wheel"), DIFFMEM_NATIVE="off")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "warning: diffmem is built without its compiled core" in said
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run(command, check=True, env=environment)
    return {**environment, "PYTHONPATH": f"{target}:{PACKAGES}", "HYPOTHESIS_PROFILE": "brief", "PURE": str(target)}


def test_sdist_gives_a_wheel_with_the_core(tmp_path):
    """The one whose core test_sanitizers.py puts through the op tests."""
    (tmp_path / "made").mkdir()
    instrumented = core_builds.instrumented(tmp_path / "made")
    wheel = instrumented.wheel
    assert not [name for name in instrumented.files if name.startswith(("tests", "benchmarks"))]
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "wheel")
        modules = {name for name in names if name.startswith("diffmem/_C.")}
        assert sum(each.compress_size for each in archive.infolist() if each.filename not in modules) < 3e6
    ours = {
        str(path.relative_to(ROOT)) for path in (ROOT / "diffmem").rglob("*")
        if path.suffix in (".py", ".j2", ".json") or path.name == "py.typed"
    }  # fmt: skip
    assert len(modules) == 1
    assert names - modules == ours | {"diffmem/_build_info.json"}
    code = """
        import json, torch, diffmem, diffmem._C
        from diffmem.environment import describe
        from diffmem.ops.nearest import nearest
        rows = torch.arange(24, dtype=torch.uint8).reshape(6, 4)
        nearest(rows, rows, 2, impl="native")
        print(json.dumps({"core": diffmem._C.__file__, "info": describe()["native"]}))
    """
    result = subprocess.run(
        [*PYTHON, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'wheel'}:{PACKAGES}", "ASAN_OPTIONS": "detect_leaks=0",
             **({"LD_PRELOAD": libraries} if (libraries := core_builds.preloaded()) else {})},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["core"].startswith(str(tmp_path / "wheel"))
    assert found["info"]["present"] is True


def test_version_of_a_wheel_says_its_cuda(checkout, tmp_path):
    """Only where DIFFMEM_CUDA=on sees to it that the kernels are there; the version in the sources has no label."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    code = "import sys; from setuptools.build_meta import prepare_metadata_for_build_wheel as p; p(sys.argv[1])"
    made = {}
    for choice in ("on", "auto"):
        (folder := tmp_path / choice).mkdir()
        environment = {**os.environ, "PATH": f"{nvcc.parent}:{os.environ['PATH']}", "DIFFMEM_CUDA": choice}
        subprocess.run(
            [sys.executable, "-c", code, folder], cwd=checkout, check=True, capture_output=True, env=environment
        )
        made[choice] = next(folder.glob("*.dist-info")).name
    plain = f"diffmem-{__version__}"
    assert made == {"on": f"{plain}+cu128.dist-info", "auto": f"{plain}.dist-info"}


def test_wheel_that_could_not_have_the_core_is_for_every_platform_and_says_why(checkout, tmp_path):
    wheel, said = distribution("wheel", checkout, tmp_path, DIFFMEM_NATIVE="auto", CXX="/no/compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "warning: diffmem is built without its compiled core" in said
    with zipfile.ZipFile(wheel) as archive:
        info = json.loads(archive.read("diffmem/_build_info.json"))
        assert not [name for name in archive.namelist() if "/_C." in name or "stray" in name]
    assert info["native"] is False
    assert "/no/compiler" in info["native_reason"]


def test_installs_and_says_why(pure, tmp_path):
    code = "import diffmem, runpy, sys; print(diffmem.__file__); sys.argv = ['diffmem', 'info', '--json']; "
    code += "runpy.run_module('diffmem', run_name='__main__', alter_sys=True)"
    done = subprocess.run([*PYTHON, "-c", code], env=pure, cwd=tmp_path, capture_output=True, text=True, check=True)
    where, _, printed = done.stdout.partition("\n")
    assert where.startswith(pure["PURE"])
    native = json.loads(printed)["native"]
    assert native["present"] is False
    assert native["why"] == "DIFFMEM_NATIVE=off when it was installed"


def test_core_of_the_suite_passes(pure, tmp_path):
    command = [*PYTHON, "-m", "pytest", "-q", "-x", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    command += ["-k", "not operator_contract and not faiss"]  # which the core has no part in anyway
    result = subprocess.run(
        [*command, *(str(ROOT / path) for path in CORE)], env=pure, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
