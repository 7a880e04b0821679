"""Settings of the whole suite."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# HYPOTHESIS_PROFILE=thorough looks longer; the default is for every day.
settings.register_profile("everyday", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("brief", deadline=None, derandomize=True, max_examples=10)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "everyday"))

torch.set_flush_denormal(True)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """Folder with CIFAR-10 (JPEG): cifar10-train.zip and cifar10-test.zip."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "cifar10-train.zip").exists():
        pytest.skip(f"CIFAR-10 (JPEG) is not part of the package and not in {folder}")
    return folder
