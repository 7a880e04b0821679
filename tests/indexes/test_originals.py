"""Images of an index of features, read one by one from its sources: the pixels that the index was made of."""

import io
import zipfile

import numpy as np
import pytest
from indexes.conftest import png

import diffmem
from diffmem.indexes import build_index, containers, open_index, originals, remote
from diffmem.indexes.originals import Originals

ROWS = [3, 0, 68, 31, 3]


def made_of(source, folder, **options):
    """What reads single images of an index of hashes."""
    return Originals(open_index(build_index(source, folder, "hash", workers=1, **options).path))


def assert_read(reader, pixels, rows=ROWS):
    found = reader.read(rows)
    assert sorted(found) == sorted(set(rows))
    assert reader.said() == ""
    for row, image in found.items():
        np.testing.assert_array_equal(image, pixels[row])


@pytest.fixture
def images():
    return diffmem.load_images("builtin:patches?n=70", resize=8).images


@pytest.mark.parametrize("kind", ["zip", "folder", "npy", "npz", "parquet", "builtin", "tar"])
def test_each_kind_of_source(images, digits, shards, tmp_path, kind):
    source, options = tmp_path / f"train.{kind}", {}
    if kind == "zip":  # with a file that was skipped
        with zipfile.ZipFile(source, "w") as archive:
            for number, image in enumerate(images):
                archive.writestr(f"a/{number}.png", b"none" if number == 30 else png(image))
        options["skip_bad"] = True
    elif kind == "folder":
        source.mkdir()
        for number, image in enumerate(images):
            (source / f"{number}.png").write_bytes(png(image))
    elif kind in ("npy", "npz"):
        np.save(source, images) if kind == "npy" else np.savez(source, images=images)
        options["shards"] = 3
    elif kind == "parquet":
        pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
        import pyarrow.parquet

        table = pyarrow.table({"image": [png(image) for image in images]})
        pyarrow.parquet.write_table(table, source, row_group_size=20)
    elif kind == "builtin":
        source, options["resize"] = "builtin:patches?n=70", 8
    else:
        source = shards
    reader = made_of(source, tmp_path / "index", **options)
    assert_read(reader, {"zip": np.delete(images, 30, axis=0), "tar": digits.images}.get(kind, images))


def test_objects_of_a_store(images, digits, shards, tmp_path, store, monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, image in enumerate(images):
            archive.writestr(f"{number}.png", png(image))
    store.files.pipe("train/pictures/a.zip", buffer.getvalue())
    store.files.put(str(shards), "train/pictures/tars", recursive=True)
    assert_read(made_of("s3://train/pictures/tars/train-002.tar", tmp_path / "tar"), digits.images[200:], [3, 0, 29])
    reader = made_of("s3://train/pictures/a.zip", tmp_path / "zip")
    assert_read(reader, images)
    reader = Originals(reader.folder)
    store.files.rm("train/pictures/a.zip")
    containers._container.cache_clear()
    assert reader.read(ROWS) == {}
    assert reader.said().startswith("4 training images could not be read from the sources of the index (s3://train/")


def test_sources_that_are_not_what_they_were(images, tmp_path, monkeypatch):
    source = tmp_path / "train"
    source.mkdir()
    for number, image in enumerate(images):
        (source / f"b{number:02d}.png").write_bytes(png(image))
    reader = made_of(source, tmp_path / "index")
    (source / "a.png").write_bytes(png(images[0]))  # before all others
    (source / "b03.png").write_bytes(png(images[5]))
    (source / "b31.png").unlink()
    (source / "b68.png").write_bytes(b"none")
    found = reader.read([*ROWS, 40])
    assert sorted(found) == [0, 40]
    np.testing.assert_array_equal(np.stack([found[0], found[40]]), images[[0, 40]])
    assert reader.said().startswith(f"3 training images could not be read from the sources of the index ({source}: ")
    assert "has changed since the index was built" in str(reader.problems)
    assert "is no longer there" in str(reader.problems)
    late = Originals(reader.folder)
    assert late.read([1], ends=0.0) == {}
    assert originals.TOO_LATE in late.said()
    assert late.read([2]).keys() == {2}


def test_archives_of_an_index_that_does_not_say_where_images_lie(digits, shards, tmp_path):
    reader = made_of(shards, tmp_path / "index")
    for shard in reader.folder.shards:
        (shard.folder / "places.npy").unlink()
    assert_read(Originals(open_index(reader.folder.path)), digits.images)
