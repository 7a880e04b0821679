"""The cached copy beside a source: used only for the contents it was made from, never trusted, never in the way."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from diffmem.data import load, load_images

RNG = np.random.default_rng(13)


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(params=["folder", "zip"])
def source(request, tmp_path):
    """(path, write): `write(images)` makes the source hold these, labeled 0, 1, …, and a file that is broken."""
    path = tmp_path / ("set" if request.param == "folder" else "set.zip")

    def write(images):
        files = {f"{index}.png": png(image) for index, image in enumerate(images)} | {"bad.png": b"bad"}
        labels = [[name, index] for index, name in enumerate(files)]
        files["dataset.json"] = json.dumps({"labels": labels}).encode()
        if request.param == "folder":
            path.mkdir(exist_ok=True)
            for name, data in files.items():
                (path / name).write_bytes(data)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in files.items():
                    archive.writestr(name, data)

    return path, write


def images_of(count):
    return RNG.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)


def same(one, two):
    np.testing.assert_array_equal(one.images, two.images)
    np.testing.assert_array_equal(one.labels, two.labels)
    assert (one.names, one.skipped, one.source, one.notes) == (two.names, two.skipped, two.source, two.notes)


@pytest.fixture
def decodings(monkeypatch):
    """Counts how often images were really decoded."""
    counted = []
    decode_all = load.decode_all
    monkeypatch.setattr(load, "decode_all", lambda *args, **options: counted.append(1) or decode_all(*args, **options))
    return counted


def test_second_reading_is_mapped_and_the_same(source, decodings):
    path, write = source
    write(images_of(5))
    plain = load_images(path, skip_bad=True)
    first = load_images(path, skip_bad=True, cache=True)
    second = load_images(path, skip_bad=True, cache=True)
    assert len(decodings) == 2
    same(first, plain)
    same(second, plain)
    assert isinstance(second.images, np.memmap)
    assert not second.images.flags.writeable
    same(load_images(path, skip_bad=True, cache=True, resize=3), load_images(path, skip_bad=True, resize=3))
    same(load_images(path, skip_bad=True, cache=True, limit=2), load_images(path, skip_bad=True, limit=2))


def test_other_contents_of_same_name_size_and_time(source, decodings):
    path, write = source
    write(images_of(5))
    load_images(path, skip_bad=True, cache=True)
    files = [path] if path.is_file() else sorted(path.iterdir())
    times = [file.stat().st_mtime_ns for file in files]
    write(images_of(5))
    for file, time in zip(files, times, strict=True):
        os.utime(file, ns=(time, time))
    same(load_images(path, skip_bad=True, cache=True), load_images(path, skip_bad=True))
    assert len(decodings) == 3
    load_images(path, skip_bad=True, cache=True)
    assert len(decodings) == 3


def test_other_labels_of_same_images(source):
    path, write = source
    images = images_of(5)
    write(images)
    load_images(path, skip_bad=True, cache=True)
    write(images[:4])
    if path.is_dir():
        (path / "4.png").unlink()
    same(load_images(path, skip_bad=True, cache=True), load_images(path, skip_bad=True))


def test_damaged_copy_is_replaced(source, decodings):
    path, write = source
    write(images_of(5))
    plain = load_images(path, skip_bad=True, cache=True)
    (copy,) = path.parent.glob(f"{path.name}.diffmem-*.safetensors")
    whole = copy.read_bytes()
    last_pixel = len(whole) - 5 * 8 - 1
    damages = [b"", whole[:4], whole[:100], whole[:-1], b"\xff" * len(whole), whole.replace(b"U8", b"F8")]
    damages.append(whole[:last_pixel] + bytes([whole[last_pixel] ^ 1]) + whole[last_pixel + 1 :])
    damages.append(whole.replace(b"0.png", b"7.png"))
    damages.append(whole.replace(b"0.png", b"x.png").replace(b"1.png", b"0.png").replace(b"x.png", b"1.png"))
    damages.append(whole.replace(b"bad.png", b"dab.png"))
    damages.append(whole + b"\0")
    assert whole not in damages
    for damage in damages:
        copy.write_bytes(damage)
        same(load_images(path, skip_bad=True, cache=True), plain)
        assert copy.read_bytes() == whole
    assert len(decodings) == 1 + len(damages)


def test_copy_is_a_safetensors_file(source):
    from safetensors.numpy import load_file

    path, write = source
    write(images_of(5))
    loaded = load_images(path, skip_bad=True, cache=True)
    (copy,) = path.parent.glob(f"{path.name}.diffmem-*.safetensors")
    tensors = load_file(copy)
    np.testing.assert_array_equal(tensors["images"], loaded.images)
    np.testing.assert_array_equal(tensors["labels"], loaded.labels)


def test_folder_that_is_marked_read_only(source):
    """Also for root, whom the mode would not stop."""
    path, write = source
    write(images_of(5))
    path.parent.chmod(0o555)
    try:
        loaded = load_images(path, skip_bad=True, cache=True)
        assert list(path.parent.iterdir()) == [path]
    finally:
        path.parent.chmod(0o755)
    assert len(loaded) == 5
    assert "is marked read-only" in loaded.notes[0]


def test_folder_that_cannot_be_written(source, monkeypatch):
    path, write = source
    write(images_of(5))

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", denied)
    loaded = load_images(path, skip_bad=True, cache=True)
    assert len(loaded) == 5
    (note,) = loaded.notes
    assert "no cached copy was written" in note
    assert "Permission denied" in note
    assert list(path.parent.iterdir()) == [path]
