"""The backends of the search on a GPU, where they can run on a CPU too, against exact arithmetic; and the choice
between them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffmem.ops.nearest import cuda, nearest
from diffmem.ops.nearest.blocked import nearest_blocked
from diffmem.search import TrainingIndex, gpu

CPU = torch.device("cpu")
BACKENDS = ["int8"]
try:
    import faiss  # noqa: F401

    BACKENDS.append("faiss")
except ImportError:
    pass


def assert_equal(found, queries, training, k):
    for ours, expected in zip(found, nearest(queries, training, k, impl="reference"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
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
def test_every_backend_equals_the_reference(backend, seed, levels, n, q, d, block, parts, data):
    k = data.draw(st.integers(1, n))
    random = np.random.default_rng(seed)
    values = random.choice(np.array([0, 255, 128, 127, *range(levels)])[:levels], (n + q, d)).astype(np.uint8)
    queries, training = torch.from_numpy(values[:q]), torch.from_numpy(values[q:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "TRAINING_BLOCK", block)
        patch.setattr(gpu, "QUERY_BLOCK", 16)
        patch.setattr(gpu, "SEND_BYTES", 8 * d * 7)
        rows = gpu.GpuRows(training, CPU, backend)
        if parts:
            rows.part = max(1, n // 3)
        found = rows(queries, k)
    assert_equal(found, queries, training, k)


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-12])  # about a mean of length 1, beside which the last is nothing
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 300),
    d=st.integers(1, 40),
    block=st.sampled_from([16, 1 << 15]),
    copies=st.booleans(),
    data=st.data(),
)
def test_vectors_by_rounded_products(spread, seed, n, d, block, copies, data):
    """Against every difference in float64, for vectors without and with equal ones; ties go to the lower index."""
    k = data.draw(st.integers(1, min(n, 70)))
    random = np.random.default_rng(seed)
    values = (1 + spread * random.standard_normal((n + 9, d))).astype(np.float32)
    if copies:
        values[9 + n // 2 :] = values[9 : 9 + n - n // 2]
        values[:4] = values[9 : 9 + min(4, n)][:1]
    queries, training = torch.from_numpy(values[:9]), torch.from_numpy(values[9:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "TRAINING_BLOCK", block)
        patch.setattr(gpu, "TF32_PROPOSALS", (2, 9))
        found = gpu.GpuRows(training, CPU, "tf32")(queries, k)
    expected = nearest_blocked(queries, training, k)  # the same float64 sums
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@given(seed=st.integers(0, 2**32 - 1), d=st.integers(1, 300), scale=st.sampled_from([1e-20, 1.0, 1e15]))
def test_the_margin_covers_what_rounding_does(seed, d, scale):
    random = np.random.default_rng(seed)
    values = (scale * (3 + random.standard_normal((60, d)))).astype(np.float32)
    queries, part = torch.from_numpy(values[:10]), gpu._Floats(torch.from_numpy(values[10:]), CPU)
    x = queries - part.mean
    norms = x.double().square().sum(dim=1)
    y = gpu.to_tf32(part.values - part.mean)
    approximate = torch.addmm(part.norms.float(), gpu.to_tf32(x), y.T, alpha=-2).double() + norms[:, None]
    exact = (queries[:, None].double() - part.values.double()).square().sum(dim=2)
    assert bool(((approximate - exact).abs() <= part.margin(norms)[:, None]).all())


def test_rounding_to_tf32():
    values = torch.tensor([1 + 2**-11, 1 + 2**-12, -(1 + 3 * 2**-11), 0.0, -0.0, 2.0**-140, 3e38], dtype=torch.float32)
    expected = torch.tensor([1 + 2**-10, 1.0, -(1 + 2**-9), 0.0, -0.0], dtype=torch.float32)
    assert torch.equal(gpu.to_tf32(values)[:5], expected)
    assert float((gpu.to_tf32(values) - values).abs()[5]) <= 2.0**-137
    assert float(((gpu.to_tf32(values) - values) / values)[6].abs()) <= 2.0**-11


def test_vectors_too_large_for_float32_products_are_left_to_float64():
    values = torch.tensor([[1e30, 0.0], [1e30, 1e20], [0.0, 0.0]])
    _, indices = gpu.GpuRows(values, CPU, "tf32")(values, 1)
    assert indices.flatten().tolist() == [0, 1, 2]


@pytest.mark.skipif("faiss" not in BACKENDS, reason="FAISS is optional: pip install 'diffmem[faiss]'")
def test_what_float32_cannot_decide_is_not_certified(monkeypatch):
    """Hundreds of images at nearly the same large distance: FAISS's order is noise there."""
    random = np.random.default_rng(0)
    training = np.zeros((400, 20_000), np.uint8)
    training[np.arange(400), random.permutation(400)] = 1
    query = torch.full((1, 20_000), 255, dtype=torch.uint8)
    again = []
    products = gpu._Bytes._products
    monkeypatch.setattr(
        gpu._Bytes, "_products", lambda part, x, norms, k: again.append(k) or products(part, x, norms, k)
    )
    squared, indices = gpu.GpuRows(torch.from_numpy(training), CPU, "faiss")(query, 3)
    assert again == [3]
    assert indices.tolist() == [[0, 1, 2]]
    assert len(set(squared[0].tolist())) == 1


def test_the_fastest_is_chosen_and_remembered_across_processes(monkeypatch, tmp_path):
    measured = []

    def seconds_of(runs, device):
        measured.append(sorted(runs))
        return {name: 1.0 + (name != "int8") for name in runs}

    monkeypatch.setattr(gpu, "seconds_of", seconds_of)
    monkeypatch.setattr(gpu, "available_backends", lambda device, dtype: ["int8", "faiss"])
    images = torch.randint(0, 256, (50, 12), dtype=torch.uint8)
    for _ in range(2):  # each time as in a new process, which knows only what is in the file
        monkeypatch.setattr(gpu, "CACHE", gpu.AutotuneCache("search", tmp_path / "autotune.json"))
        rows = gpu.GpuRows(images, CPU)
        assert rows(images[:5], 1)[1].flatten().tolist() == [0, 1, 2, 3, 4]
        assert rows.backend == "int8"
    assert measured == [["faiss", "int8"]]


def test_a_set_beyond_the_device_is_sent_once_per_query(monkeypatch):
    sent = []

    class Part(gpu._Bytes):
        def __init__(self, rows, device):
            sent.append(len(rows))
            super().__init__(rows, device)

    images = torch.randint(0, 256, (1000, 30), dtype=torch.uint8)
    index = TrainingIndex(images, method="torch")
    index.gpu, index.method = gpu.GpuRows(images, CPU, "int8"), "gpu"
    index.gpu.part = 300
    monkeypatch.setattr(gpu, "_Bytes", Part)
    assert index.gpu.query_block() > 20_000
    found = index.query(images.repeat(9, 1), k=3)  # more queries than the CPU takes at once
    assert sent == [300, 300, 300, 100]
    assert (found.indices[:, 0] == np.tile(np.arange(1000), 9)).all()
    index.gpu.part = 1000
    index.query(images[:5])
    index.query(images[:5])
    assert sent[4:] == [1000]  # and stays there


def test_kernel_is_left_where_it_cannot_serve(monkeypatch):
    """Lists longer than the kernel keeps, and GPUs that it does not run on."""
    images = torch.randint(0, 256, (200, 12), dtype=torch.uint8)
    assert_equal(gpu.GpuRows(images, CPU, "cuda")(images[:9], 70), images[:9], images, 70)

    def refuse(*arguments):
        raise RuntimeError("no kernel image is available for execution on the device\nand more")

    cuda.kernel_unavailable.cache_clear()
    monkeypatch.setattr(cuda, "nearest_cuda", refuse)
    assert "no kernel image is available" in cuda.kernel_unavailable(CPU)
    cuda.kernel_unavailable.cache_clear()
    monkeypatch.setattr(cuda, "nearest_cuda", lambda x, y, k: nearest(x, y, k))
    assert cuda.kernel_unavailable(CPU) is None
    cuda.kernel_unavailable.cache_clear()
    monkeypatch.setattr(cuda, "nearest_cuda", lambda x, y, k: (nearest(x, y, k)[0] + 1, nearest(x, y, k)[1]))
    assert "wrong answers" in cuda.kernel_unavailable(CPU)
    cuda.kernel_unavailable.cache_clear()


def test_backends_on_this_machine():
    assert gpu.available_backends(CPU) == ["int8"]
    assert gpu.available_backends(CPU, torch.float32) == ["tf32", "float64"]
