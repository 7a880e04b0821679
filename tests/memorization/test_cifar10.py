"""The main job on real images: CIFAR-10's test images audited against its training images."""

import numpy as np
import pytest

import diffmem


@pytest.fixture(scope="module")
def audit(cifar10) -> diffmem.Audit:
    return diffmem.audit(cifar10 / "cifar10-test.zip", cifar10 / "cifar10-train.zip")


def test_figures_of_the_whole_set(audit):
    assert (audit.count, audit.raw_count, audit.total, audit.training_size) == (6, 6, 10_000, 50_000)
    assert audit.mean_rms == pytest.approx(41.999, abs=5e-4)
    assert audit.neighbors.squared_distances.dtype == np.int64


def test_distances_are_those_of_the_pixels(audit):
    rows = np.flatnonzero(audit.memorized)
    nearest = audit.training.images[audit.neighbors.indices[rows]].astype(np.int64)
    differences = audit.generated.images[rows][:, None].astype(np.int64) - nearest
    np.testing.assert_array_equal(audit.neighbors.squared_distances[rows], np.square(differences).sum((2, 3, 4)))
