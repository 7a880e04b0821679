"""The search under pytest-benchmark: `pytest benchmarks --benchmark-only`, for comparing two commits."""

import numpy as np
import pytest

from diffmem.data import load_images
from diffmem.search import TrainingIndex


@pytest.mark.parametrize("method", ["filtered", "dense"])
@pytest.mark.parametrize("queries", [1, 32, 1000])
def test_nearest_patches(benchmark, method, queries):
    pytest.importorskip("sklearn", reason="scikit-learn, which holds the photographs, is missing")
    images = load_images("builtin:patches?n=11000").images
    index = TrainingIndex(images[1000:], method=method)
    found = benchmark(index.query, images[:queries], 2)
    assert np.all(found.squared_distances[:, 0] <= found.squared_distances[:, 1])
