"""HDF5 files: which dataset, labels, and that nothing outside the file is opened."""

import sys

import numpy as np
import pytest
from data.test_containers import pixels
from data.test_tar_shards import says

from diffmem.data import load_images
from diffmem.errors import MissingExtraError

h5py = pytest.importorskip("h5py", reason="the extra `hdf5` is not installed")


def written(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file.create_dataset(name.replace("__", "/"), data=values, compression="gzip" if np.ndim(values) else None)
    return path


def test_images_and_labels(tmp_path):
    images = pixels(9)
    labels = np.arange(9)
    pcam = written(tmp_path / "x.h5", x=images.transpose(0, 2, 3, 1), y=labels[:, None, None, None])
    loaded = load_images(pcam)
    np.testing.assert_array_equal(loaded.images, images)
    np.testing.assert_array_equal(loaded.labels, labels)
    groups = written(tmp_path / "g.hdf5", train__images=images, train__labels=labels, test__images=images[:2] / 255)
    says(groups, "key=", "test/images, train/images")
    np.testing.assert_array_equal(load_images(groups, key="train/images", limit=3).labels, labels[:3])
    test = load_images(groups, key="/test/images", value_range=(0, 1))
    np.testing.assert_array_equal(test.images, images[:2])
    assert test.labels is None
    gray = load_images(written(tmp_path / "gray.h5", scans=images[:, 0], labels=["a"] * 9))
    np.testing.assert_array_equal(gray.images, images[:, :1])
    assert "labels are ignored" in gray.notes[0]


def test_what_is_refused(tmp_path, monkeypatch):
    images = pixels(4)
    other = written(tmp_path / "other.h5", images=images)
    images[0].tofile(tmp_path / "raw")
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["linked"] = h5py.ExternalLink(str(other), "images")
        file["soft"] = h5py.SoftLink("/nowhere")
        file.create_dataset("raw", (1, 3, 6, 6), np.uint8, external=[(str(tmp_path / "raw"), 0, 108)])
        layout = h5py.VirtualLayout((4, 3, 6, 6), np.uint8)
        layout[:] = h5py.VirtualSource(str(other), "images", (4, 3, 6, 6))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("never", (10**7, 3, 64, 64), np.uint8, chunks=(1, 3, 64, 64))
        file.create_dataset("files", (2,), h5py.vlen_dtype(np.uint8))
        file.create_dataset("references", (2, 3, 6, 6), h5py.ref_dtype)
        file["itself/again"] = file["/"]
    says(path, "there is no dataset 'linked'", key="linked")
    for key in ("raw", "virtual"):
        says(path, "lie in other files", key=key)
    says(path, "never filled", key="never")
    for key in ("files", "references"):
        says(path, "not numbers", key=key)
    says(written(tmp_path / "none.h5", table=np.zeros((3, 2))), "no dataset of images", "table float64")
    data = written(tmp_path / "good.h5", images=images).read_bytes()
    damaged = tmp_path / "damaged.h5"
    for cut in range(0, len(data), 199):
        damaged.write_bytes(data[:cut])
        says(damaged, "damaged.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError, match=r"diffmem\[hdf5\]"):
        load_images(other)
