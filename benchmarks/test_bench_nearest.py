"""The search under pytest-benchmark: `pytest benchmarks --benchmark-only`, with its own stored runs and comparisons
(`--benchmark-autosave`, `--benchmark-compare`)."""

import numpy as np
import pytest
import torch

from diffmem.data import load_images
from diffmem.ops.nearest import nearest
from diffmem.search import TrainingIndex


@pytest.fixture(scope="module")
def patches():
    """10,000 training images and 1,000 queries, and the queries' exact neighbors by plain PyTorch."""
    pytest.importorskip("sklearn", reason="scikit-learn, which holds the photographs, is missing")
    images = load_images("builtin:patches?n=11000").images
    training, queries = images[1000:], images[:1000]
    rows = [torch.from_numpy(each.reshape(len(each), -1)) for each in (queries[:32], training)]
    return training, queries, nearest(*rows, 2, impl="torch")


@pytest.mark.parametrize("method", ["filtered", "dense"])
@pytest.mark.parametrize("queries", [1, 32, 1000])
def test_nearest_patches(benchmark, patches, method, queries):
    training, images, (distances, indices) = patches
    index = TrainingIndex(training, method=method)
    found = index.query(images[:queries], 2)
    np.testing.assert_array_equal(found.squared_distances[:32], distances[:queries])
    np.testing.assert_array_equal(found.indices[:32], indices[:queries])
    benchmark(index.query, images[:queries], 2)
