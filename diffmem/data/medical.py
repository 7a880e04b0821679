"""Slices of DICOM and NIfTI files, by the extra `medical`.

Files of 8 bits give uint8 images, deeper ones float32 in the file's own units (Hounsfield units in CT): `value_range`
says which of them are black and white. No window is chosen here, since it decides what a copy is.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.data.arrays import LARGE, MOST_DEFLATED, Arrays
from diffmem.data.storage import Gathering
from diffmem.errors import InputError, MissingExtraError
from diffmem.inert.boundary import parsing
from diffmem.progress import Progress
from diffmem.text import printable

MEDICAL_SUFFIXES = (".dcm", ".dicom", ".nii", ".nii.gz")
_ADVICE = "copy or export it again"


def read_medical(files: Sequence[Path], where: Path, limit: int | None, progress: Progress) -> Arrays:
    """The slices of `files`, in their order: frames of DICOM files, planes along the last axis of NIfTI volumes."""
    names: list[str] = []
    first: tuple[Any, str] | None = None
    with Gathering() as gathered:
        for number, path in enumerate(files):
            if limit is not None and len(names) >= limit:
                break
            reader = _nifti if path.name.lower().endswith((".nii", ".nii.gz")) else _dicom
            _require(path, "nibabel" if reader is _nifti else "pydicom")
            with parsing(path, f"a {'NIfTI' if reader is _nifti else 'DICOM'} file that can be read", _ADVICE):
                slices, several = reader(path)
            name = printable(path.relative_to(where).as_posix()) if path != where else printable(path.name)
            form = (slices.dtype, slices.shape[1:])
            first = first or (form, name)
            if form != first[0]:
                shown, expected = (f"{dtype} {shape}" for dtype, shape in (form, first[0]))
                raise InputError(
                    f"{where}: slices of {name} are {shown}, those of {first[1]} are {expected}: read them apart"
                )
            gathered.append(slices)
            names += [f"{name}#{index}" for index in range(len(slices))] if several else [name]
            progress("reading images", number + 1, len(files))
        return Arrays(gathered.array(), names=names)


def _require(path: Path, package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError:
        raise MissingExtraError(package, "medical", f"reading {path}") from None


def _check_size(needed: int, path: Path) -> None:
    if needed > LARGE and needed > MOST_DEFLATED * path.stat().st_size:
        raise InputError(f"{path}: declares {needed / 1e9:.1f} GB of pixels, far more than the file can hold")


def _dicom(path: Path) -> tuple[np.ndarray, bool]:
    """The frames of a DICOM file [n, C, H, W], with the rescaling that it prescribes."""
    import pydicom
    import pydicom.pixels

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = pydicom.dcmread(path)
        if "Rows" not in header or "Columns" not in header:
            raise InputError(f"{path}: a DICOM file without an image")
        frames, samples = int(header.get("NumberOfFrames", 1) or 1), int(header.get("SamplesPerPixel", 1))
        bits = int(header.get("BitsAllocated", 8))
        _check_size(frames * samples * int(header.Rows) * int(header.Columns) * bits // 8, path)
        if header.get("PhotometricInterpretation") == "PALETTE COLOR":
            raise InputError(f"{path}: a DICOM file with a palette: convert it to RGB first")
        decoder: Any = pydicom.pixels
        pixels = decoder.pixel_array(header)
    pixels = pixels.reshape(frames, int(header.Rows), int(header.Columns), samples).transpose(0, 3, 1, 2)
    slope, intercept = float(header.get("RescaleSlope", 1) or 1), float(header.get("RescaleIntercept", 0) or 0)
    stored = int(header.get("BitsStored", bits))
    if header.get("PhotometricInterpretation") == "MONOCHROME1":  # its zero is white
        if pixels.dtype.kind != "u":
            raise InputError(f"{path}: signed pixels whose lowest is white: convert it first")
        if int(pixels.max()) >= 1 << stored:
            raise InputError(f"{path}: pixels beyond the {stored} bits that it declares")
        pixels = ((1 << stored) - 1) - pixels
    if pixels.dtype == np.uint8 and stored == 8 and (slope, intercept) == (1, 0):
        return np.ascontiguousarray(pixels), frames > 1
    return (pixels * slope + intercept).astype(np.float32), frames > 1


def _nifti(path: Path) -> tuple[np.ndarray, bool]:
    """The planes of a NIfTI volume [n, 1, Y, X], along its last axes, with the scaling that it prescribes."""
    import nibabel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image: Any = nibabel.load(path)
        data = image.dataobj
        if data.dtype.names is not None or data.dtype.kind not in "uif" or not 2 <= len(image.shape) <= 4:
            raise InputError(f"{path}: holds {data.dtype} {image.shape}, no volume of gray levels")
        _check_size(int(np.prod(image.shape, dtype=object)) * data.dtype.itemsize, path)
        plain = data.dtype == np.uint8 and (data.slope, data.inter) == (1, 0)
        volume = np.asarray(data) if plain else image.get_fdata(dtype=np.float32, caching="unchanged")
    planes = volume.reshape(*volume.shape[:2], -1, order="F").transpose(2, 1, 0)[:, None]
    return np.ascontiguousarray(planes), volume.ndim > 2


def medical_files(path: Path, names: Sequence[str]) -> list[Path]:
    """Those of `names` in the folder `path` that are DICOM or NIfTI files."""
    return [path / name for name in names if name.lower().endswith(MEDICAL_SUFFIXES)]
