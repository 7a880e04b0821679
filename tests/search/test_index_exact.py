"""`TrainingIndex` against brute force in integers, on images made to break it, on every path and thread count."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffmem.errors import InputError
from diffmem.ops.registry import native_module
from diffmem.search import TrainingIndex, filtered, index

core = native_module()
needs_core = pytest.mark.skipif(core is None, reason="diffmem was installed without its compiled core")
LEVELS = ["portable"] if core is None else core.cpu_levels()
KINDS = ["noise", "low rank", "constant", "duplicates", "near ties", "extremes", "far tail", "one pixel"]


def brute_force(queries: np.ndarray, training: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances and indices [Q, k], ties to the lower index; floats summed as csrc/nearest/nearest.h says."""
    n, d = len(training), training[0].size
    queries, training = queries.reshape(-1, d), training.reshape(-1, d)
    squared = np.empty((len(queries), n))
    if queries.dtype == np.uint8:  # integers below 2^53: nothing is rounded
        x, y = queries.astype(np.float64), training.astype(np.float64)
        squared = (np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T).astype(np.int64)
        queries = queries[:0]
    for row, query in enumerate(queries.astype(np.float64)):
        terms = np.zeros((n, -(-d // 8) * 8))
        terms[:, :d] = np.square(training.astype(np.float64) - query)
        lanes = np.add.accumulate(terms.reshape(n, -1, 8), axis=1)[:, -1].T
        squared[row] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]))
    order = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(squared, order, 1), order


def hostile(rng: np.random.Generator, kind: str, n: int, d: int) -> np.ndarray:
    """uint8 [n, d] of one hostile kind."""
    if kind == "noise":
        return rng.integers(0, 256, (n, d), dtype=np.uint8)
    if kind == "low rank":  # what the bounds are made for
        values = rng.normal(size=(n, 3)) @ rng.normal(size=(3, d)) * 20 + 128 + rng.normal(size=(n, d))
        return np.clip(values, 0, 255).astype(np.uint8)
    if kind == "constant":
        return np.full((n, d), rng.integers(0, 256), np.uint8)
    if kind == "duplicates":
        few = max(1, n // 4)
        return rng.integers(0, 256, (few, d), dtype=np.uint8)[rng.integers(0, few, n)]
    if kind == "near ties":  # one gray level in one pixel apart
        images = np.tile(rng.integers(2, 253, d, dtype=np.uint8), (n, 1))
        images[np.arange(n), rng.integers(0, d, n)] += rng.integers(0, 2, n, dtype=np.uint8)
        return images
    if kind == "extremes":  # all-0 against all-255: the largest distances, products and codes
        return np.repeat(rng.integers(0, 2, (n, 1), dtype=np.uint8) * 255, d, axis=1)
    if kind == "far tail":  # a dominant direction that says nothing about who is near
        return ((rng.integers(0, 2, (n, 1)) * 200) + rng.integers(0, 56, (n, d))).astype(np.uint8)
    images = np.zeros((n, d), np.uint8)  # "one pixel": orthogonal images, a flat spectrum
    images[np.arange(n), rng.integers(0, d, n)] = 255
    return images


def assert_exact(queries: np.ndarray, training: np.ndarray, k: int, **options) -> TrainingIndex:
    searched = TrainingIndex(training, **options)
    found = searched.query(queries, k)
    squared, indices = brute_force(queries, training, k)
    assert found.squared_distances.dtype == squared.dtype
    np.testing.assert_array_equal(found.squared_distances, squared)
    np.testing.assert_array_equal(found.indices, indices)
    assert found.dimension == training[0].size
    return searched


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_core
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("method", ["filtered", "dense"])
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    n=st.integers(1, 90),
    q=st.integers(0, 20),
    d=st.integers(1, 300),
    count=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_integer_brute_force(level, method, threads, monkeypatch, seed, kinds, n, q, d, count, data):
    monkeypatch.setenv("DIFFMEM_CPU", level)
    threads(count)
    rng = np.random.default_rng(seed)
    images = np.concatenate([hostile(rng, kind, (n + q + 1) // 2, d) for kind in kinds])
    images = rng.permutation(images)[: n + q]
    k = data.draw(st.integers(1, n if method == "filtered" else min(n, 64)))
    components = data.draw(st.sampled_from([1, 60, 61, 200])) if method == "filtered" else None
    assert_exact(images[:q], images[q : q + n], k, method=method, components=components)


@needs_core
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("method", ["filtered", "dense", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_many_blocks(level, method, kind, threads, monkeypatch):
    """Several blocks, clusters, strips and ranges of the training set, which the small cases do not reach."""
    monkeypatch.setenv("DIFFMEM_CPU", level)
    threads(3)
    rng = np.random.default_rng(KINDS.index(kind))
    images = hostile(rng, kind, 2500 + 40, 75)
    assert_exact(images[:40], images[40:], 3, method=method)


@needs_core
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_all_of_many_neighbors(dtype):
    """k = N: every pair is computed, and the filtered search must not give itself up over that."""
    images = np.random.default_rng(0).integers(0, 256, (1205, 16)).astype(dtype)
    assert_exact(images[:5], images[5:], 1200, method="filtered")


@needs_core
@pytest.mark.parametrize("method", ["filtered", "dense"])
def test_photographs(method):
    """Natural patches, with copies and near copies among the queries; the bounds prune nearly everything."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn, which holds the photographs, is missing")
    rng = np.random.default_rng(0)
    photographs = datasets.load_sample_images().images
    patches = np.stack(
        [
            photographs[rng.integers(2)][y : y + 16, x : x + 16].transpose(2, 0, 1)
            for y, x in zip(rng.integers(0, 411, 3300), rng.integers(0, 624, 3300), strict=True)
        ]
    )
    training, queries = patches[300:], patches[:300]
    queries[:50] = training[:50]
    queries[50:100] = training[50:100] ^ 1
    searched = assert_exact(queries, training, 2, method=method)
    if method == "filtered":
        assert searched.stats.bounded >= searched.stats.pairs
        assert searched.stats.refined < 0.03 * searched.stats.pairs


@needs_core
def test_auto_switches_in_the_middle(monkeypatch):
    """A set of pictures and noise: queries that are pictures are pruned, queries that are noise are not."""
    monkeypatch.setattr(index, "FILTERED_PAIRS", 1)  # blocks of 256 queries
    monkeypatch.setattr(index, "PROBE", 16)
    rng = np.random.default_rng(0)
    training = np.concatenate([hostile(rng, "low rank", 2000, 192), hostile(rng, "noise", 4000, 192)])
    queries = np.concatenate([training[:256], hostile(rng, "noise", 600, 192)])
    searched = assert_exact(queries, training, 2)
    assert searched.stats.method == "filtered and dense"
    assert 256 <= searched.stats.dense_queries <= 600


@needs_core
@pytest.mark.parametrize("method", ["filtered", "dense"])
def test_wide_images(method):
    """Beyond int32: distances above 2^31, and products that int32 could not hold."""
    rng = np.random.default_rng(0)
    d = 140_000
    query = rng.integers(0, 2, (3, d), dtype=np.uint8) * 255
    training = np.repeat(255 - query[:1], 40, axis=0)
    training[np.arange(40), np.arange(40)] = query[0, :40]
    assert_exact(query, training, 40, method=method)


@needs_core
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("level", LEVELS)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 80), d=st.integers(1, 100), data=st.data())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_floats_equal_float64_brute_force(dtype, level, monkeypatch, seed, n, d, data):
    monkeypatch.setenv("DIFFMEM_CPU", level)
    rng = np.random.default_rng(seed)
    scale, offset = data.draw(st.sampled_from([(1, 0), (1e-3, 1000), (1e-30, 0), (1e15, 1), (0, 5), (1e-44, 0)]))
    training = (rng.normal(size=(n, d)) * scale + offset).astype(dtype)
    queries = training[rng.integers(0, n, 7)]
    queries[1:4] += (rng.normal(size=(3, d)) * scale * 0.1).astype(dtype)
    queries[4:5] = queries[4:5] * 3 + 1  # beyond the reach of the code
    assert_exact(queries, training, data.draw(st.integers(1, n)), method="filtered")


@needs_core
def test_floats_in_many_blocks():
    rng = np.random.default_rng(0)
    training = (rng.normal(size=(3000, 8)) @ rng.normal(size=(8, 100)) + rng.normal(size=(3000, 100)) / 9).astype("f4")
    searched = assert_exact(training[:50] + np.float32(0.01), training, 2, method="filtered")
    assert searched.stats.refined < 0.1 * searched.stats.pairs


@needs_core
def test_layouts_that_are_not_plain_rows(tmp_path):
    """A memory map, a slice of every second image, a transposed view, float64 images."""
    rng = np.random.default_rng(0)
    images = hostile(rng, "low rank", 2200, 48).reshape(-1, 3, 4, 4)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    squared, indices = brute_force(images[:30], images, 2)
    transposed = np.ascontiguousarray(images.transpose(1, 2, 3, 0)).transpose(3, 0, 1, 2)
    for training in (mapped, transposed, torch.from_numpy(images)):
        for method in ("filtered", "dense"):
            found = TrainingIndex(training, method=method).query(images[:30])
            np.testing.assert_array_equal(found.squared_distances, squared)
            np.testing.assert_array_equal(found.indices, indices)
    assert_exact(images[:30:2], images[::2], 2, method="filtered")
    assert_exact(images[:30].astype(np.float64), images.astype(np.float64), 2, method="filtered")


def test_without_the_core_it_is_torch(monkeypatch):
    monkeypatch.setattr(index, "native_unavailable", lambda device: "it was not built")
    rng = np.random.default_rng(0)
    images = hostile(rng, "noise", 1100, 20)
    searched = TrainingIndex(images)
    found = searched.query(images[:5])
    assert searched.stats.method == "torch"
    np.testing.assert_array_equal(found.indices, brute_force(images[:5], images, 2)[1])
    with pytest.raises(InputError, match="'filtered' cannot be used here: it was not built"):
        TrainingIndex(images, method="filtered")


def test_bad_arguments_are_one_clear_line():
    images = np.zeros((4, 10), np.uint8)
    floats = np.full((4, 10), np.nan, np.float32)
    for call, words in [
        (lambda: TrainingIndex(images[:0]), "empty"),
        (lambda: TrainingIndex(images, method="magic"), "method must be one of auto, filtered"),
        (lambda: TrainingIndex(images, components=0), "components must be at least 1"),
        (lambda: TrainingIndex(images).query(images, 5), "k must be between 1 and the number of training images, 4"),
        (
            lambda: TrainingIndex(images).query(images, 2.5),
            "k must be between 1 and the number of training images, 4; got 2.5",
        ),
        (lambda: TrainingIndex(images).query(images[:, :3]), "10 values of torch.uint8; got 3"),
        (lambda: TrainingIndex(images).query(floats), "got 10 values of torch.float32"),
        (lambda: TrainingIndex(floats, method="filtered" if core is not None else "torch").query(floats), "NaN"),
        (lambda: TrainingIndex(0 * floats + 1).query(floats), "NaN"),
    ]:
        with pytest.raises(InputError, match=words):
            call()


@needs_core
@pytest.mark.parametrize("method", ["filtered", "dense"])
def test_arrays_and_tensors_are_searched_alike(method):
    images = hostile(np.random.default_rng(3), "low rank", 300, 75)
    tensors = torch.from_numpy(images)
    array, tensor = (TrainingIndex(each[50:], method=method) for each in (images, tensors))
    found = [index.query(each[:50], 5) for index in (array, tensor) for each in (images, tensors)]
    for other in found[1:]:
        np.testing.assert_array_equal(other.indices, found[0].indices)
        np.testing.assert_array_equal(other.squared_distances, found[0].squared_distances)
    assert array.fingerprint == tensor.fingerprint
    assert torch.equal(array.rows, tensor.rows)
    assert array.device == tensor.device == torch.device(array.device_name)
    assert array.holds(tensors[50:])
    assert array.holds(images[50:])
    assert not tensor.holds(images[:250])


@needs_core
def test_codes_keep_their_promises():
    """The proof's premises: no overflow in int32, a norm of at most 1, a bound below the distance."""
    rng = np.random.default_rng(0)
    images = hostile(rng, "low rank", 400, 192)
    built = filtered.build(torch.from_numpy(images), 120)
    p = built.basis.p.astype(np.int64)
    assert 128 * np.abs(p).sum(axis=1).max() < 2**31
    assert np.linalg.norm(p.astype(np.float64), 2) <= built.basis.norm
    code = built.encode(torch.from_numpy(images[:20]))
    value = code.fine[0].astype(np.int64)[:, :61]
    stored = built.fine[0].astype(np.int64)[:, :61]
    np.testing.assert_array_equal(np.square(value).sum(axis=1), code.sq[:, 1])
    gap = np.sqrt(np.square(value[:, None] - stored).sum(axis=-1)) - code.error[:, 1:2] - built.error[1]
    squared = np.square(images[:20, None].astype(np.int64) - images[built.order]).sum(axis=-1)
    assert (gap <= np.sqrt(squared) * built.scale * (1 + 1e-12) + 1e-3).all()
