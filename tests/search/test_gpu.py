"""The ways of searching on a GPU, where they can run on a CPU too, against integers; and the choice between them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffmem.ops.nearest import nearest
from diffmem.search import gpu

CPU = torch.device("cpu")
WAYS = ["int8 products"]
try:
    import faiss  # noqa: F401

    WAYS.append("faiss")
except ImportError:
    pass


@pytest.mark.parametrize("way", WAYS)
@given(
    seed=st.integers(0, 2**32 - 1),
    levels=st.sampled_from([2, 4, 256]),
    n=st.integers(1, 90),
    q=st.integers(1, 40),
    d=st.integers(1, 70),
    block=st.sampled_from([16, 1 << 15]),
    parts=st.booleans(),
    data=st.data(),
)
def test_every_way_equals_the_reference(way, seed, levels, n, q, d, block, parts, data):
    k = data.draw(st.integers(1, n))
    random = np.random.default_rng(seed)
    values = random.choice(np.array([0, 255, 128, 127, *range(levels)])[:levels], (n + q, d)).astype(np.uint8)
    queries, training = torch.from_numpy(values[:q]), torch.from_numpy(values[q:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "TRAINING_BLOCK", block)
        patch.setattr(gpu, "QUERY_BLOCK", 16)
        rows = gpu.GpuRows(training, CPU, way)
        if parts:
            rows.part = max(1, n // 3)
        squared, indices = rows(queries, k)
    expected_squared, expected_indices = nearest(queries, training, k, impl="reference")
    torch.testing.assert_close(squared, expected_squared, rtol=0, atol=0)
    torch.testing.assert_close(indices, expected_indices, rtol=0, atol=0)


@pytest.mark.skipif("faiss" not in WAYS, reason="FAISS is optional: pip install 'diffmem[faiss]'")
def test_what_float32_cannot_decide_is_not_certified(monkeypatch):
    """Hundreds of images at nearly the same large distance: FAISS's order is noise there."""
    random = np.random.default_rng(0)
    training = np.zeros((400, 20_000), np.uint8)
    training[np.arange(400), random.permutation(400)] = 1
    query = torch.full((1, 20_000), 255, dtype=torch.uint8)
    again = []
    products = gpu._Part._products
    monkeypatch.setattr(gpu._Part, "_products", lambda part, queries, k: again.append(k) or products(part, queries, k))
    squared, indices = gpu.GpuRows(torch.from_numpy(training), CPU, "faiss")(query, 3)
    assert again == [3]
    assert indices.tolist() == [[0, 1, 2]]
    assert len(set(squared[0].tolist())) == 1


def test_the_fastest_is_chosen_and_remembered(monkeypatch):
    now = [0.0]

    def way(seconds):
        def run():
            now[0] += seconds

        return run

    ways = {"kernel": way(3.0), "int8 products": way(1.0), "faiss": way(2.0)}
    assert gpu.fastest(ways, CPU, clock=lambda: now[0]) == "int8 products"

    monkeypatch.setattr(gpu, "_fastest", {})
    measured = []
    monkeypatch.setattr(gpu, "available_ways", lambda device: ["int8 products", "faiss"])
    monkeypatch.setattr(gpu, "fastest", lambda ways, device: measured.append(sorted(ways)) or "int8 products")
    images = torch.randint(0, 256, (50, 12), dtype=torch.uint8)
    for _ in range(2):
        assert gpu.GpuRows(images, CPU)(images[:5], 1)[1].flatten().tolist() == [0, 1, 2, 3, 4]
    assert measured == [["faiss", "int8 products"]]


def test_ways_on_this_machine():
    assert gpu.available_ways(CPU) == ["int8 products"]
