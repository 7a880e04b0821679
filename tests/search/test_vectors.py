"""`VectorIndex` against brute force, on vectors made to break it, for any division into shards."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffmem.errors import InputError
from diffmem.ops.registry import native_module
from diffmem.search import TrainingIndex, VectorIndex, vector_codes, vectors

core = native_module()
METHODS = ["codes", "torch"] if core is not None else ["torch"]
LEVELS = [] if core is None else core.cpu_levels()
needs_core = pytest.mark.skipif(core is None, reason="diffmem was installed without its compiled core")
KINDS = ["gaussian", "unit", "steep", "duplicates", "zeros", "constant", "lengths", "near ties", "far from zero"]


def hostile(rng: np.random.Generator, kind: str, n: int, d: int) -> np.ndarray:
    """float64 [n, d] of one hostile kind."""
    x = rng.normal(size=(n, d))
    if kind == "unit":
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    elif kind == "steep":
        x *= 2.0 ** -np.arange(d)
    elif kind == "duplicates":
        x = x[rng.integers(0, max(1, n // 8), n)]
    elif kind == "zeros":
        x[rng.random(n) < 0.5] = 0
    elif kind == "constant":
        x[:] = x[0]
    elif kind == "lengths":  # from the smallest to the largest that float16 holds
        x *= 10.0 ** rng.uniform(-6, 4, (n, 1))
    elif kind == "near ties":  # integers: distances are exact, and equal more often than not
        x = rng.integers(0, 2, (n, d)).astype(float)
    elif kind == "far from zero":
        x = x * 1e-2 + 100
    return x.clip(-60000, 60000)


def divided(rng: np.random.Generator, rows: np.ndarray, shards: int) -> list[np.ndarray]:
    return np.split(rows, np.sort(rng.integers(0, len(rows) + 1, shards - 1)))


def brute_force(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances and indices [Q, k], float64, summed as csrc/nearest/nearest.h says, ties to the lower index."""
    n, d = rows.shape
    squared = np.empty((len(queries), n))
    for i, query in enumerate(queries.astype(np.float64)):
        terms = np.zeros((n, -(-d // 8) * 8))
        terms[:, :d] = np.square(rows.astype(np.float64) - query)
        s = np.add.accumulate(terms.reshape(n, -1, 8), axis=1)[:, -1].T
        squared[i] = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))
    order = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(squared, order, 1), order


def assert_exact(queries: np.ndarray, shards: list[np.ndarray], k: int, **options) -> VectorIndex:
    index = VectorIndex(shards, **options)
    found = index.query(queries, k)
    squared, indices = brute_force(queries, np.concatenate(shards), k)
    np.testing.assert_array_equal(found.squared_distances, squared)
    np.testing.assert_array_equal(found.indices, indices)
    return index


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 300),
    d=st.integers(1, 200),
    k=st.integers(1, 5),
    dtype=st.sampled_from([np.float16, np.float32]),
    shards=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_any_vectors_in_any_shards(method, kind, n, d, k, dtype, shards, seed):
    rng = np.random.default_rng(seed)
    rows = hostile(rng, kind, n, d).astype(dtype)
    queries = np.concatenate([rows[rng.integers(0, n, 5)], hostile(rng, kind, 4, d).astype(dtype)])
    assert_exact(queries, divided(rng, rows, shards), min(k, n), method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1, 1e12, 1e30])
def test_lengths_of_any_size(scale, method):
    rng = np.random.default_rng(1)
    rows = (rng.normal(size=(200, 9)) * scale).astype(np.float32)
    assert_exact(rows[:20] + np.float32(scale / 8), [rows[:7], rows[7:]], 3, method=method)


def test_cosine_compares_as_the_features_do():
    from diffmem.features import FeatureSet

    rng = np.random.default_rng(2)
    stored = rng.normal(size=(500, 24)).astype(np.float16)
    queries = rng.normal(size=(40, 24)).astype(np.float32)
    training, some = FeatureSet(stored, "cosine"), FeatureSet(queries, "cosine")
    expected = TrainingIndex(training.rows, method="reference").query(some.rows, 3)
    index = VectorIndex([stored[:123], stored[123:]], metric="cosine")
    for given_queries in (queries, some.rows):  # those of length 1 are not divided again
        found = index.query(given_queries, 3)
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_allclose(found.squared_distances, expected.squared_distances, rtol=1e-12)
    assert index.holds(stored)
    assert index.holds(training.rows)
    assert not index.holds(stored[::-1])


def test_files_stay_on_disk(tmp_path):
    rows = np.random.default_rng(3).normal(size=(30, 5)).astype(np.float16)
    paths = []
    for number, part in enumerate(np.split(rows, [11, 11])):
        paths.append(tmp_path / f"{number}.npy")
        np.save(paths[-1], part)
    index = assert_exact(rows[:4], [np.load(path, mmap_mode="r") for path in paths], 2)
    assert VectorIndex(paths).fingerprint == index.fingerprint
    assert VectorIndex([rows]).fingerprint != index.fingerprint
    assert index.holds(rows)
    empty = index.query(rows[:0], 2)
    assert empty.indices.shape == (0, 2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"bad\.npy: vector 7 holds NaN: recompute or remove it"),
        (1e6, r"bad\.npy: vector 7 holds infinity: it overflowed float16: store float32"),
    ],
)
def test_bad_values_are_named_with_file_and_row(tmp_path, value, message):
    good, bad = np.ones((20, 3), np.float16), np.ones((9, 3), np.float16)
    with np.errstate(over="ignore"):
        bad[7, 1] = value
    np.save(tmp_path / "good.npy", good)
    np.save(tmp_path / "bad.npy", bad)
    with pytest.raises(InputError, match=message):
        VectorIndex([tmp_path / "good.npy", tmp_path / "bad.npy"])


@pytest.mark.parametrize(
    ("shards", "options", "message"),
    [
        ([], {}, "no shards"),
        ([np.ones((0, 3), np.float32)], {}, "the training set is empty"),
        ([np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)], {}, "shard 1: vectors of 4 values"),
        ([np.ones((2, 3))], {}, "shard 0: vectors must be float16 or float32, got float64"),
        ([np.ones(3, np.float32)], {}, r"shape \(3,\)"),
        ([np.zeros((2, 3), np.float32)], {"metric": "cosine"}, "shard 0: vector 0 is 0 in every value"),
        ([np.ones((2, 3), np.float32)], {"metric": "hamming"}, "metric must be one of"),
        ([np.ones((2, 3), np.float32)], {"method": "magic"}, "method must be one of"),
    ],
)
def test_bad_shards(shards, options, message):
    with pytest.raises(InputError, match=message):
        VectorIndex(shards, **options)


def test_bad_queries():
    index = VectorIndex([np.ones((2, 3), np.float32)])
    for queries, k, message in [
        (np.ones((1, 4), np.float32), 1, "must be vectors"),
        (np.ones((1, 3)), 1, "must be float16 or float32"),
        (np.full((1, 3), np.nan, np.float32), 1, "query images: vector 0 holds NaN"),
        (torch.ones(1, 3), 3, "k must be between"),
    ]:
        with pytest.raises(InputError, match=message):
            index.query(queries, k)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_core
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["unit", "steep", "duplicates", "lengths"])
def test_codes_on_every_path(monkeypatch, threads, level, kind):
    """Enough rows for several blocks and spans, by queries and by rows, with what fills the last strip and panel."""
    monkeypatch.setenv("DIFFMEM_CPU", level)
    rng = np.random.default_rng(4)
    rows = hostile(rng, kind, 5000, 130).astype(np.float32)
    queries = rows[rng.integers(0, 5000, 101)] + rng.normal(size=(101, 130)).astype(np.float32) * 1e-3
    monkeypatch.setattr(vectors, "SCAN_PAIRS", 101 * 2048)
    expected = TrainingIndex(rows, method="dense").query(queries, 3)
    index = VectorIndex(divided(rng, rows, 3), method="codes")
    for count, some in ((1, 101), (2, 101), (3, 7)):
        threads(count)
        found = index.query(queries[:some], 3)
        np.testing.assert_array_equal(found.indices, expected.indices[:some])
        np.testing.assert_array_equal(found.squared_distances, expected.squared_distances[:some])
    assert index.stats.bounded == 7 * 5000
    if kind == "steep":  # most pairs are decided by the leading coordinates
        assert index.stats.fine < index.stats.bounded / 3
    if kind in ("unit", "steep"):
        assert index.stats.refined < 7 * 200


@needs_core
def test_pairs_that_wait_are_bounded(monkeypatch):
    """Where no bound leaves anything out: exact distances are computed whenever too many pairs wait."""
    rng = np.random.default_rng(5)
    rows = np.ones((6000, 70), np.float16)
    rows[::1000] = rng.normal(size=(6, 70))
    monkeypatch.setattr(vectors, "SCAN_PAIRS", 10 * 1024)
    monkeypatch.setattr(vectors, "PENDING", 3000)
    counts = []
    add = vectors._Pending.add
    monkeypatch.setattr(vectors._Pending, "add", lambda self, work: (add(self, work), counts.append(self.count)))
    assert_exact(rows[:10], [rows[:3500], rows[3500:]], 3, method="codes")
    assert 3000 < max(counts) < 3000 + 10 * 1024


@needs_core
def test_queries_far_from_all_vectors():
    rows = np.random.default_rng(6).normal(size=(2000, 66)).astype(np.float32)
    queries = np.concatenate([rows[:3], rows[:2] * np.float32(1e25)])
    assert_exact(queries, [rows], 2)
    rows[[5, 1500]] *= np.float32(1e25)  # and vectors far from all others
    assert_exact(queries, [rows], 2)


@needs_core
def test_codes_in_a_folder(tmp_path, monkeypatch):
    rng = np.random.default_rng(7)
    rows = rng.normal(size=(4000, 65)).astype(np.float16)
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    for path, part in zip(paths, np.split(rows, [1500, 1500]), strict=True):
        np.save(path, part)
    encoded = []
    encode = vector_codes.Rotation.encode
    monkeypatch.setattr(
        vector_codes.Rotation,
        "encode",
        lambda self, some, queries: (encoded.append(len(some) if not queries else 0), encode(self, some, queries))[1],
    )
    codes = tmp_path / "codes"
    first = VectorIndex(paths, codes=codes)
    assert sum(encoded) >= 4000
    assert all(isinstance(code, np.memmap) for code in first.codes.code if len(code))
    encoded.clear()
    again = VectorIndex(paths, codes=codes)
    assert sum(encoded) < 100  # a few rows, to see whether the codes are those of these vectors
    assert again.fingerprint == first.fingerprint == VectorIndex(paths, method="torch").fingerprint
    expected = TrainingIndex(rows.astype(np.float32), method="dense").query(rows[:50].astype(np.float32), 2)
    np.testing.assert_array_equal(again.query(rows[:50]).indices, expected.indices)

    # A shard more is coded by itself; so is a shard that was written again.
    np.save(tmp_path / "3.npy", rows[:700])
    encoded.clear()
    more = VectorIndex([*paths, tmp_path / "3.npy"], codes=codes)
    assert 700 <= sum(encoded) < 1000
    assert more.query(rows[:1], 2).indices.tolist() == [[0, 4000]]
    np.save(paths[0], rows[:1500] * 2)
    encoded.clear()
    VectorIndex(paths, codes=codes)
    assert 1500 <= sum(encoded) < 1700

    # By keys of the contents, wherever the files lie.
    encoded.clear()
    by_key = VectorIndex([rows[:1500], rows[1500:]], codes=tmp_path / "by-key", keys=["a", "b"])
    VectorIndex([rows[1500:], rows[:1500]], codes=tmp_path / "by-key", keys=["b", "a"])
    assert sum(encoded) < 4100
    with pytest.raises(InputError, match="the codes are not those of shard 0: delete it"):
        VectorIndex([rows[:1500][::-1], rows[1500:]], codes=tmp_path / "by-key", keys=["a", "b"])
    assert by_key.fingerprint != again.fingerprint
    with pytest.raises(InputError, match="codes of vectors of 65 values compared by euclidean, not of 65 by cosine"):
        VectorIndex(paths, codes=codes, metric="cosine")
    with pytest.raises(InputError, match="holds no codes of vectors"):
        VectorIndex(paths, codes=tmp_path)
    (codes / "mean.npy").write_bytes((codes / "rotation.npy").read_bytes())
    with pytest.raises(InputError, match="rotation does not match its checksum"):
        VectorIndex(paths, codes=codes)


@needs_core
@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(KINDS), d=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_a_rotation_bounds_what_it_says(kind, d, seed):
    """Norm, least singular value and rounding, against float64."""
    rows = torch.from_numpy(hostile(np.random.default_rng(seed), kind, 50, d).astype(np.float32))
    rotation = vector_codes.rotation_of(rows)
    values = torch.linalg.svdvals(rotation.matrix.double())
    assert float(values.max()) <= 1
    assert float(values.min()) * rotation.stretch >= 1
    assert rotation.stretch < 1.01
    exact = (rows.double() - rotation.mean.double()) * rotation.unit @ rotation.matrix.double().T
    rotated = rotation.rotate(rows)
    assert bool(((rotated.double() - exact).norm(dim=1) <= rotation.eta * rotated.double().norm(dim=1) + 1e-30).all())
