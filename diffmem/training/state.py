"""Training states: all that a run needs to go on as if it had never stopped.

A state is a folder `state/<images seen>` with `state.safetensors` (weights, averaged weights, optimizer, order of the
data) and `state.json` (counters, the order's random state, the settings). It is written beside its name and renamed
when whole, and only then is the one before it removed, so that a process may be killed at any moment. There are no
other random states (see `diffmem.training.seeds`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffmem.atomic_io import atomic_folder
from diffmem.errors import InputError

FOLDER = "state"
_TENSORS, _FACTS = "state.safetensors", "state.json"


def save_state(out: Path, images: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> Path:
    """Writes a state and removes older ones; returns its folder."""
    folder = out / FOLDER / f"{images:09d}"
    older = [path for path in _states(out) if path != folder]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as partial:
            save_file({name: tensor.detach().cpu() for name, tensor in tensors.items()}, partial / _TENSORS)
            (partial / _FACTS).write_text(json.dumps(facts) + "\n")
    for path in older:
        shutil.rmtree(path, ignore_errors=True)
    return folder


def latest_state(out: Path) -> Path | None:
    """The newest state of a run's folder, or None."""
    return max(_states(out), key=lambda path: int(path.name), default=None)


def read_facts(folder: Path) -> dict[str, Any]:
    """The JSON part of a state; raises InputError where it is damaged."""
    try:
        return json.loads((folder / _FACTS).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / _FACTS}: cannot be read ({error}); remove the folder to start anew") from None


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a state; raises InputError where the file is damaged."""
    try:
        return load_file(folder / _TENSORS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / _TENSORS}: cannot be read ({error}); remove the folder to start anew") from None


def _states(out: Path) -> list[Path]:
    folder = out / FOLDER
    return [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
