"""Training states: all that a run needs to go on as if it had never stopped.

A state is a folder `state/<images seen>` with `state.safetensors` (weights, EMA weights, optimizer, order of the
data) and `state.json` (counters, the order's random state, the settings, and checksums over all of it). It is written
beside its name and renamed when complete; the one before it is kept, so that a damaged state costs minutes and not the
run, and older ones are removed only then. A process may be killed at any moment. There are no other random states (see
`diffmem.training.seeds`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from diffmem.atomic_io import atomic_folder
from diffmem.errors import InputError
from diffmem.inert.boundary import parsing, short
from diffmem.integrity import check_file, read_sealed, save_tensors, sealed

FOLDER = "state"
KEPT = 2
_TENSORS, _METADATA = "state.safetensors", "state.json"
_FIELDS = {"images": int, "loss_counts": list, "order": dict, "compiled": bool, "config": dict, "data": dict}


def save_state(out: Path, images: int, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> Path:
    """Writes a state and removes all but the one before it; returns its folder."""
    folder = out / FOLDER / f"{images:09d}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as partial:
            checksum = save_tensors(partial / _TENSORS, tensors)
            (partial / _METADATA).write_text(json.dumps(sealed({**metadata, "files": {_TENSORS: checksum}})) + "\n")
    for path in sorted(_states(out), key=_images, reverse=True)[KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
    return folder


def latest_state(out: Path) -> Path | None:
    """The newest state of a run's folder, or None."""
    return max(_states(out), key=_images, default=None)


def read_metadata(folder: Path) -> dict[str, Any]:
    """The JSON part of a state; raises InputError, with a way out, where it is damaged or was edited."""
    path = folder / _METADATA
    metadata = read_sealed(path, _way_out(folder))
    for name, kind in _FIELDS.items():
        if type(metadata.get(name)) is not kind:
            raise InputError(f"{path}: {name} is {short(metadata.get(name))}: {_way_out(folder)}")
    counts = metadata["loss_counts"]
    whole_counts = len(counts) == 2 and all(type(count) is int and count >= 0 for count in counts)
    if metadata["images"] != _images(folder) or not whole_counts:
        raise InputError(f"{path}: its counts of images do not match: {_way_out(folder)}")
    return metadata


def read_tensors(folder: Path, metadata: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of the state that `metadata` describes; raises InputError, with a way out, where they are damaged."""
    path = folder / _TENSORS
    files = metadata.get("files")
    check_file(path, files.get(_TENSORS) if isinstance(files, dict) else None, _way_out(folder))
    with parsing(path, "a complete safetensors file", _way_out(folder)):
        return load_file(path)


def checked_tensor(
    tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Tensor `name` of a state; raises InputError where it is missing or of another shape or dtype."""
    found = tensors.get(name)
    if found is None or tuple(found.shape) != tuple(shape) or found.dtype != dtype:
        there = "missing" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
        raise InputError(f"the training state does not match this network: {name} is {there}, not {dtype} of {shape}")
    return found


def _way_out(folder: Path) -> str:
    before = [path for path in _states(folder.parent.parent) if _images(path) < _images(folder)]
    if before:
        images = max(map(_images, before))
        return f"delete the folder {folder}, and resuming continues from the state after {images:,} images"
    return f"delete the folder {folder}, and resuming starts again from the first image"


def _images(folder: Path) -> int:
    return int(folder.name)


def _states(out: Path) -> list[Path]:
    folder = out / FOLDER
    # Digits of ASCII, and no more than a count of images has: other names are not ours.
    return [path for path in folder.glob("*") if path.name.isascii() and path.name.isdigit() and len(path.name) < 19]
