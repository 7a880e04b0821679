"""A `TrainingIndex` on disk: one .npy file per array and `index.json`, in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from diffmem.atomic_io import atomic_replacement
from diffmem.errors import InputError
from diffmem.search.basis import ByteBasis, FloatBasis
from diffmem.search.filtered import FilteredRows
from diffmem.search.rows import as_rows

FORMAT = "diffmem-index-1"
DESCRIPTION = "index.json"
CODE = ("panels", "bias", "fine", "order", "error", "centroids", "centroid_bias", "starts")
BLOCK = 4096


def save(folder: Path, method: str, rows: torch.Tensor, code: FilteredRows | None) -> None:
    """Writes the index beside `folder` and renames it when whole; replaces an index that is there."""
    arrays = {"images": rows.cpu().numpy()}
    description = {"format": FORMAT, "method": method}
    if code is not None:
        arrays |= {name: getattr(code, name) for name in CODE}
        arrays |= {f"basis_{name}": value for name, value in vars(code.basis).items() if isinstance(value, np.ndarray)}
        description |= {"scale": code.scale.hex()}
        if isinstance(code.basis, ByteBasis):
            description |= {"basis_norm": code.basis.norm.hex()}
    description["fingerprint"] = _fingerprint(arrays, description)
    with new_index_folder(folder, description) as partial:
        for name, values in arrays.items():
            np.save(partial / f"{name}.npy", values)


@contextmanager
def new_index_folder(folder: Path, description: dict) -> Iterator[Path]:
    """A folder beside `folder` to write an index into; gets its description and takes the place of `folder` when whole.

    Raises InputError where `folder` exists and is not an index, or cannot be written.
    """
    if folder.exists() and not (folder / DESCRIPTION).is_file():
        raise InputError(f"{folder} exists and is not an index: choose another folder")
    with atomic_replacement(folder) as partial:
        yield partial
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")


def load(folder: Path) -> tuple[str, torch.Tensor, FilteredRows | None]:
    """Method, rows and code of a saved index, memory-mapped."""
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        if description.get("format") != FORMAT:
            raise InputError(f"{folder}: an index of another version of diffmem; build it again")
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
        expected = description.pop("fingerprint")
        if _fingerprint(arrays, description) != expected:
            raise InputError(f"{folder}: the index does not match its fingerprint (damaged?); build it again")
        rows = as_rows(arrays["images"])
        if "scale" not in description:
            return description["method"], rows, None
        fields = {name.removeprefix("basis_"): a for name, a in arrays.items() if name.startswith("basis_")}
        if "basis_norm" in description:
            basis = ByteBasis(norm=float.fromhex(description["basis_norm"]), **fields)
        else:
            basis = FloatBasis(**{name: np.array(values) for name, values in fields.items()})
        code = {name: arrays[name] for name in CODE}
        return description["method"], rows, FilteredRows(rows, basis, float.fromhex(description["scale"]), **code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder}: no usable index ({error}); build it again") from error


def _fingerprint(arrays: dict[str, np.ndarray], description: dict) -> str:
    """SHA-256 over the description and every array's name, shape, dtype and contents."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(arrays):
        values = arrays[name]
        digest.update(repr((name, values.shape, values.dtype.str)).encode())
        for start in range(0, len(values), BLOCK):
            digest.update(np.ascontiguousarray(values[start : start + BLOCK]).data)
    return digest.hexdigest()
