"""`config.json`: what a run is, written when it begins and held against what is to be continued."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

import diffmem
from diffmem.atomic_io import atomic_write
from diffmem.data import DatasetSpec
from diffmem.errors import InputError
from diffmem.integrity import read_checked, sealed
from diffmem.training.config import TrainingConfig, differences
from diffmem.training.dataset import TrainingImages
from diffmem.training.run_folder.state import latest_state, read_metadata

CONFIG = "config.json"
_WHERE = ("source", "data_source", "found_at")  # of the training set; found_at is the name in earlier versions


def describe(config: TrainingConfig, data: TrainingImages, source: DatasetSpec | None) -> dict[str, Any]:
    """What a run is: its configuration and its training set, with the way to find that again where there is one."""
    description = {
        "config": config.to_json(),
        "data": {
            "source": data.source,
            "images": data.count,
            "fingerprint": data.fingerprint,
            "data_source": None if source is None else source.to_json(),
        },
    }
    return json.loads(json.dumps(description))  # as it will be read back


def holds_run(out: Path) -> bool:
    """Whether `read_description` finds what a run was in the folder `out`."""
    return (out / CONFIG).is_file() or latest_state(out) is not None


def read_description(out: Path) -> dict[str, Any]:
    """What the run in `out` is (see `describe`): as its config.json says or, where that is
    missing, its newest training state. Raises InputError, with a way out, where it is damaged."""
    state = latest_state(out)
    if state is not None and not (out / CONFIG).is_file():
        return read_metadata(state)
    advice = "restore it" if state is None else f"delete it, and its contents are restored from {state}"
    return read_checked(out / CONFIG, f"{advice}; or remove its sha256 line if you changed it on purpose")


def begin_run(out: Path, description: dict[str, Any], resume: bool) -> None:
    """Makes the folder of a run, or checks that what lies there is one of the same settings, and describes it there."""
    path, state = out / CONFIG, latest_state(out)
    if not resume and (path.exists() or state is not None):
        raise InputError(f"{out}: already holds a run: continue it with resume=True, or choose another folder")
    if state is not None:
        _check_same_run(out, description, read_metadata(state))
    elif path.exists():
        _check_same_run(out, description, read_description(out))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot write there ({error.strerror})") from None
    versions = {"diffmem": diffmem.__version__, "torch": torch.__version__, "python": platform.python_version()}
    atomic_write(path, json.dumps(sealed({**description, "versions": versions}), indent=1) + "\n")


def _check_same_run(out: Path, description: dict[str, Any], there: dict[str, Any]) -> None:
    try:
        different = differences(_comparable(description), _comparable(there))
    except (KeyError, TypeError, AttributeError, InputError):
        raise InputError(f"{out}: exists and is not a run: choose another folder") from None
    if different:
        listed = "; ".join(f"{name} ({theirs} there, {ours} here)" for name, ours, theirs in different)
        raise InputError(f"{out}: its run has other settings: {listed}: use those, or another folder")


def _comparable(description: dict[str, Any]) -> dict[str, Any]:
    """What must agree for a run to be continued: not its length, nor where the same images came from. A field that is
    newer than the run has its default."""
    config = json.loads(json.dumps(TrainingConfig.from_json(description["config"]).to_json()))
    del config["images"]
    data = {name: value for name, value in description["data"].items() if name not in _WHERE}
    return {**config, "data": data}
