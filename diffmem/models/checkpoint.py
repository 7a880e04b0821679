"""Checkpoints of denoisers: a folder with `model.safetensors` and `config.json`, never a pickled class."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import overload

import torch
import torch.nn as nn
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from diffmem.atomic_io import atomic_replacement
from diffmem.errors import InputError
from diffmem.inert.boundary import parsing
from diffmem.inert.documents import read_json
from diffmem.integrity import SEAL, check_file, sealed, unsealed
from diffmem.models.config import DenoiserConfig, ModuleConfig
from diffmem.models.denoiser import Denoiser
from diffmem.models.diffusers_unet import SCHEME, load_diffusers
from diffmem.models.edm_snapshot import read_edm_snapshot
from diffmem.models.wrapped import Model, WrappedDenoiser, as_configured
from diffmem.recognize import is_run, network_kind

_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_SNAPSHOTS = "snapshots"


def save(denoiser: Denoiser | WrappedDenoiser, folder: str | Path) -> Path:
    """Writes the denoiser's configuration and weights to `folder` and returns it.

    Of a network of your own (`as_denoiser`) it is the weights, under the names of its own state dict, and what
    `ModuleConfig` holds: to `load` it takes the module.

    The folder is written beside its final name and renamed when complete; an older checkpoint of that name is replaced.

    Args:
        denoiser: What to store.
        folder: Where to.

    Raises:
        InputError: The name is taken by something else, the place cannot be written to, or the denoiser is a function.

    Example:
        >>> net = Denoiser(preset("ddpmpp_8", channels=1, model_channels=16))
        >>> fingerprint(load(save(net, "model"))) == fingerprint(net)
        True
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or set(os.listdir(folder)) - {_WEIGHTS, _CONFIG}):
        raise InputError(f"{folder}: exists and is not a checkpoint; choose another name")
    if isinstance(denoiser, WrappedDenoiser):
        tensors = _own_tensors(denoiser)
    else:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in denoiser.state_dict().items()}
    with atomic_replacement(folder) as partial:
        content = serialize(tensors)
        (partial / _WEIGHTS).write_bytes(content)
        description = {**denoiser.config.to_json(), "files": {_WEIGHTS: hashlib.sha256(content).hexdigest()}}
        (partial / _CONFIG).write_text(json.dumps(sealed(description), indent=1, allow_nan=False) + "\n")
    return folder


@overload
def load(path: str | Path, device: torch.device | str = "cpu", model: None = None) -> Denoiser: ...


@overload
def load(
    path: str | Path, device: torch.device | str = "cpu", model: Model | None = None
) -> Denoiser | WrappedDenoiser: ...


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    model: Model | None = None,
) -> Denoiser | WrappedDenoiser:
    """The denoiser stored at `path`, in evaluation mode on `device`.

    Args:
        path: A checkpoint folder: of `save`, whose checksums are verified, or one made in another way, which has none
            (`model.safetensors`, and `config.json` with the parts network and preconditioning). Or the folder of a run
            of `diffmem train`, which stands for its newest snapshot (see `checkpoint_path`). Or an EDM
            `network-snapshot-*.pkl` (its EMA weights) or `training-state-*.pt`, of which nothing is executed. Or
            "diffusers:FOLDER", what `save_pretrained` of a pipeline with a `UNet2DModel` wrote.
        device: Where to.
        model: Where it holds a network of your own: the module, which is copied and left as it is, or a function that
            makes one. Its weights are then those of the checkpoint.

    Raises:
        InputError: The checkpoint is missing, damaged, not of a known architecture, or refused; the message names the
            file and the fields that differ.
    """
    if str(path).startswith(SCHEME):
        if model is not None:
            raise InputError(f"{path}: its network is from diffusers: remove model")
        return load_diffusers(str(path).removeprefix(SCHEME), device)
    path = checkpoint_path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        source = path / _WEIGHTS
        config, tensors = _read_checkpoint(path)
    else:
        source = path
        kind = network_kind(path)
        if kind is not None and "EDM" not in kind and path.suffix.lower() not in (".pkl", ".pt"):
            raise InputError(
                f"{path}: is {kind}, which is not supported: give a diffmem checkpoint folder or an EDM snapshot"
            )
        config, tensors = read_edm_snapshot(path)
    if isinstance(config.network, ModuleConfig):
        return _own(config, tensors, source, model).to(device).eval()
    if model is not None:
        raise InputError(f"{path}: holds a network of diffmem, which is built from it: remove model")
    return _assemble(config, tensors, source).to(device).eval()


def checkpoint_path(path: str | Path) -> Path:
    """The checkpoint that `path` stands for: the newest snapshot of a run, and every other path itself.

    Args:
        path: A checkpoint, an EDM snapshot, or the folder of a run.

    Raises:
        InputError: A run that has no snapshot yet.
    """
    path = Path(path)
    if (path / _WEIGHTS).exists() or not is_run(path):
        return path
    snapshots = [folder for folder in (path / _SNAPSHOTS).glob("*") if folder.name.isdigit() and folder.is_dir()]
    if not snapshots:
        raise InputError(
            f"{path}: this run has no snapshot yet; it writes one at its end: `diffmem train --resume --out {path}`"
        )
    return max(snapshots, key=lambda folder: int(folder.name))


def import_edm(path: str | Path, out: str | Path) -> Path:
    """Writes the network of an EDM snapshot or training state as a checkpoint folder and returns that.

    Args:
        path: A `network-snapshot-*.pkl` or `training-state-*.pt`; nothing in it is executed.
        out: The folder to write.

    Raises:
        InputError: As `load` and `save` do.
    """
    config, tensors = read_edm_snapshot(path)
    return save(_assemble(config, tensors, Path(path)), out)


def fingerprint(denoiser: Denoiser | WrappedDenoiser) -> str:
    """SHA-256 over configuration and weights: equal for equal denoisers, in whatever file they came.

    Args:
        denoiser: On any device.
    """
    if isinstance(denoiser, WrappedDenoiser):
        return denoiser.fingerprint
    digest = hashlib.sha256(json.dumps(denoiser.config.to_json(), sort_keys=True).encode())
    for name, tensor in sorted(denoiser.state_dict().items()):
        digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_checkpoint(folder: Path) -> tuple[DenoiserConfig, dict[str, torch.Tensor]]:
    if not (folder / _WEIGHTS).is_file() and (kind := network_kind(folder)) is not None and "diffusers" in kind:
        raise InputError(f"{folder}: is {kind}, not one of diffmem: write {SCHEME}{folder}")
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            if (kind := network_kind(folder)) is not None:
                raise InputError(
                    f"{folder}: is {kind}, which is not one network: give a folder with {_CONFIG} and {_WEIGHTS}"
                    " as diffmem writes it (a run's snapshots/…), or an EDM network-snapshot-*.pkl"
                )
            raise InputError(f"{folder}: no {name} in it; a checkpoint is a folder with {_CONFIG} and {_WEIGHTS}")
    of_run = folder.absolute().parent.name == _SNAPSHOTS and is_run(folder.absolute().parent.parent)
    advice = f"delete {folder}, and the run's other snapshots are used" if of_run else "create the checkpoint again"
    values = read_json(folder / _CONFIG, advice)
    if isinstance(values, dict) and SEAL in values:
        advice += f", or remove {SEAL} and files from {_CONFIG} if you changed it on purpose"
        values = unsealed(values, folder / _CONFIG, advice)
        files = values.pop("files", None)
        check_file(folder / _WEIGHTS, files.get(_WEIGHTS) if isinstance(files, dict) else None, advice)
    try:
        config = DenoiserConfig.from_json(values)
    except InputError as error:
        if (kind := network_kind(folder)) not in (None, "a checkpoint of diffmem"):
            raise InputError(
                f"{folder}: is {kind}, whose networks are not supported: give one of diffmem or EDM"
            ) from None
        raise InputError(f"{folder / _CONFIG}: {error}") from None
    with parsing(folder / _WEIGHTS, "a complete safetensors file", advice):
        return config, load_file(folder / _WEIGHTS)


def _own_tensors(denoiser: WrappedDenoiser) -> dict[str, torch.Tensor]:
    """The state of a network of one's own, under its own names."""
    if not isinstance(denoiser.plain, nn.Module):
        raise InputError(f"{denoiser.plain_name}: is a function, which cannot be stored")
    state = denoiser.plain.state_dict()
    if odd := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise InputError(f"{denoiser.plain_name}: its state holds {odd[0]}, which is not a tensor and cannot be stored")
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}  # tied ones apart


def _own(
    config: DenoiserConfig,
    tensors: dict[str, torch.Tensor],
    source: Path,
    model: Model | None,
) -> WrappedDenoiser:
    """A copy of `model` with the weights of a checkpoint."""
    if model is None:
        name = getattr(config.network, "name", "")
        raise InputError(
            f"{source.parent}: holds the weights of {name}, a network of your own, without code to build it: in "
            "Python, pass the module as model to diffmem.models.load"
        )
    denoiser = as_configured(model, config)
    _check_fit(tensors, denoiser.plain.state_dict(), source)
    denoiser.plain.load_state_dict(tensors)
    return denoiser


def _assemble(config: DenoiserConfig, tensors: dict[str, torch.Tensor], source: Path) -> Denoiser:
    """The denoiser of that configuration with those tensors, which must fit it exactly."""
    # Without memory and without drawing random numbers, until the tensors are known to fit.
    with parsing(source, "a network that can be built"), torch.device("meta"):
        denoiser = Denoiser(config)
    wanted = denoiser.state_dict()
    _check_fit(tensors, wanted, source)
    placed = {
        # In the memory order that the modules chose (channels_last, labels column by column).
        name: torch.empty_strided(like.shape, like.stride(), dtype=torch.float32).copy_(tensors[name])
        for name, like in wanted.items()
    }
    denoiser.load_state_dict(placed, assign=True)
    return denoiser


def _check_fit(tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], source: Path) -> None:
    """Raises InputError unless `tensors` are those of a state dict."""
    differences = [f"{name} is missing" for name in wanted if name not in tensors]
    differences += [f"{name[:100]} is unexpected" for name in tensors if name not in wanted]
    differences += [
        f"{name} is of {tensors[name].dtype}"
        for name in wanted
        if name in tensors and (tensors[name].is_complex() or tensors[name].layout != torch.strided)
    ]
    differences += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise InputError(f"{source}: does not match its configuration: {'; '.join(differences[:3])}{more}")
