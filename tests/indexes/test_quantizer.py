"""Codes of an index: one quantizer for all shards, the same codes whoever makes them."""

import numpy as np
import pytest

from diffmem.errors import InputError
from diffmem.indexes import add_to_index, build_index, verify_index
from diffmem.indexes.quantizer import chosen_factory, sample_rows

faiss = pytest.importorskip("faiss", reason="FAISS is not installed")


@pytest.fixture
def vectors(tmp_path):
    """A file of 4,000 vectors in clusters, and one of 1,000 more."""
    rng = np.random.default_rng(3)
    centers = rng.normal(size=(40, 16)) * 4
    found = (centers[rng.integers(0, 40, 20_000)] + rng.normal(size=(20_000, 16))).astype(np.float32)
    np.save(tmp_path / "a.npy", found[:4000])
    np.save(tmp_path / "b.npy", found[4000:])
    return found


@pytest.mark.parametrize("factory", ["ivf16", "PCA8,IVF16,SQ8"])
def test_codes_are_those_of_one_faiss_index(tmp_path, vectors, factory):
    index = build_index(
        tmp_path / "a.npy", tmp_path / "index", "precomputed", metric="euclidean", index=factory, shards=3
    )
    quantizer = index.quantizer
    assert quantizer.lists == 16
    together = faiss.read_index(str(next(index.path.glob("quantizers/*/quantizer.faiss"))))
    together.add(vectors[:4000])
    faiss.extract_index_ivf(together).nprobe = 16
    expected = together.search(vectors[:50], 20)[1]
    assert np.array_equal(quantizer.candidates(vectors[:50], 20, nprobe=16), expected)
    exact = index.query(vectors[:50] + 0.01, 1).indices
    assert (quantizer.candidates(vectors[:50] + np.float32(0.01), 50, nprobe=16) == exact).any(axis=1).mean() > 0.9
    assert verify_index(index.path).intact
    # A part of the shards can be loaded alone.
    assert quantizer.load([1]).ntotal == index.shards[1].rows


def test_codes_follow_the_index(tmp_path, vectors):
    said = []
    index = build_index(tmp_path / "a.npy", tmp_path / "index", "precomputed", index="IVF16,SQ8", shards=2)
    before = {path: path.stat().st_mtime_ns for path in index.path.glob("quantizers/*/*")}
    grown = add_to_index(index.path, tmp_path / "b.npy", say=said.append)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert any("its codes were trained when it had 4,000" in line for line in said)
    assert grown.quantizer.load().ntotal == len(grown) == 20_000
    again = add_to_index(index.path, retrain=True)
    assert again.quantizer.trained_on > grown.quantizer.trained_on
    assert again.description["quantizer"]["rows"] == 20_000
    codes = next(again.path.glob("quantizers/*/*.npy"))
    assert codes not in before  # those of the first quantizer are gone
    data = bytearray(codes.read_bytes())
    data[-1] ^= 1
    codes.write_bytes(data)
    found = verify_index(again.path)
    assert "damaged" in found.derived[0]
    assert codes.name in found.derived[0]
    verify_index(again.path, rebuild=True)
    assert verify_index(again.path).intact


def test_the_choice_is_explained():
    assert chosen_factory("flat", 10, 4, 40) == (None, "flat, as asked for: no codes, the search is exact")
    assert chosen_factory("auto", 10**6, 512, 10**9)[0] is None
    factory, why = chosen_factory("auto", 10**8, 512, 10**8 * 1024)
    assert (factory, "too many to search" in why) == ("IVF40000,PQ64", True)
    assert chosen_factory("ivf", 1000, 64, 64000)[0] == "IVF25,SQ8"
    with pytest.raises(InputError, match="need inverted lists"):
        chosen_factory("hnsw", 1000, 64, 64000)
    rows = sample_rows(1000, 100)
    assert np.array_equal(rows // 10, np.arange(100))
    assert len(np.unique(rows % 10)) > 5  # a set whose rows alternate is sampled evenly
    assert np.array_equal(sample_rows(5, 9), np.arange(5))
