"""Written image sets: whole or not there, byte for byte the same, and read back as they were."""

import json
import zipfile

import numpy as np
import pytest
from examples_made import at_most
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from diffmem.data import ImageSet, load_images, write, write_edm_zip, write_folder, write_images, write_npz
from diffmem.errors import InputError

RNG = np.random.default_rng(17)
# The suite flushes subnormal numbers to zero, on which hypothesis cannot rely then.
LABEL_NUMBERS = st.floats(-1e9, 1e9, width=32, allow_subnormal=False)
IMAGES = RNG.integers(0, 256, (3, 3, 5, 5), dtype=np.uint8)


@st.composite
def image_sets(draw, channels=(1, 3)):
    count, channel = draw(st.integers(1, 5)), draw(st.sampled_from(channels))
    size = st.integers(1, 6)
    images = draw(arrays.arrays(np.uint8, (count, channel, draw(size), draw(size))))
    labels = draw(
        st.one_of(
            st.none(),
            arrays.arrays(np.int64, count),
            arrays.arrays(np.float32, st.tuples(st.just(count), st.integers(1, 3)), elements=LABEL_NUMBERS),
        )
    )
    return ImageSet(images, None, labels)


def same(one, two):
    np.testing.assert_array_equal(one.images, two.images)
    assert (one.labels is None) == (two.labels is None)
    if one.labels is not None:
        assert one.labels.dtype == two.labels.dtype
        np.testing.assert_array_equal(one.labels, two.labels)
    assert one.fingerprint == two.fingerprint


@given(image_sets())
@settings(max_examples=at_most(20))
def test_edm_zip_round_trip(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("edm")
    write_images(images, folder / "a.zip")
    read = load_images(folder / "a.zip")
    same(read, images)
    assert read.names == [f"00000/img{index:08d}.png" for index in range(len(images))]
    write_edm_zip(read, folder / "b.zip")
    assert (folder / "a.zip").read_bytes() == (folder / "b.zip").read_bytes()


@given(image_sets(channels=(1, 2, 3, 4)), st.data())
@settings(max_examples=at_most(20))
def test_npz_round_trip(tmp_path_factory, images, data):
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
    images = ImageSet(
        images.images, data.draw(st.lists(names, min_size=len(images), max_size=len(images))), images.labels
    )
    write_npz(images, path, seeds=range(5, 5 + len(images)))
    read = load_images(path, layout="NCHW")
    same(read, images)
    assert read.names == images.names
    with np.load(path) as arrays_in_file:
        np.testing.assert_array_equal(arrays_in_file["seeds"], np.arange(5, 5 + len(images)))


@given(image_sets(), st.data())
@settings(max_examples=at_most(20))
def test_folder_round_trip(tmp_path_factory, images, data):
    path = tmp_path_factory.mktemp("folder") / "a"
    seeds = data.draw(
        st.lists(st.integers(0, 10**7), min_size=len(images), max_size=len(images), unique=True).map(sorted)
    )
    write_folder(images, path, seeds)
    read = load_images(path)
    same(read, images)
    assert read.names == [f"{seed // 1000 * 1000:06d}/{seed:06d}.png" for seed in seeds]


def test_edm_layout(tmp_path):
    write_edm_zip(ImageSet(IMAGES, labels=np.array([2, 0, 1])), tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert [entry.compress_type for entry in archive.infolist()] == [zipfile.ZIP_STORED] * 4
        assert archive.namelist()[0] == "00000/img00000000.png"
        labels = json.loads(archive.read("dataset.json"))["labels"]
        with archive.open("00000/img00000002.png") as file:
            np.testing.assert_array_equal(np.asarray(Image.open(file)), IMAGES[2].transpose(1, 2, 0))
    assert labels == [[f"00000/img{index:08d}.png", label] for index, label in enumerate([2, 0, 1])]
    write_edm_zip(ImageSet(IMAGES), tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}


def test_folder_has_a_sub_folder_per_thousand(tmp_path):
    write_images(ImageSet(IMAGES), tmp_path / "a")
    write_folder(ImageSet(IMAGES), tmp_path / "b", seeds=np.array([1234, 999, 1000]))
    found = [
        sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / name).rglob("*.png")) for name in "ab"
    ]
    assert found[0] == ["a/000000/000000.png", "a/000000/000001.png", "a/000000/000002.png"]
    assert found[1] == ["b/000000/000999.png", "b/001000/001000.png", "b/001000/001234.png"]


@pytest.mark.parametrize("name", ["a.zip", "a.npz", "a"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_half_written(tmp_path, monkeypatch, name, failure):
    old = tmp_path / name
    if old.suffix:
        old.write_bytes(b"old")
    calls = []

    def fails(*_, **__):
        calls.append(1)
        if len(calls) > 1:
            raise failure
        return b"png"

    monkeypatch.setattr(write, "_png", fails)
    monkeypatch.setattr(
        "zipfile.ZipFile.writestr" if name == "a.zip" else "numpy.savez", lambda *_, **__: fails() and fails()
    )
    with pytest.raises(KeyboardInterrupt if failure is KeyboardInterrupt else InputError) as error:
        write_images(ImageSet(IMAGES), old)
    if failure is not KeyboardInterrupt:
        assert "No space left on device" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ([name] if old.suffix else [])
    assert not old.suffix or old.read_bytes() == b"old"


def test_wrong_sets_and_places(tmp_path):
    floats = ImageSet(IMAGES.astype(np.float32))
    for writer in (write_edm_zip, write_npz, write_folder):
        with pytest.raises(InputError, match="only uint8"):
            writer(floats, tmp_path / "x")
        with pytest.raises(InputError, match="cannot be written: No such file"):
            writer(ImageSet(IMAGES), tmp_path / "absent" / "x")
    with pytest.raises(InputError, match="1 or 3 channels"):
        write_edm_zip(ImageSet(IMAGES[:, :2]), tmp_path / "x.zip")
    with pytest.raises(InputError, match=r"\.zip, as \.npz"):
        write_images(ImageSet(IMAGES), tmp_path / "x.jpg")
    for seeds in ([1, 2], [1, 1, 2], [-1, 0, 1], [0.5, 1, 2]):
        with pytest.raises(InputError, match="seed"):
            write_folder(ImageSet(IMAGES), tmp_path / "x", seeds)
    assert not any(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="exists already"):
        write_folder(ImageSet(IMAGES), tmp_path / "full")
    (tmp_path / "empty").mkdir()
    write_folder(ImageSet(IMAGES), tmp_path / "empty")
    assert len(load_images(tmp_path / "empty")) == 3
