"""Files and folders that hold a network rather than images, and those of other frameworks, told by name and header.

Nothing is unpickled: names of files, the header of a safetensors file, and the text of a pickle's bytes are looked at.
"""

from __future__ import annotations

import json
import zipfile
from fnmatch import fnmatch
from pathlib import Path

_RUN_FOLDERS = "snapshots", "state"
_PICKLE_BYTES = 2**20
_LIGHTNING = b"pytorch-lightning_version"


def network_kind(path: Path) -> str | None:
    """What `path` is, in words, where it is a trained network, a run or a snapshot; None where it is none of these."""
    try:
        return _folder_kind(path) if path.is_dir() else _file_kind(path)
    except (OSError, ValueError, RecursionError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return None


def is_run(path: Path) -> bool:
    """Whether `path` is the folder of a run of `diffmem train`, finished or not."""
    described = (path / "config.json").is_file()
    return (
        (path / "snapshots.json").is_file()
        or (described and any((path / name).is_dir() for name in _RUN_FOLDERS))
        or any(path.glob("state/*/state.json"))
    )


def _folder_kind(path: Path) -> str | None:
    names = {entry.name for entry in path.iterdir()}
    if is_run(path) or {"config.json", "stats.jsonl"} <= names:
        return "a run of `diffmem train`"
    if "model_index.json" in names:
        return "a pipeline of diffusers"
    config = _json(path / "config.json") if "config.json" in names else None
    if isinstance(config, dict):
        if any(name.startswith("diffusion_pytorch_model") for name in names) or "_diffusers_version" in config:
            return "a model of diffusers"
        if "model.safetensors" in names:
            own = {"network", "preconditioning"} <= config.keys()
            return "a checkpoint of diffmem" if own else "a model of transformers or another library"
    for pattern, kind in (
        ("network-snapshot-*.pkl", "a training run of EDM or EDM2"),
        ("training-state-*.pt", "a training run of EDM or EDM2"),
        ("*.ckpt", "a folder of checkpoints of PyTorch Lightning"),
        ("lightning_logs", "a run of PyTorch Lightning"),
    ):
        if any(fnmatch(name, pattern) for name in names):
            pictures = any(Path(name).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") for name in names)
            return None if pictures and "Lightning" in kind else kind
    return None


def _file_kind(path: Path) -> str | None:
    name, suffix = path.name.lower(), path.suffix.lower()
    if fnmatch(name, "training-state-*.pt"):
        return "a training state of EDM or EDM2"
    if suffix == ".pkl":
        edm = "snapshot" in name or name.startswith("edm")
        return "a network snapshot of EDM or EDM2" if edm else "a pickle, which is never loaded"
    if suffix == ".ckpt":
        return "a checkpoint of PyTorch Lightning" if _mentions(path, _LIGHTNING) else "a checkpoint of a network"
    if suffix in (".pt", ".pth") and _mentions(path, _LIGHTNING):
        return "a checkpoint of PyTorch Lightning"
    if suffix == ".bin" and name.startswith(("diffusion_pytorch_model", "pytorch_model")):
        return "a model of diffusers" if name.startswith("diffusion") else "a model of transformers or another library"
    if suffix == ".safetensors":
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            tensors = json.loads(file.read(length)) if length < 2**27 else {}
        if isinstance(tensors, dict) and any(key.endswith((".weight", ".bias")) for key in tensors):
            return "a model of diffusers" if name.startswith("diffusion_pytorch_model") else "the weights of a network"
    return None


def _mentions(path: Path, text: bytes) -> bool:
    """Whether the pickle in a file of `torch.save` holds `text`."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            return text in file.read(_PICKLE_BYTES)
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.rpartition("/")[2] == "data.pkl":
                with archive.open(entry) as file:
                    return text in file.read(_PICKLE_BYTES)
    return False


def _json(path: Path) -> object:
    return json.loads(path.read_bytes()) if path.stat().st_size < 2**24 else None
