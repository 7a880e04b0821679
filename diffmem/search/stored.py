"""A `TrainingIndex` on disk: one .npy file per array and `index.json`, in a folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.atomic_io import atomic_file, atomic_replacement
from diffmem.errors import InputError
from diffmem.inert.boundary import parsing
from diffmem.inert.documents import read_json
from diffmem.integrity import load_arrays, save_arrays, sealed, unsealed
from diffmem.lazy import torch
from diffmem.ops.nearest import dtype_name
from diffmem.ops.registry import native_module
from diffmem.search.basis import ByteBasis, FloatBasis
from diffmem.search.filtered import (
    COARSE_STEPS,
    LARGEST_LEVELS,
    LEVEL_COORDINATES,
    PANEL,
    ROW,
    FilteredRows,
    on_cache_lines,
)
from diffmem.search.rows import as_rows

FORMAT = "diffmem-index-2"
CODE_FORMAT = "diffmem-code-1"
DESCRIPTION = "index.json"
CODE = ("panels", "bias", "fine", "order", "error", "centroids", "centroid_bias", "starts")
BLOCK = 4096
SAMPLE = 64  # rows whose code is made again when an index is loaded


def save(folder: Path, method: str, rows: torch.Tensor, code: FilteredRows | None) -> None:
    """Writes the index beside `folder` and renames it when complete; replaces an index that is there."""
    arrays = {"images": rows.cpu().numpy()}
    description = {"format": FORMAT, "method": method}
    if code is not None:
        more, numbers = _parts(code)
        arrays, description = arrays | more, description | numbers
    description["fingerprint"] = _fingerprint(arrays, description)
    with new_index_folder(folder, description) as partial:
        for name, values in arrays.items():
            np.save(partial / f"{name}.npy", np.ascontiguousarray(values))


def _parts(code: FilteredRows) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A code as arrays and numbers in hexadecimal."""
    arrays = {name: getattr(code, name) for name in CODE}
    arrays |= {f"basis_{name}": value for name, value in vars(code.basis).items() if isinstance(value, np.ndarray)}
    numbers = {"scale": code.scale.hex()}
    if isinstance(code.basis, ByteBasis):
        numbers |= {"basis_norm": code.basis.norm.hex()}
    return arrays, numbers


def save_code(path: Path, code: FilteredRows, fingerprint: str) -> None:
    """Writes the code of rows, without them, as one file with a checksum.

    Args:
        path: Of the file; one that is there is replaced.
        code: Of the rows.
        fingerprint: That of the rows, `TrainingIndex.fingerprint`.

    Raises:
        InputError: It cannot be written.
    """
    arrays, numbers = _parts(code)
    about = json.dumps({"format": CODE_FORMAT, "rows": fingerprint, **numbers}, sort_keys=True)
    with atomic_file(path, durable=False) as partial, open(partial, "xb") as file:
        save_arrays(file, {"about": np.array(about), **arrays})


def load_code(path: Path, rows: np.ndarray | torch.Tensor, fingerprint: str) -> FilteredRows:
    """The code that `save_code` wrote of these rows.

    Args:
        path: Of the file.
        rows: [N, d], the rows.
        fingerprint: Theirs.

    Raises:
        InputError: There is no such file, or it is damaged, or the code of other rows.
    """
    advice = "delete it: it is made again"
    arrays = load_arrays(path, advice)
    with parsing(path, "a usable code of images", advice):
        about = json.loads(str(arrays.pop("about")))
        if (about.get("format"), about.get("rows")) != (CODE_FORMAT, fingerprint):
            raise InputError(f"{path}: the code of other images")
        return _code_of({name: _on_cache_lines(values) for name, values in arrays.items()}, about, rows)


def _on_cache_lines(values: np.ndarray) -> np.ndarray:
    """A copy that starts on a cache line, which the kernels are faster on."""
    copy = on_cache_lines(values.shape, values.dtype)
    copy[...] = values
    return copy


@contextmanager
def new_index_folder(folder: Path, description: dict[str, Any]) -> Iterator[Path]:
    """A folder beside `folder` to write an index into; gets its description and takes the place of `folder` when
    complete.

    Raises InputError where `folder` exists and is not an index, or cannot be written.
    """
    if folder.exists() and not (folder / DESCRIPTION).is_file():
        raise InputError(f"{folder} exists and is not an index: choose another folder")
    with atomic_replacement(folder) as partial:
        yield partial
        (partial / DESCRIPTION).write_text(json.dumps(sealed(description), indent=1) + "\n")


def read_description(folder: Path, version: str) -> dict[str, Any]:
    """What `new_index_folder` was given; raises InputError where it is missing, damaged or of another version."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise InputError(f"{folder}: no usable index (no {DESCRIPTION} in it); rebuild it")
    description = read_json(path, "rebuild the index")
    if not isinstance(description, dict) or description.get("format") != version:
        raise InputError(f"{folder}: an index from another version of diffmem; rebuild it")
    return unsealed(description, path, "rebuild the index")


def load(folder: Path) -> tuple[str, torch.Tensor, FilteredRows | None]:
    """Method, rows and code of a saved index, memory-mapped."""
    with parsing(folder, "a usable index", "rebuild it"):
        description = read_description(folder, FORMAT)
        arrays = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in sorted(folder.glob("*.npy"))}
        expected = description.pop("fingerprint")
        if _fingerprint(arrays, description) != expected:
            raise InputError(f"{folder}: the index does not match its fingerprint (damaged?); rebuild it")
        check_array(arrays["images"], "images", (None, None), arrays["images"].dtype)
        rows = as_rows(arrays["images"])
        if rows.numel() == 0:
            raise ValueError("it has no images")
        if "scale" not in description:
            return description["method"], rows, None
        return description["method"], rows, _code_of(arrays, description, rows)


def _code_of(arrays: dict[str, np.ndarray], numbers: dict[str, Any], rows: np.ndarray | torch.Tensor) -> FilteredRows:
    """The code of rows from what `_parts` made of it; raises ValueError where it is not one of them."""
    scale, (count, dimension) = float.fromhex(numbers["scale"]), rows.shape
    fields = {name.removeprefix("basis_"): a for name, a in arrays.items() if name.startswith("basis_")}
    code = {name: arrays[name] for name in CODE}
    levels, steps = _check_code(code, count, scale)
    coordinates = levels * LEVEL_COORDINATES
    if "basis_norm" in numbers:
        check_array(fields["p"], "basis_p", (coordinates, dimension), np.int16)
        check_array(fields["shift"], "basis_shift", (coordinates,), np.int64)
        check_array(fields["mean"], "basis_mean", (dimension,), np.uint8)
        # Products with bytes are added up in 32 bits.
        if 128 * int(np.abs(fields["p"].astype(np.int64)).sum(axis=1).max()) >= 2**31:
            raise ValueError("a basis whose products overflow")
        norm = float.fromhex(numbers["basis_norm"])
        basis: ByteBasis | FloatBasis = ByteBasis(norm=norm, **fields)
        if dtype_name(rows) != "uint8" or not (math.isfinite(norm) and norm >= 0):
            raise ValueError("a basis for other images")
    else:
        check_array(fields["a"], "basis_a", (coordinates, dimension), np.float64)
        check_array(fields["mean"], "basis_mean", (dimension,), np.float64)
        basis = FloatBasis(**{name: np.array(values) for name, values in fields.items()})
        if dtype_name(rows) == "uint8" or not all(np.isfinite(values).all() for values in vars(basis).values()):
            raise ValueError("a basis for other images")
    found = FilteredRows(rows, basis, scale, **code)
    _check_sample(found, steps)
    return found


def check_array(values: np.ndarray, name: str, shape: tuple[int | None, ...], dtype: Any) -> None:
    """Raises ValueError where an array is not as the core expects it: shape (None: any), dtype, row by row in memory.

    A file may hold the same values column by column, which its fingerprint does not tell apart, but a pointer does.
    """
    fits = len(values.shape) == len(shape) and all(
        wanted is None or length == wanted for length, wanted in zip(values.shape, shape, strict=True)
    )
    if not fits or values.dtype != dtype or not values.dtype.isnative or not values.flags.c_contiguous:
        raise ValueError(f"array {name} of shape {values.shape} and dtype {values.dtype} is not as it was written")


def _check_code(code: dict[str, np.ndarray], count: int, scale: float) -> tuple[int, int]:
    """Levels and steps of a code of `count` rows; raises ValueError where an array does not fit the others."""
    levels, steps, clusters = len(code["fine"]), code["panels"].shape[1], len(code["starts"]) - 1
    if not (1 <= levels <= LARGEST_LEVELS and 1 <= steps <= COARSE_STEPS and 1 <= clusters <= max(count, 1)):
        raise ValueError("a code of another shape")
    panels, cluster_panels = -(-count // PANEL), -(-clusters // PANEL)
    check_array(code["panels"], "panels", (panels, steps, PANEL, 2), np.int16)
    check_array(code["bias"], "bias", (panels * PANEL,), np.int32)
    check_array(code["fine"], "fine", (levels, count, ROW), np.int16)
    check_array(code["order"], "order", (count,), np.int64)
    check_array(code["error"], "error", (1 + levels,), np.float32)
    check_array(code["centroids"], "centroids", (cluster_panels, steps, PANEL, 2), np.int16)
    check_array(code["centroid_bias"], "centroid_bias", (cluster_panels * PANEL,), np.int32)
    check_array(code["starts"], "starts", (clusters + 1,), np.int64)
    order, starts = code["order"], code["starts"]
    if order.min() < 0 or order.max() >= count or np.bincount(order, minlength=count).max() != 1:
        raise ValueError("its order is not a permutation")
    if starts[0] != 0 or starts[-1] != count or (np.diff(starts) < 0).any():
        raise ValueError("its clusters are invalid")
    if not (math.isfinite(scale) and scale >= 0 and np.isfinite(code["error"]).all() and (code["error"] >= 0).all()):
        raise ValueError("its scale or its errors are not numbers")
    return levels, steps


def _check_sample(index: FilteredRows, steps: int) -> None:
    """Raises ValueError where the codes of some rows are not those that the rows have."""
    if native_module() is None:
        return  # without the core the code is not used either
    places = np.unique(np.linspace(0, len(index.order) - 1, SAMPLE).astype(np.int64))
    rows = index.rows[index.order[places]]  # a copy
    again = index.encode_rows(rows)
    coarse = index.panels[places // PANEL, :, places % PANEL].reshape(len(places), 2 * steps)
    for stored, made in ((coarse, again.coarse), (index.fine[:, places], again.fine)):
        # Projections of floats round as the machine does.
        if np.abs(stored.astype(np.int64) - made).max(initial=0) > 2:
            raise ValueError("its codes do not match its images")


def _fingerprint(arrays: dict[str, np.ndarray], description: dict[str, Any]) -> str:
    """SHA-256 over the description and every array's name, shape, dtype and contents."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(arrays):
        values = arrays[name]
        digest.update(repr((name, values.shape, values.dtype.str)).encode())
        for start in range(0, len(values), BLOCK):
            digest.update(np.ascontiguousarray(values[start : start + BLOCK]).data)
    return digest.hexdigest()
