"""Writing image sets: EDM's zip archives, `.npz` files, folders of PNG with a sub-folder per 1000 seeds.

A manifest (how the set was made) lies in the archive or folder itself, as `manifest.json`, so that it cannot get lost;
image readers skip it.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from diffmem.atomic_io import atomic_file, atomic_folder, check_new_folder
from diffmem.data.image_set import ImageSet
from diffmem.data.labels import DATASET_JSON
from diffmem.errors import InputError
from diffmem.progress import Progress, silent

STAGE = "writing images"
MANIFEST_JSON = "manifest.json"
_REPORT_EVERY = 500


def write_images(
    image_set: ImageSet,
    path: str | os.PathLike[str],
    *,
    manifest: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> None:
    """Writes `image_set` in the form that the suffix of `path` names.

    Args:
        image_set: uint8 images.
        path: `.zip` (EDM's layout, see `write_edm_zip`), `.npz` (`write_npz`), or no suffix (a new folder of PNG,
            `write_folder`).
        manifest: How the set was made, JSON-ready; stored in it as `manifest.json`.
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: Another suffix, float images, or a place that cannot be written to.
    """
    writers = {".zip": write_edm_zip, ".npz": write_npz, "": write_folder}
    writers[_checked_suffix(path)](image_set, path, manifest=manifest, progress=progress)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises the `InputError` of `write_images` where the name or place of `path` is wrong: before long work, not after
    it."""
    path = Path(path)
    if _checked_suffix(path) == "":
        check_new_folder(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: cannot be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: cannot be written: the folder {path.parent} is read-only")


def _checked_suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in (".zip", ".npz", ""):
        raise InputError(f"{path}: images are written as .zip, as .npz, or, without a suffix, as a folder")
    return suffix


def write_edm_zip(
    image_set: ImageSet,
    path: str | os.PathLike[str],
    *,
    manifest: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> None:
    """Writes `image_set` as EDM's dataset archive: `00000/img00000000.png` … and `dataset.json` with the labels.

    Images are stored as PNG, entries carry a fixed date: the same pixels and labels give the same bytes (with the same
    version of Pillow and zlib). File names are those of EDM's layout, not those of the set.

    Args:
        image_set: uint8 images of 1 or 3 channels.
        path: Path of the archive.
        manifest: Kept as JSON in `manifest.json`.
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: Float images, or other than 1 or 3 channels.
    """
    path = Path(path)
    _require_uint8(image_set, path, channels=(1, 3))
    names = [f"{index // 1000:05d}/img{index:08d}.png" for index in range(len(image_set))]
    with atomic_file(path) as partial, zipfile.ZipFile(partial, "x", zipfile.ZIP_STORED) as archive:
        for index, name in enumerate(names):
            archive.writestr(_entry(name), _png(image_set.images[index]))
            _tell(progress, index + 1, len(names))
        archive.writestr(_entry(DATASET_JSON), _dataset_json(image_set, names))
        if manifest is not None:
            archive.writestr(_entry(MANIFEST_JSON), _manifest_json(manifest))


def write_npz(
    image_set: ImageSet,
    path: str | os.PathLike[str],
    seeds: Sequence[int] | np.ndarray | None = None,
    *,
    manifest: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> None:
    """Writes `image_set` as `.npz`: `images` uint8 [N, C, H, W], with `labels`, `names` and `seeds` where there are
    any.

    Args:
        image_set: uint8 images.
        path: Path of the file.
        seeds: N distinct whole numbers from 0, the seed of each image.
        manifest: Kept as JSON in the entry `manifest.json`, which `numpy.load` gives as bytes.
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: Float images, or seeds that do not fit.
    """
    path = Path(path)
    _require_uint8(image_set, path)
    arrays = {"images": image_set.images}
    if image_set.labels is not None:
        arrays["labels"] = image_set.labels
    if image_set.names is not None:
        arrays["names"] = np.array(list(image_set.names), dtype=np.str_)
    if seeds is not None:
        arrays["seeds"] = _checked_seeds(seeds, len(image_set), path)
    with atomic_file(path) as partial:
        with open(partial, "xb") as file:
            np.savez(file, **cast(Any, arrays))
        if manifest is not None:
            with zipfile.ZipFile(partial, "a") as archive:
                archive.writestr(_entry(MANIFEST_JSON), _manifest_json(manifest))
    progress(STAGE, len(image_set), len(image_set))


def write_folder(
    image_set: ImageSet,
    path: str | os.PathLike[str],
    seeds: Sequence[int] | np.ndarray | None = None,
    *,
    manifest: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> None:
    """Writes `image_set` as a new folder of PNG, `000000/000000.png` being seed 0, with `dataset.json` for labels.

    Seed s lies in the sub-folder of its thousand, `{s − s mod 1000:06d}/{s:06d}.png`.

    Args:
        image_set: uint8 images of 1 or 3 channels.
        path: Path of the folder: new, or empty.
        seeds: N distinct whole numbers from 0; 0 … N − 1 unless given.
        manifest: Kept as JSON in `manifest.json`.
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: Float images, other than 1 or 3 channels, or `path` exists and is not empty.
    """
    path = Path(path)
    _require_uint8(image_set, path, channels=(1, 3))
    numbers = _checked_seeds(range(len(image_set)) if seeds is None else seeds, len(image_set), path).tolist()
    names = [f"{seed - seed % 1000:06d}/{seed:06d}.png" for seed in numbers]
    with atomic_folder(path) as partial:
        for index, name in enumerate(names):
            file = partial / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(_png(image_set.images[index]))
            _tell(progress, index + 1, len(names))
        if image_set.labels is not None:
            (partial / DATASET_JSON).write_bytes(_dataset_json(image_set, names))
        if manifest is not None:
            (partial / MANIFEST_JSON).write_bytes(_manifest_json(manifest))


def _require_uint8(image_set: ImageSet, path: Path, channels: tuple[int, ...] | None = None) -> None:
    if image_set.images.dtype != np.uint8:
        raise InputError(
            f"{path}: only uint8 images can be written, these are {image_set.images.dtype}: convert them to 0–255 first"
        )
    if channels is not None and image_set.image_shape[0] not in channels:
        raise InputError(
            f"{path}: PNG files hold 1 or 3 channels, these images have {image_set.image_shape[0]}: write .npz"
        )


def _checked_seeds(seeds: Sequence[int] | np.ndarray, count: int, path: Path) -> np.ndarray:
    numbers = np.asarray(seeds)
    if numbers.shape != (count,) or numbers.dtype.kind not in "iu":
        raise InputError(f"{path}: {count:,} images need one integer seed each, got {numbers.dtype} {numbers.shape}")
    numbers = numbers.astype(np.int64)
    if count and (numbers.min() < 0 or len(np.unique(numbers)) != count):
        raise InputError(f"{path}: seeds must be distinct and not negative")
    return numbers


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG")
    return stream.getvalue()


def _dataset_json(image_set: ImageSet, names: Sequence[str]) -> bytes:
    labels = None if image_set.labels is None else list(map(list, zip(names, image_set.labels.tolist(), strict=True)))
    return json.dumps({"labels": labels}).encode()


def _manifest_json(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=2).encode() + b"\n"


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 3  # Unix, on every system
    entry.external_attr = 0o644 << 16
    return entry


def _tell(progress: Progress, done: int, total: int) -> None:
    if done % _REPORT_EVERY == 0 or done == total:
        progress(STAGE, done, total)
