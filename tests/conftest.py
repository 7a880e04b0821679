"""Settings of the whole suite."""

import gc
import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# HYPOTHESIS_PROFILE=thorough looks longer; the default is for every day.
settings.register_profile("everyday", deadline=None, derandomize=True, print_blob=True, max_examples=50)
settings.register_profile("brief", deadline=None, derandomize=True, max_examples=10)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "everyday"))

torch.set_flush_denormal(True)

# What says "auto" here, and in every process that a test starts, means the CPU, on machines with a GPU too; tests of
# the GPU (marked gpu) name their device.
os.environ["DIFFMEM_DEVICE"] = "cpu"

# Ray's workers, which are nice else, would wait for the tests that run beside; those that are started beforehand take
# seconds from them; and a node that is gone is noticed in three seconds, not in fifteen.
os.environ |= {
    "RAY_worker_niceness": "0", "RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0",
    "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "500",
}  # fmt: skip

ROOT = Path(__file__).parents[1]
# Modules that take longest, the longest first; test_install.py uses what test_sanitizers.py builds.
LONGEST = (
    "test_sanitizers.py", "test_readme.py", "test_gpu_benchmark.py", "test_triton_kernels.py", "test_core_check.py",
    "test_workers.py", "test_install.py", "test_run.py", "test_nearest_cuda.py", "test_docs.py",
    "test_training_loop.py", "test_trajectory.py", "test_demo.py", "test_networks.py", "test_hostile_files.py",
    "test_cli_studies.py", "test_cifar10.py", "test_cli_sample.py", "test_examples.py",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive", action="store_true", help="every combination, where a run every day takes one of each kind"
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator:
    """What is imported and collected stays until the end: it is not searched for garbage, neither now nor by tests."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or modules that count what is left at the end (nanobind's) call all of it leaked


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("exhaustive"):
        items[:] = [item for item in items if item.get_closest_marker("exhaustive") is None]
    # Side by side, with modules as they come (--no-loadscope-reorder): the longest may not be the last to begin.
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def one_thread():
    """One thread of PyTorch's, so that sums have the same order as in processes that a test starts; and the tests'
    networks are so small that they only lose by more, most of all where the processor is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """Folder with CIFAR-10 (JPEG): cifar10-train.zip and cifar10-test.zip."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "cifar10-train.zip").exists():
        pytest.skip(f"CIFAR-10 (JPEG) is not part of the package and not in {folder}")
    return folder
