"""Parquet files with images: which column, which split, lists, labels, reading in any order, and what is refused."""

import sys

import numpy as np
import pytest
from data.test_containers import encoded, pixels
from data.test_tar_shards import says

from diffmem.data import load_images
from diffmem.data.parquet import ParquetImages
from diffmem.errors import MissingExtraError

pa = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
import pyarrow.parquet as pq  # noqa: E402

HF = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def written(path, columns, types=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: pa.array(values, (types or {}).get(name)) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path, **options)
    return path


def test_columns_names_and_labels(tmp_path):
    images = pixels(5)
    files = [encoded(image) for image in images]
    plain = load_images(written(tmp_path / "a.parquet", {"x": [1] * 5, "jpg": files, "key": list("abcde")}))
    np.testing.assert_array_equal(plain.images, images)
    assert (plain.names, plain.labels, plain.notes) == (list("abcde"), None, ())
    rows = [{"bytes": data, "path": "/etc/passwd"} for data in files]
    table = written(tmp_path / "b.parquet", {"label": [2, 0, 1, 1, 0], "image": rows}, {"image": HF})
    hub = load_images(table, limit=4)
    np.testing.assert_array_equal(hub.images, images[:4])
    np.testing.assert_array_equal(hub.labels, [2, 0, 1, 1])
    assert hub.names[3] == "row-00000003"
    lists = written(
        tmp_path / "c.parquet", {"images": [rows[:2], None, [], rows[2:]], "label": [4, 5, 6, 7]},
        {"images": pa.list_(HF)},
    )  # fmt: skip
    several = load_images(lists)
    np.testing.assert_array_equal(several.images, images)
    np.testing.assert_array_equal(several.labels, [4, 4, 7, 7, 7])
    assert several.names == ["row-00000000#0", "row-00000000#1", *(f"row-00000003#{place}" for place in range(3))]
    two = written(tmp_path / "d.parquet", {"before": files, "after": files[::-1]})
    says(two, "key=", "before, after")
    np.testing.assert_array_equal(load_images(two, key="after").images, images[::-1])


def test_a_folder_of_splits(tmp_path):
    images = pixels(6)
    files = [encoded(image) for image in images]
    for name, part in {"train-00000-of-00002": files[:2], "train-00001-of-00002": files[2:4]}.items():
        written(tmp_path / "data" / f"{name}.parquet", {"img": part})
    written(tmp_path / "data" / "test-00000-of-00001.parquet", {"img": files[4:]})
    (tmp_path / "README.md").write_text("a card")
    says(tmp_path, "pick one split", "test, train")
    train = load_images(tmp_path, key="train")
    np.testing.assert_array_equal(train.images, images[:4])
    assert train.names[2] == "train-00001-of-00002/row-00000000"
    np.testing.assert_array_equal(load_images(tmp_path, key="test:img").images, images[4:])
    written(tmp_path / "data" / "train-00001-of-00002.parquet", {"other": files[2:4]})
    says(tmp_path, "columns", key="train")


@pytest.mark.parametrize("group", [7, 64, 1000])
def test_any_order_of_reading(tmp_path, group, monkeypatch):
    monkeypatch.setattr("diffmem.data.parquet._MOST_BATCHES", 2)
    values = [b"%d" % index for index in range(300)]
    source = ParquetImages([written(tmp_path / "a.parquet", {"image": values}, row_group_size=group)], "a", None)
    order = np.random.default_rng(group).permutation(300)[:60]
    assert [source.read(index) for index in order] == [values[index] for index in order]
    assert [source.read(index) for index in range(300)] == values


def test_what_is_refused(tmp_path, monkeypatch):
    image = encoded(pixels(1)[0])
    says(written(tmp_path / "text.parquet", {"url": ["a"], "n": [1]}), "no column", "url, n")
    elsewhere = [{"bytes": None, "path": "/etc/passwd"}]
    says(written(tmp_path / "path.parquet", {"image": elsewhere}, {"image": HF}), "row-00000000", "holds its path")
    hole = written(tmp_path / "hole.parquet", {"image": [image, None]})
    says(hole, "row-00000001", "no bytes")
    assert len(load_images(hole, skip_bad=True)) == 1
    says(written(tmp_path / "none.parquet", {"image": []}, {"image": pa.binary()}), "no images")
    data = written(tmp_path / "good.parquet", {"image": [image] * 9}, compression="none").read_bytes()
    damaged = tmp_path / "damaged.parquet"
    for cut in range(0, len(data), 97):
        damaged.write_bytes(data[:cut])
        says(damaged, "damaged.parquet", "not a complete parquet file")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"diffmem\[parquet\]"):
        load_images(damaged)
