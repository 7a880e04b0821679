"""Tar archives of webdataset and img2dataset: samples, labels, names, and what is wrong with damaged or forged ones."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from data.test_containers import encoded, pixels

from diffmem.data import load_images
from diffmem.errors import InputError


def tar_of(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def shards(folder, images, per_shard=3):
    folder.mkdir(exist_ok=True)
    for start in range(0, len(images), per_shard):
        files = []
        for index, image in enumerate(images[start : start + per_shard], start):
            files += [(f"{index:05d}.cls", str(index % 4).encode()), (f"{index:05d}.png", encoded(image))]
            files += [(f"{index:05d}.txt", b"a caption"), (f"{index:05d}.pt", pickle.dumps(print))]
        tar_of(folder / f"train-{start // per_shard:03d}.tar", files)
    return folder


def test_shards_alone_in_a_folder_and_by_range(tmp_path):
    images = pixels(8)
    folder = shards(tmp_path / "set", images)
    (folder / "train-000.parquet").write_bytes(b"img2dataset's table of metadata, not read")
    (folder / "train-000_stats.json").write_text("{}")
    for source in (folder, str(folder / "train-{000..002}.tar")):
        loaded = load_images(source)
        np.testing.assert_array_equal(loaded.images, images)
        np.testing.assert_array_equal(loaded.labels, np.arange(8) % 4)
        assert (loaded.names[0], loaded.names[-1], loaded.notes) == ("train-000/00000.png", "train-002/00007.png", ())
    one = load_images(folder / "train-001.tar", limit=2)
    np.testing.assert_array_equal(one.images, images[3:5])
    assert one.names == ["00003.png", "00004.png"]
    packed = load_images(folder, cache=True)
    assert load_images(folder, cache=True).fingerprint == packed.fingerprint == load_images(folder).fingerprint


def test_labels_of_json_and_long_names(tmp_path):
    images = pixels(3)
    long = "folder/" * 40
    files = []
    for index, image in enumerate(images):
        files += [(f"{long}{index}.v.1.JPG", b"other"), (f"{long}{index}.png", encoded(image))]
        files += [(f"{long}{index}.json", json.dumps({"caption": "a", "label": 7 - index}).encode())]
    loaded = load_images(tar_of(tmp_path / "a.tar", files))
    np.testing.assert_array_equal(loaded.images, images)
    np.testing.assert_array_equal(loaded.labels, [7, 6, 5])
    assert loaded.names[0] == f"{long}0.png"
    captions = [(name, b'{"caption": "a"}' if name.endswith("json") else data) for name, data in files]
    plain = load_images(tar_of(tmp_path / "b.tar", captions))
    assert plain.labels is None
    assert plain.notes == ()
    some = [("0.png", encoded(images[0])), ("0.cls", b"3"), ("1.png", encoded(images[1]))]
    partly = load_images(tar_of(tmp_path / "c.tar", some))
    assert partly.labels is None
    assert "1.png has no label in .cls" in partly.notes[0]


def says(source, *texts, **options):
    with pytest.raises(InputError) as error:
        load_images(source, **options)
    line = str(error.value)
    assert "\n" not in line
    for text in texts:
        assert text in line, line


def test_what_cannot_be_read(tmp_path):
    image = encoded(pixels(1)[0])
    pickles = tar_of(tmp_path / "pickles.tar", [("0.pt", pickle.dumps(print)), ("0.cls", b"1"), ("0.npy", b"?")])
    says(pickles, "no images in this archive", ".pt ×1")
    two = tar_of(tmp_path / "two.tar", [("0.left.png", image), ("0.right.png", image)])
    says(two, "several images", "key=", "left.png, right.png")
    assert len(load_images(two, key="right.png")) == 1
    says(tar_of(tmp_path / "twice.tar", [("0.png", image), ("0.png", image)]), "two members are named 0.png")
    says(str(tmp_path / "a-{0..3}.tar"), "4 of 4 files are missing", "a-0.tar")
    says(str(tmp_path / "a-{3..0}.tar"), "ascends")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("0.png"), io.BytesIO())
    says(tmp_path / "packed.tar", "unpack it")
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    says(tmp_path / "links.tar", "no images in this archive")


def test_every_damage_is_noticed(tmp_path):
    """A tar that ends early, at whatever byte, and one whose headers are overwritten."""
    files = [(f"{index}.png", encoded(image)) for index, image in enumerate(pixels(3))]
    data = tar_of(tmp_path / "good.tar", files).read_bytes()
    end = len(data.rstrip(b"\0"))
    damaged = tmp_path / "damaged.tar"
    for cut in [0, 100, *range(512, end + 1, 256)]:
        damaged.write_bytes(data[:cut])
        says(damaged, "damaged.tar")
    for start in range(0, end, 512):
        damaged.write_bytes(data[:start] + b"\xff" * 512 + data[start + 512 :])
        says(damaged, "damaged.tar")
