"""Codes of an index: one quantizer for all shards, the same codes whoever makes them."""

import sys

import numpy as np
import pytest

from diffmem.errors import InputError, MissingExtraError
from diffmem.indexes import add_to_index, build, build_index, quantizer, verify_index
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
    codes = index.quantizer
    assert codes.lists == 16
    together = faiss.read_index(str(next(index.path.glob("quantizers/*/quantizer.faiss"))))
    together.add(vectors[:4000])
    faiss.extract_index_ivf(together).nprobe = 16
    expected = together.search(vectors[:50], 20)[1]
    assert np.array_equal(codes.candidates(vectors[:50], 20, nprobe=16), expected)
    exact = index.query(vectors[:50] + 0.01, 1).indices
    assert (codes.candidates(vectors[:50] + np.float32(0.01), 50, nprobe=16) == exact).any(axis=1).mean() > 0.9
    assert verify_index(index.path).intact
    # A part of the shards can be loaded alone.
    assert codes.load([1]).ntotal == index.shards[1].rows


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


def test_the_default_goes_by_the_size(tmp_path, vectors, monkeypatch):
    file, said = tmp_path / "a.npy", []
    small = build_index(file, tmp_path / "small", "precomputed", say=said.append)
    assert small.quantizer is None
    assert "index: flat: 256 kB of vectors are searched exactly (codes from 16 GB on)" in said
    monkeypatch.setattr(quantizer, "FLAT_BYTES", 1e5)
    monkeypatch.setattr(build, "FLAT_BYTES", 1e5)
    large = build_index(file, tmp_path / "large", "precomputed")
    assert large.quantizer.factory == "IVF102,SQ8"
    made = {path: path.stat().st_mtime_ns for path in large.path.glob("*/*/*")}
    again = build_index(file, large.path, "precomputed")
    assert {path: path.stat().st_mtime_ns for path in again.path.glob("*/*/*")} == made
    # Another choice is made from the shards that are there.
    other = build_index(file, large.path, "precomputed", index="IVF8,SQ8")
    assert other.quantizer.factory == "IVF8,SQ8"
    assert all(path in made for path in other.path.glob("shards/*/*"))
    assert build_index(file, large.path, "precomputed", index="flat").quantizer is None
    assert verify_index(large.path).intact
    # What was small when it was built says that it has grown, and gets codes where it is asked to.
    np.save(tmp_path / "c.npy", vectors[4000:5000])
    add_to_index(small.path, tmp_path / "c.npy", say=said.append)
    assert any("are many to search exactly: retrain=True makes codes" in line for line in said)
    assert add_to_index(small.path, retrain=True).quantizer.factory == "IVF128,SQ8"


def test_without_faiss_the_default_is_flat_and_codes_are_refused_at_once(tmp_path, vectors, monkeypatch):
    monkeypatch.setattr(quantizer, "FLAT_BYTES", 1e5)
    monkeypatch.setattr(quantizer, "has_faiss", lambda: False)
    monkeypatch.setitem(sys.modules, "faiss", None)
    said = []
    assert build_index(tmp_path / "a.npy", tmp_path / "index", "precomputed", say=said.append).quantizer is None
    assert any("pip install 'diffmem[faiss]'" in line for line in said)
    with pytest.raises(MissingExtraError, match=r"diffmem\[faiss\]"):
        build_index(tmp_path / "a.npy", tmp_path / "other", "precomputed", index="ivf")
    assert not (tmp_path / "other").exists()
    with pytest.raises(InputError, match="need inverted lists"):
        build_index(tmp_path / "a.npy", tmp_path / "other", "precomputed", index="hnsw")


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
