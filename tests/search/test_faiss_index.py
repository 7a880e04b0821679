"""Search through FAISS: exact distances always, recall measured, indexes saved and loaded."""

import numpy as np
import pytest

import diffmem
from diffmem.errors import InputError
from diffmem.search import FaissIndex, TrainingIndex, faiss_factory

faiss = pytest.importorskip("faiss", reason="FAISS is optional: pip install 'diffmem[faiss]'")


@pytest.fixture(scope="module")
def patches() -> np.ndarray:
    return diffmem.load_images("builtin:patches?n=3000", resize=8).images


def test_flat_agrees_with_the_exact_search(patches):
    index = FaissIndex(patches[:2500])
    found, exact = index.query(patches[2400:]), TrainingIndex(patches[:2500]).query(patches[2400:])
    np.testing.assert_array_equal(found.squared_distances, exact.squared_distances)
    np.testing.assert_array_equal(found.indices, exact.indices)
    assert found.squared_distances.dtype == np.int64


@pytest.mark.parametrize("factory", ["IVF32,Flat", "IVF32,PQ16x4", "PCA32,IVF16,Flat"])
def test_approximate_answers_have_exact_distances(patches, factory):
    training, queries = patches[:2500], patches[2200:2700]
    index = FaissIndex(training, factory, nprobe=4, candidates=8)
    found = index.query(queries)
    differences = queries[:, None].astype(np.int64) - training[found.indices]
    np.testing.assert_array_equal(found.squared_distances, np.square(differences).sum((2, 3, 4)))
    assert (np.diff(found.squared_distances, axis=1) >= 0).all()
    exact = TrainingIndex(training).query(queries)
    hits = found.squared_distances == exact.squared_distances
    assert hits[:, 0].mean() > 0.5
    assert (index.stats.nprobe, index.stats.candidates) == (4, 8)


def test_it_chooses_how_widely_it_searches(patches):
    """So that the recall that is asked for is reached, and no wider. (Codes of 4 bits: FAISS trains those of 8 for 14
    seconds.)"""
    training, queries = patches[:2500], patches[2200:2700]
    exact = TrainingIndex(training).query(queries).squared_distances
    chosen = []
    for recall in (0.5, 0.98):
        index = FaissIndex(training, "IVF64,PQ8x4")
        index.tune(queries[::4], recall)
        index.tune(queries[:1], 0.01)  # once
        found = index.query(queries)
        assert (found.squared_distances == exact).mean(axis=0).min() > recall - 0.02
        chosen.append((index.nprobe, index.candidates))
    assert chosen[0] < chosen[1]
    fixed = FaissIndex(training, "IVF64,PQ8x4", nprobe=2)
    fixed.tune(queries, 0.99)
    assert fixed.nprobe == 2


def test_lists_too_short_are_completed_exactly(patches):
    index = FaissIndex(patches[:200], "IVF64,Flat", nprobe=1)
    found, exact = index.query(patches[:50], 20), TrainingIndex(patches[:200]).query(patches[:50], 20)
    assert index.stats.completed > 0
    assert (found.indices >= 0).all()
    complete = (found.squared_distances == exact.squared_distances).all(axis=1)
    assert complete.sum() >= index.stats.completed


def test_half_precision_storage(patches):
    index = FaissIndex(patches[:1000], float16=True)
    assert index.factory == "SQfp16"
    np.testing.assert_array_equal(index.query(patches[:20]).indices[:, 0], np.arange(20))
    with pytest.raises(InputError, match="Flat"):
        FaissIndex(patches[:1000], "IVF16,PQ16", float16=True)


def test_embeddings():
    vectors = np.random.default_rng(0).normal(size=(500, 32)).astype(np.float32)
    index = FaissIndex(vectors)
    np.testing.assert_array_equal(index.query(vectors[:9], 1).indices[:, 0], np.arange(9))


def test_saved_and_loaded(patches, tmp_path):
    index = FaissIndex(patches[:1000], "IVF16,Flat", nprobe=3)
    index.save(tmp_path / "index")
    for loaded in (FaissIndex.load(tmp_path / "index"), TrainingIndex.load(tmp_path / "index")):
        found = loaded.query(patches[900:1100])
        np.testing.assert_array_equal(found.indices, index.query(patches[900:1100]).indices)
    assert FaissIndex.load(tmp_path / "index").nprobe == 3
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    # Another index, of fewer images: what it proposes would be exact, and what it misses would be missed.
    FaissIndex(patches[:900], "IVF16,Flat", nprobe=3).save(tmp_path / "other")
    (tmp_path / "index" / "index.faiss").write_bytes((tmp_path / "other" / "index.faiss").read_bytes())
    with pytest.raises(InputError, match=r"index\.faiss: damaged"):
        FaissIndex.load(tmp_path / "index")
    (tmp_path / "index" / "index.faiss").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"index\.faiss: damaged"):
        FaissIndex.load(tmp_path / "index")
    index.save(tmp_path / "index")  # takes the place of the damaged one
    images = np.load(tmp_path / "index" / "images.npy")
    np.save(tmp_path / "index" / "images.npy", images[::-1])
    with pytest.raises(InputError, match="fingerprint"):
        FaissIndex.load(tmp_path / "index")


def test_as_a_method_of_the_training_index(patches, tmp_path):
    index = TrainingIndex(patches[:1000], method="faiss", factory="IVF16,Flat")
    found = index.query(patches[990:1010])
    assert found.indices[:10, 0].tolist() == list(range(990, 1000))
    index.save(tmp_path / "index")
    np.testing.assert_array_equal(
        TrainingIndex.load(tmp_path / "index").query(patches[990:1010]).indices, found.indices
    )


def test_the_audit_takes_it(patches):
    index = FaissIndex(patches[:1000], "IVF16,Flat")
    result = diffmem.audit(patches[990:1010], patches[:1000], index=index)
    assert result.memorized[:10].all()
    with pytest.raises(InputError, match="1,000 images, the training set 999"):
        diffmem.audit(patches[:10], patches[:999], index=index)


def test_bad_arguments(patches, monkeypatch):
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    for call, words in [
        (lambda: FaissIndex(patches[:10], "IVF100,Flat"), "cannot build"),
        (lambda: FaissIndex(patches[:10], "Nonsense7"), "cannot build"),
        (lambda: FaissIndex(patches[:10].astype(np.float64)), "float32"),
        (lambda: FaissIndex(patches[:10], device="cuda"), "GPU"),
        (lambda: FaissIndex(patches[:10]).query(patches[:2], 11), "k must be"),
        (lambda: FaissIndex(patches[:10]).query(patches[:2, :1]), "64 values"),
    ]:
        with pytest.raises(InputError, match=words):
            call()


def test_names_that_people_use():
    names = {"flat": "Flat", "IVF": "IVF894,Flat", "ivf1024": "IVF1024,Flat", "hnsw": "HNSW32,Flat"}
    for name, factory in (names | {"PCA64,IVF256,PQ16": "PCA64,IVF256,PQ16"}).items():
        assert faiss_factory(name, 50_000) == factory
    assert faiss_factory("ivf", 30) == "IVF1,Flat"
