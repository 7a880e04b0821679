"""LMDB databases, read by our own reader: against the library where it is there, and damaged in every page."""

import pickle

import numpy as np
import pytest
from data.test_containers import encoded, pixels
from data.test_tar_shards import says
from PIL import Image

from diffmem.data import load_images
from diffmem.data.lmdb import LmdbImages
from diffmem.errors import InputError

lmdb = pytest.importorskip("lmdb", reason="the package lmdb, which writes the databases, is not installed")


def written(path, items, subdir=True):
    with lmdb.open(str(path), map_size=2**26, subdir=subdir) as environment, environment.begin(write=True) as writer:
        for key, value in items:
            writer.put(key, value)
    return path


def test_images_in_order_of_keys(tmp_path):
    images = pixels(600)
    items = [(f"{(index * 7) % 600:06d}".encode(), encoded(image)) for index, image in enumerate(images)]
    large = encoded(Image.effect_noise((300, 300), 80))
    for path in (written(tmp_path / "a", items), written(tmp_path / "a.lmdb", items, subdir=False)):
        loaded = load_images(path)
        order = sorted(range(600), key=lambda index: items[index][0])
        np.testing.assert_array_equal(loaded.images, images[order])
        assert loaded.names == [items[index][0].decode() for index in order]
        assert loaded.notes == ()
    written(tmp_path / "a", [(b"\xff", large), (b"length", b"601"), (b"meta", pickle.dumps(print))])
    source = LmdbImages(tmp_path / "a" / "data.mdb", "a")
    assert source.read(600) == large
    assert source.names[600] == "ff"
    assert "2 values that are no image files were skipped (length, meta)" in source.notes[0]


def test_what_is_refused(tmp_path):
    says(written(tmp_path / "pickles", [(b"0", pickle.dumps(print))]), "no image files", "pickles")
    says(written(tmp_path / "empty", []), "it is empty")
    good = written(tmp_path / "good", [(b"%d" % index, b"\x89PNG" + bytes(9 * index)) for index in range(900)])
    data = (good / "data.mdb").read_bytes()
    damaged = tmp_path / "damaged.mdb"
    for cut in [0, 20, 4096, 8192, *range(9000, len(data), len(data) // 40)]:
        damaged.write_bytes(data[:cut])
        says(damaged, "damaged.mdb", "not a complete LMDB database")
    rng, lines = np.random.default_rng(1), []
    for _ in range(60):  # whatever is overwritten, an answer or one line; nothing crashes or hangs
        wrong = bytearray(data)
        for place in rng.integers(0, min(len(data), 2**17), 40):
            wrong[place] = rng.integers(256)
        damaged.write_bytes(wrong)
        try:
            source = LmdbImages(damaged, "damaged")
            [source.read(index) for index in range(len(source.names))]
        except InputError as error:
            lines.append(str(error))
    assert lines
    assert not any("\n" in line for line in lines)
