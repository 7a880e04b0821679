"""An index on disk: the same answers after a round trip, and clear refusals."""

import json

import numpy as np
import pytest
import torch

from diffmem.errors import InputError
from diffmem.ops.registry import native_module
from diffmem.search import TrainingIndex

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
    with pytest.raises(InputError, match="build it again"):
        TrainingIndex.load(folder)
    description = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(description | {"format": "diffmem-index-0"}))
    with pytest.raises(InputError, match="another version"):
        TrainingIndex.load(folder)
    with pytest.raises(InputError, match="no usable index"):
        TrainingIndex.load(tmp_path / "nowhere")
