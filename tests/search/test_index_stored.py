"""An index on disk: the same answers after a round trip, and clear refusals."""

import json
import shutil

import numpy as np
import pytest
import torch

from diffmem.data import ImageSet
from diffmem.errors import InputError
from diffmem.ops.registry import native_module
from diffmem.search import TrainingIndex, filtered, stored

pytestmark = pytest.mark.skipif(native_module() is None, reason="diffmem was installed without its compiled core")


def images(n: int = 1500, dtype: str = "uint8") -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(n, 4)) @ rng.normal(size=(4, 48)) * 10 + 128
    return values.clip(0, 255).astype(dtype).reshape(n, 3, 4, 4)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("method", ["auto", "dense"])
def test_round_trip(tmp_path, dtype, method):
    built = TrainingIndex(images(dtype=dtype), method=method)
    built.save(tmp_path / "index")
    loaded = TrainingIndex.load(tmp_path / "index")
    expected, found = built.query(images(20, dtype)), loaded.query(images(20, dtype))
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.squared_distances, expected.squared_distances)
    assert loaded.stats.method == built.stats.method
    assert isinstance(loaded.rows, torch.Tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_an_index_is_replaced_anything_else_is_not(tmp_path):
    TrainingIndex(images(1100)).save(tmp_path / "index")
    TrainingIndex(images(1200)).save(tmp_path / "index")
    assert len(TrainingIndex.load(tmp_path / "index")) == 1200
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="not an index"):
        TrainingIndex(images(5)).save(tmp_path / "other")


def test_damage_is_noticed(tmp_path):
    folder = tmp_path / "index"
    TrainingIndex(images()).save(folder)
    values = np.load(folder / "fine.npy", mmap_mode="r+")
    values[0, 700, 3] += 1
    values.flush()
    with pytest.raises(InputError, match="fingerprint"):
        TrainingIndex.load(folder)
    (folder / "images.npy").write_bytes((folder / "images.npy").read_bytes()[:-7])
    with pytest.raises(InputError, match="rebuild it"):
        TrainingIndex.load(folder)
    description = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(description | {"format": "diffmem-index-0"}))
    with pytest.raises(InputError, match="another version"):
        TrainingIndex.load(folder)
    with pytest.raises(InputError, match="no usable index"):
        TrainingIndex.load(tmp_path / "nowhere")


def resealed(folder, arrays):
    """The index with other arrays, and the checksums that they should have."""
    from diffmem.integrity import sealed
    from diffmem.search.stored import _fingerprint

    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    description = json.loads((folder / "index.json").read_text())
    del description["sha256"], description["fingerprint"]
    everything = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    description["fingerprint"] = _fingerprint(everything, description)
    (folder / "index.json").write_text(json.dumps(sealed(description)))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_arrays_are_checked_before_the_core_sees_them(dtype, tmp_path):
    """Also where every checksum fits: a pointer to fewer values, or to values in another order, must not be passed."""
    built = tmp_path / "built"
    TrainingIndex(images(dtype=dtype), method="filtered").save(built)
    arrays = {path.stem: np.load(path) for path in built.glob("*.npy")}
    assert {"images", "panels", "fine", "order", "starts"} <= set(arrays)
    changes = [{name: values[:-1]} for name, values in arrays.items()]
    changes += [{name: np.asfortranarray(values)} for name, values in arrays.items() if values.ndim > 1]
    changes += [{name: values.astype(values.dtype.newbyteorder(">"))} for name, values in arrays.items()]
    changes += [{name: values[..., None]} for name, values in arrays.items()]
    changes += [{name: values[:0]} for name, values in arrays.items()]
    changes += [
        {"images": arrays["images"][::-1]},
        {"fine": arrays["fine"][:, ::-1]},
        {"panels": arrays["panels"][::-1]},
        {"order": arrays["order"][::-1]},
        {"order": np.zeros_like(arrays["order"])},
        {"order": arrays["order"] + 1},
        {"starts": arrays["starts"][::-1]},
        {"starts": arrays["starts"] * 2},
        {"error": -arrays["error"] - 1},
    ]
    for change in changes:
        folder = tmp_path / "index"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(built, folder)
        ((name, values),) = change.items()
        same = values.dtype == arrays[name].dtype and np.array_equal(values, arrays[name])
        if same and values.flags.c_contiguous:
            continue  # bytes have one order, and so has a single column
        resealed(folder, change)
        with pytest.raises(InputError, match=r"^[^\n]*rebuild it$"):
            pytest.fail(f"{name} was taken: {TrainingIndex.load(folder)}")


def test_an_array_stored_column_by_column(tmp_path):
    """The same values with the same fingerprint, but another order in memory."""
    folder = tmp_path / "index"
    TrainingIndex(images(), method="filtered").save(folder)
    np.save(folder / "basis_p.npy", np.asfortranarray(np.load(folder / "basis_p.npy")))
    with pytest.raises(InputError, match="basis_p"):
        TrainingIndex.load(folder)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_the_code_beside_a_cached_copy(dtype, tmp_path, monkeypatch):
    file, training, queries = tmp_path / "train.index.npz", images(dtype=dtype), images(dtype=dtype)[:40] // 2
    training = training.reshape(len(training), 1, 1, -1)
    built = []
    build = filtered.build
    monkeypatch.setattr(filtered, "build", lambda *arguments: built.append(1) or build(*arguments))

    def index_of(pixels):
        return TrainingIndex(ImageSet(pixels), method="filtered", code_file=file)

    wanted = index_of(training).query(queries, 3)
    kept = file.read_bytes()
    found = index_of(training)
    assert len(built) == 1
    assert found.holds(training)
    for name in stored.CODE:
        assert getattr(found.filtered, name).ctypes.data % 64 == 0, name
    answer = found.query(queries, 3)
    np.testing.assert_array_equal(answer.indices, wanted.indices)
    np.testing.assert_array_equal(answer.squared_distances, wanted.squared_distances)
    # Of other images, and damaged: made again.
    index_of(training[::-1].copy())
    assert len(built) == 2
    assert file.read_bytes() != kept
    for damage in (b"", kept[:-100], kept[: len(kept) // 2] + b"?" + kept[len(kept) // 2 + 1 :]):
        file.write_bytes(damage)
        answer = index_of(training).query(queries, 3)
        np.testing.assert_array_equal(answer.indices, wanted.indices)
        assert file.read_bytes() == kept
    assert len(built) == 5
    shutil.rmtree(tmp_path)  # nowhere to write: as without
    np.testing.assert_array_equal(index_of(training).query(queries, 3).indices, wanted.indices)
