"""Vectors that were computed elsewhere, in the files people have."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffmem.errors import InputError
from diffmem.features import FeatureSet, load_features


def unit(count=6, d=8, seed=0, dtype=np.float32):
    some = np.random.default_rng(seed).normal(size=(count, d))
    return (some / np.linalg.norm(some, axis=1, keepdims=True)).astype(dtype)


def parquet():
    return (
        pytest.importorskip("pyarrow", reason="parquet files need the package pyarrow"),
        pytest.importorskip("pyarrow.parquet"),
    )


def test_npy_stays_on_disk(tmp_path):
    np.save(tmp_path / "f.npy", unit(dtype=np.float16))
    found = load_features(tmp_path / "f.npy")
    assert isinstance(found.vectors, np.memmap)
    assert found.metric == "cosine"
    assert found.unit
    assert not found.notes
    assert np.array_equal(found.vectors, unit(dtype=np.float16))


def test_npz_of_vsc_names_frames(tmp_path):
    np.savez(
        tmp_path / "refs.npz", video_ids=np.array(["R1", "R1", "R2"]), features=unit(3),
        timestamps=np.array([[0, 1], [1, 2], [0, 1]], np.float32),
    )  # fmt: skip
    found = load_features(tmp_path / "refs.npz")
    assert list(found.names) == ["R1@0-1", "R1@1-2", "R2@0-1"]
    assert np.array_equal(found.vectors, unit(3))


def test_npz_with_several_arrays_asks_which(tmp_path):
    np.savez(tmp_path / "f.npz", clip=unit(), dino=unit(seed=1))
    with pytest.raises(InputError, match="pick the array of features with key=…: clip, dino"):
        load_features(tmp_path / "f.npz")
    assert np.array_equal(load_features(tmp_path / "f.npz", key="dino").vectors, unit(seed=1))
    with pytest.raises(InputError, match="there is no 'sscd'"):
        load_features(tmp_path / "f.npz", key="sscd")


def test_pickled_names_are_left_out_and_never_loaded(tmp_path):
    np.savez(tmp_path / "f.npz", features=unit(2), names=np.array(["a", None], object))
    found = load_features(tmp_path / "f.npz")
    assert found.names is None
    assert "names are ignored" in found.notes[0]
    np.savez(tmp_path / "g.npz", features=np.array([[1.0, None]], object))
    with pytest.raises(InputError, match="pickled Python objects"):
        load_features(tmp_path / "g.npz")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensor_files(tmp_path, dtype):
    tensor = torch.from_numpy(unit()).to(dtype)
    save_file({"embeddings": tensor}, tmp_path / "f.safetensors")
    torch.save({"features": tensor}, tmp_path / "f.pt")
    torch.save(tensor, tmp_path / "g.pt")
    for name in ("f.safetensors", "f.pt", "g.pt"):
        found = load_features(tmp_path / name)
        assert np.array_equal(found.rows.shape, (6, 8))
        assert np.array_equal(found.vectors.astype(np.float32), tensor.float().numpy()), name


def test_parquet_columns(tmp_path):
    pyarrow, write = parquet()
    lists = pyarrow.array(unit().tolist(), pyarrow.list_(pyarrow.float32()))
    table = pyarrow.table({"key": [f"{i:05}" for i in range(6)], "embedding": lists, "width": list(range(6))})
    write.write_table(table, tmp_path / "f.parquet")
    found = load_features(tmp_path / "f.parquet")
    assert found.names[5] == "00005"
    assert np.array_equal(found.vectors, unit())
    fixed = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(unit(dtype=np.float16).ravel()), 8)
    write.write_table(pyarrow.table({"emb": fixed}), tmp_path / "g.parquet")
    assert np.array_equal(load_features(tmp_path / "g.parquet").vectors, unit(dtype=np.float16))
    ragged = pyarrow.array([[1.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    write.write_table(pyarrow.table({"emb": ragged}), tmp_path / "h.parquet")
    with pytest.raises(InputError, match="not all of the same length"):
        load_features(tmp_path / "h.parquet")
    write.write_table(pyarrow.table({"emb": [[1.0], None]}), tmp_path / "i.parquet")
    with pytest.raises(InputError, match="1 rows of column emb are empty"):
        load_features(tmp_path / "i.parquet")


def test_clip_retrieval_folder(tmp_path):
    pyarrow, write = parquet()
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    everything = unit(24, dtype=np.float16)
    for part in range(12):  # 10 comes after 9
        rows = slice(2 * part, 2 * part + 2)
        np.save(tmp_path / "img_emb" / f"img_emb_{part}.npy", everything[rows])
        paths = [f"{row}.jpg" for row in range(24)[rows]]
        write.write_table(
            pyarrow.table({"image_path": paths, "caption": paths}), tmp_path / "metadata" / f"metadata_{part}.parquet"
        )
    for place in (tmp_path, tmp_path / "img_emb"):
        found = load_features(place)
        assert np.array_equal(found.vectors, everything)
        assert list(found.names) == [f"{row}.jpg" for row in range(24)]
    (tmp_path / "metadata" / "metadata_11.parquet").unlink()
    with pytest.raises(InputError, match="22 rows of metadata for 24 vectors"):
        load_features(tmp_path)


def test_what_is_saved_comes_back_whole(tmp_path):
    made = FeatureSet(unit(), "euclidean", "net 1", [f"é{i}" for i in range(6)], "somewhere", "net")
    found = load_features(made.save(tmp_path / "f.safetensors"))
    for name in ("metric", "fingerprint", "names", "source", "features"):
        assert getattr(found, name) == getattr(made, name)
    assert np.array_equal(found.vectors, made.vectors)
    data = bytearray((tmp_path / "f.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "f.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="checksum differs"):
        load_features(tmp_path / "f.safetensors")


def test_bits_and_bytes():
    assert load_features(np.eye(4, dtype=bool)).metric == "hamming"
    assert load_features(np.full((2, 4), 7, np.uint8)).metric == "euclidean"


def test_unit_vectors_are_checked():
    some = unit(10)
    some[3] *= 1.3
    with pytest.raises(InputError, match=r"1 of 10 vectors do not have the length 1 of the others.*number 3"):
        load_features(some)
    longer = load_features(unit() * 5)
    assert "not 1, are compared by the cosine" in longer.notes[0]
    assert not load_features(unit() * 5, metric="euclidean").notes


@pytest.mark.parametrize("name", ["f.npy", "f.npz", "f.safetensors", "f.pt", "f.parquet"])
def test_damaged_files_are_named(tmp_path, name):
    if name.endswith("parquet"):
        parquet()
    (tmp_path / name).write_bytes(b"\x93NUMPY" + bytes(40))
    with pytest.raises(InputError, match=name):
        load_features(tmp_path / name)


def test_what_is_no_features(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "f.txt").write_text("1 2 3")
    for path in ("empty", "f.txt", "absent.npy"):
        with pytest.raises(InputError, match=path):
            load_features(tmp_path / path)
    with pytest.raises(InputError, match="object of type int"):
        load_features(3)
    with pytest.raises(InputError, match=r"vectors \[N, d\]"):
        load_features(np.zeros((2, 3, 4), np.float32))
