"""The package without its compiled core: installs, says so, and passes the core of this suite on PyTorch alone."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# -S: without site's .pth files, or the editable installation of this checkout would lend its compiled core.
PYTHON = [sys.executable, "-S"]
CORE = ["tests/ops/test_nearest.py", "tests/search", "tests/memorization/test_audit.py"]


@pytest.fixture(scope="module")
def pure(tmp_path_factory) -> dict[str, str]:
    """Environment of an installation made with DIFFMEM_NATIVE=off."""
    target = tmp_path_factory.mktemp("pure")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
    ]
    environment = {**os.environ, "DIFFMEM_NATIVE": "off", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    # Built from a copy of what the installation needs, so that the checkout's own build is left alone.
    source = tmp_path_factory.mktemp("source")
    files = "setup.py pyproject.toml CMakeLists.txt README.md LICENSE csrc diffmem"
    subprocess.run(f"cp -r {files} {source} && rm -f {source}/diffmem/_C*", shell=True, check=True, cwd=ROOT)
    subprocess.run([*command, str(source)], check=True, env=environment)
    del environment["DIFFMEM_NATIVE"]  # what was installed must know by itself
    packages = sysconfig.get_paths()["purelib"]
    return {**environment, "PYTHONPATH": f"{target}:{packages}", "HYPOTHESIS_PROFILE": "brief", "PURE": str(target)}


def test_installs_and_says_why(pure, tmp_path):
    command = [*PYTHON, "-m", "diffmem", "info", "--json"]
    facts = json.loads(
        subprocess.run(command, env=pure, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    )
    assert facts["native"]["present"] is False
    assert facts["native"]["why"] == "DIFFMEM_NATIVE=off when it was installed"
    where = subprocess.run(
        [*PYTHON, "-c", "import diffmem; print(diffmem.__file__)"],
        env=pure,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(pure["PURE"])


def test_core_of_the_suite_passes(pure, tmp_path):
    command = [*PYTHON, "-m", "pytest", "-q", "-x", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, *(str(ROOT / path) for path in CORE)], env=pure, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
