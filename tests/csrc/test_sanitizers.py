"""The op tests once more, with the core under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import core_builds
import pytest
from core_builds import preloaded

ROOT = Path(__file__).parents[2]
TESTS = [
    "test_affine_alignment.py", "test_alignment.py", "test_arguments.py", "test_conv3x3.py", "test_group_norm_silu.py",
    "test_nearest.py", "test_posterior_mean.py",
]  # fmt: skip
# The core in place of the one that is installed. Python itself is not instrumented: libasan comes first by LD_PRELOAD.
RUN = """
import importlib.util, sys
import diffmem
spec = importlib.util.spec_from_file_location("diffmem._C", sys.argv[1])
diffmem._C = sys.modules["diffmem._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(diffmem._C)
import pytest

# Left out is what would run without that core: other implementations, what Inductor compiles, whose code is not ours,
# and what starts processes, which load the installed core; and, of a test's kinds of values, those that
# change no address.
class ReachTheCore:
    def pytest_collection_modifyitems(self, items):
        def reaches(item):
            given = getattr(item, "callspec", None)
            given = set() if given is None else set(map(str, given.params.values()))
            values = {"torch", "reference", "attention", "300.0", "unit", "lengths"}
            words = ("compile", "opcheck", "registered", "forked", "refuses_what_numbers_tell")
            return not given & values and not any(word in item.name for word in words)

        kept = [item for item in items if reaches(item)]
        assert len(kept) > 0.5 * len(items)
        items[:] = kept

sys.exit(pytest.main(sys.argv[2:], plugins=[ReachTheCore()]))
"""
# What the core refuses, in the process that has the instrumented one.
REFUSALS = """
from test_arguments import REFUSALS
def test_refusals():
    exec(REFUSALS, {})
"""


@pytest.fixture(scope="module")
def libraries() -> str:
    if (found := preloaded()) is None:
        pytest.skip("g++ was not found, or has no AddressSanitizer here")
    return found


@pytest.fixture(scope="module")
def core(libraries, tmp_path_factory) -> Path:
    """The instrumented module."""
    pytest.importorskip("pybind11", reason="pybind11, which builds the core, is missing")
    core_builds.found("cmake", "ninja")
    return core_builds.instrumented(tmp_path_factory.mktemp("instrumented")).core


def run(core: Path, libraries: str, log: Path, *arguments: str) -> tuple[int, str]:
    """Status and output of pytest with the instrumented core, and what the sanitizers reported."""
    environment = {
        **os.environ,
        "LD_PRELOAD": libraries,
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode=66:log_path={log}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:exitcode=66:log_path={log}",
        "HYPOTHESIS_PROFILE": "brief",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(core), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    reports = "".join(path.read_text() for path in log.parent.glob(f"{log.name}.*"))
    return done.returncode, done.stdout[-3000:] + done.stderr[-2000:] + reports[:6000]


def test_files_of_an_instruction_set_share_no_code(core):
    """A function that several files define is one for the whole program: with AVX-512 in it, perhaps, for all."""
    objects = [each for each in core.parent.rglob("*.o") if each.name.split(".")[0].endswith(("_avx2", "_avx512"))]
    assert {op_of(each) for each in objects} >= {
        "alignment",
        "conv3x3",
        "group_norm_silu",
        "nearest",
        "posterior_mean",
        "vector_scan",
    }
    for each in objects:
        listed = subprocess.run(["nm", "-C", "--defined-only", each], capture_output=True, text=True, check=True).stdout
        shared = [line for line in listed.splitlines() if line[17:18] in "TWu"]
        level = "avx512" if "_avx512" in each.name else "avx2"
        assert [line.split()[-1] for line in shared] == [f"diffmem::{op_of(each)}::{level}_kernels()"], shared


def op_of(compiled: Path) -> str:
    return compiled.name.split("_avx")[0]


def test_instruction_sets_against_plain_loops(core):
    """Those of this processor, with the core under the sanitizers; test_core_check.py runs those of ARM."""
    done = subprocess.run([core.parent / "core_check"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.startswith("levels: portable"), done.stdout


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_ops_under_sanitizers(every, core, libraries, tmp_path):
    """Every day arguments, what the core refuses, and codes of vectors; with --exhaustive the tests of all ops. What
    the ops compute runs under the sanitizers in `test_instruction_sets_against_plain_loops`."""
    (tmp_path / "test_refusals.py").write_text(REFUSALS)
    ops = [f"tests/ops/{name}" for name in (TESTS if every else ["test_arguments.py"])]
    status, said = run(
        core, libraries, tmp_path / "report", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *ops,
        "tests/search/test_vectors.py::test_codes_on_every_path", str(tmp_path / "test_refusals.py"),
    )  # fmt: skip
    assert status == 0, said
    assert " passed" in said


def test_the_sanitizer_sees_the_core(core, libraries, tmp_path):
    """A read past the end, which the core cannot know of, ends the process with the sanitizer's report."""
    test = tmp_path / "test_overrun.py"
    test.write_text(
        "import numpy as np\n"
        "from diffmem import _C\n"
        "def test_overrun():\n"
        "    rows, out = np.zeros(2**20, np.uint8), np.zeros(8, np.int64)\n"
        "    view = _C.NearestRows(rows.ctypes.data, 2**15 + 1, 32, 32, _C.NearestType.u8)\n"
        "    query = _C.NearestRows(rows.ctypes.data, 1, 32, 32, _C.NearestType.u8)\n"
        "    _C.nearest_search_dense(view, query, 1, out.ctypes.data, out.ctypes.data, 1)\n"
    )
    status, said = run(
        core, libraries, tmp_path / "report", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(test)
    )
    assert status == 66, said
    assert "AddressSanitizer: heap-buffer-overflow" in said
