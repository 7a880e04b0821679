"""DICOM and NIfTI: slices in the file's units, 8 bits as they are, and what is refused."""

import sys

import numpy as np
import pytest
from data.test_containers import pixels
from data.test_tar_shards import says

from diffmem.data import load_images
from diffmem.errors import MissingExtraError


def dicom(path, pixels, photometric="MONOCHROME2", signed=0, **more):
    pydicom = pytest.importorskip("pydicom", reason="the extra `medical` is not installed")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = pydicom.Dataset()
    data.file_meta, data.SOPClassUID, data.SOPInstanceUID = meta, pydicom.uid.CTImageStorage, "1.2.3"
    data.Rows, data.Columns = pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, photometric, signed
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.HighBit = data.BitsStored - 1
    if pixels.ndim == 3:
        data.NumberOfFrames = len(pixels)
    for name, value in more.items():
        setattr(data, name, value)
    data.add_new("PixelData", "OB" if pixels.itemsize == 1 else "OW", pixels.tobytes())
    data.save_as(path, enforce_file_format=True)
    return path


def test_dicom(tmp_path, monkeypatch):
    gray = pixels(4)[:, 0]
    series = tmp_path / "series"
    series.mkdir()
    for index, plane in enumerate(gray):
        dicom(series / f"{index}.dcm", plane)
    loaded = load_images(series)
    np.testing.assert_array_equal(loaded.images[:, 0], gray)
    assert loaded.names == [f"{index}.dcm" for index in range(4)]
    assert load_images(series, limit=2).names == loaded.names[:2]
    frames = load_images(dicom(tmp_path / "frames.dcm", gray, photometric="MONOCHROME1"))
    np.testing.assert_array_equal(frames.images[:, 0], 255 - gray)
    assert frames.names[3] == "frames.dcm#3"
    units = gray.astype(np.int16) * 16 - 1000
    ct = dicom(tmp_path / "ct.dcm", units, signed=1, RescaleSlope="2", RescaleIntercept="-24")
    np.testing.assert_array_equal(load_images(ct).images[:, 0], (units * 2 - 24).astype(np.float32))
    assert load_images(ct, value_range=(-2024, 6136)).images.dtype == np.uint8
    dicom(series / "9.dcm", units[0], signed=1)
    says(series, "9.dcm", "float32", "read them apart")
    data = (series / "0.dcm").read_bytes()
    damaged = tmp_path / "damaged.dcm"
    for cut in range(0, len(data) - 2, 23):
        damaged.write_bytes(data[:cut])
        says(damaged, "damaged.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(MissingExtraError, match=r"diffmem\[medical\]"):
        load_images(damaged)


def test_nifti(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="the extra `medical` is not installed")
    volume = np.random.default_rng(0).integers(0, 256, (5, 6, 4), dtype=np.uint8)
    for name in ("a.nii", "a.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / name)
        loaded = load_images(tmp_path / name)
        np.testing.assert_array_equal(loaded.images[:, 0], volume.transpose(2, 1, 0))
        assert loaded.names[-1] == f"{name}#3"
        data = (tmp_path / name).read_bytes()
        for cut in (0, 100, len(data) // 2, len(data) - 9):
            (tmp_path / f"damaged-{name}").write_bytes(data[:cut])
            says(tmp_path / f"damaged-{name}", f"damaged-{name}")
    nibabel.save(nibabel.Nifti1Image(volume.astype(np.float32) / 2, np.eye(4)), tmp_path / "b.nii")
    np.testing.assert_array_equal(load_images(tmp_path / "b.nii").images[:, 0], volume.transpose(2, 1, 0) / 2)
