"""HDF5 files: one dataset of images, with its labels.

Only what lies in the file itself is read: links to other files, datasets stored in other files or put together from
them, and Python objects are refused. No size is believed that the stored bytes do not bear out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diffmem.data.arrays import LARGE, MOST_DEFLATED, Arrays, as_column, as_nchw, listed
from diffmem.data.labels import check_labels, or_note
from diffmem.data.storage import allocate
from diffmem.errors import InputError, MissingExtraError
from diffmem.inert.boundary import parsing, short
from diffmem.progress import Progress

_IMAGE_NAMES = ("images", "image", "x", "X", "data")
_LABEL_NAMES = ("labels", "label", "y", "Y")
_MOST_DATASETS = 10_000
HDF5_SUFFIXES = (".h5", ".hdf5", ".he5")
_BLOCK_BYTES = 2**24


def read_hdf5(path: Path, key: str | None, layout: str | None, progress: Progress) -> Arrays:
    """The images in the dataset `key` of the HDF5 file `path`, or in the one that looks like images; uint8 or floats.

    Labels are those of `labels`, `label` or `y` in the same group.
    """
    try:
        import h5py
    except ImportError:
        raise MissingExtraError("h5py", "hdf5", f"reading {path}, HDF5,") from None
    with parsing(path, "a complete HDF5 file", "download or write it again"), h5py.File(path, "r") as file:
        found = _datasets(file, h5py)
        chosen = _pick(found, key, path)
        images = as_nchw(_values(found[chosen], f"{path}: {chosen}", progress), layout, f"{path}: {chosen}")
        group = chosen.rpartition("/")[0]
        beside = [f"{group}/{name}".lstrip("/") for name in _LABEL_NAMES]
        label = next((name for name in beside if name in found and name != chosen), None)

        def read_labels() -> np.ndarray | None:
            if label is None:
                return None
            where = f"{path}: {label}"
            return check_labels(as_column(_values(found[label], where, progress)), len(images), where)

        labels, notes = or_note(read_labels)
        return Arrays(images, labels, notes=notes)


def _datasets(group: Any, h5py: Any, prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """The datasets that lie in `group` and the groups in it, by their paths; links are not followed."""
    found: dict[str, Any] = {}
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            continue
        item = group[name]
        if isinstance(item, h5py.Dataset):
            found[f"{prefix}{name}"] = item
        elif isinstance(item, h5py.Group) and depth < 8:  # a group may hold itself
            found |= _datasets(item, h5py, f"{prefix}{name}/", depth + 1)
        if len(found) > _MOST_DATASETS:
            raise ValueError(f"more than {_MOST_DATASETS:,} datasets")
    return found


def _pick(found: dict[str, Any], key: str | None, path: Path) -> str:
    if key is not None:
        if key.strip("/") not in found:
            raise InputError(f"{path}: there is no dataset {key!r}: pick one with key=…: {listed(list(found))}")
        return key.strip("/")
    images = [name for name, data in found.items() if data.ndim in (3, 4) and data.dtype.kind in "uf"]
    usual = [name for known in _IMAGE_NAMES for name in images if name.rpartition("/")[2] == known]
    if len(images) == 1 or (usual and "/" not in usual[0]):
        return (usual or images)[0]
    if not images:
        raise InputError(f"{path}: no dataset of images [N, C, H, W], [N, H, W, C] or [N, H, W]: {_shapes(found)}")
    raise InputError(f"{path}: pick the dataset of images with key=…: {listed(images)}")


def _shapes(found: dict[str, Any]) -> str:
    shown = [f"{name} {data.dtype} {short(data.shape)}" for name, data in list(found.items())[:5]]
    return "it holds " + (", ".join(shown) or "none")


def _values(data: Any, where: str, progress: Progress) -> np.ndarray:
    """The values of a dataset, block by block."""
    if data.is_virtual or data.external:
        raise InputError(f"{where}: its values lie in other files, which are not opened: copy them into this one")
    if data.dtype.hasobject or data.dtype.names is not None or data.dtype.kind not in "uifb":
        raise InputError(f"{where}: it holds {data.dtype}, not numbers: decode the images to uint8 first")
    if data.shape is None or data.ndim == 0:
        raise InputError(f"{where}: it holds a single value, no images")
    stored = data.id.get_storage_size()
    if data.nbytes > LARGE and data.nbytes > MOST_DEFLATED * stored:
        raise InputError(
            f"{where}: its {data.nbytes / 1e9:.1f} GB are stored in {stored / 1e6:.1f} MB, as in a file that was"
            " never filled, or a bomb"
        )
    array = allocate(data.shape, data.dtype)
    if data.size == 0:
        return array
    chunk = data.chunks[0] if data.chunks else 1
    rows = max(1, _BLOCK_BYTES // (data.nbytes // len(data) or 1) // chunk) * chunk
    for start in range(0, len(data), rows):
        array[start : start + rows] = data[start : start + rows]
        progress("reading images", min(start + rows, len(data)), len(data))
    return array
