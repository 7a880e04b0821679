"""EDM's network snapshots and training states: the network's configuration and tensors, out of inert records.

An object's record has the attributes of a `torch.nn.Module` (`_parameters`, `_buffers`, `_modules`) and the arguments
of its constructor (`_init_args`, `_init_kwargs`), from which the configuration follows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffmem.errors import InputError
from diffmem.inert.boundary import parsing, short
from diffmem.inert.pickles import Budget, Damaged, Record, Refused, input_error
from diffmem.inert.torch_files import TensorRecord, read_torch_file
from diffmem.models.config import ADMConfig, DenoiserConfig, UNetConfig
from diffmem.models.preconditioning import EDM, IDDPM, VE, VP

# Class name: our dataclass, its fields among the constructor's arguments, the network it holds unless told otherwise.
_PRECONDITIONINGS = {
    "VPPrecond": (VP, ("beta_d", "beta_min", "M", "epsilon_t"), "SongUNet"),
    "VEPrecond": (VE, ("sigma_min", "sigma_max"), "SongUNet"),
    "iDDPMPrecond": (IDDPM, ("C_1", "C_2", "M"), "DhariwalUNet"),
    "EDMPrecond": (EDM, ("sigma_min", "sigma_max", "sigma_data"), "DhariwalUNet"),
}
_LEADING_ARGUMENTS = ("img_resolution", "img_channels", "label_dim", "use_fp16")
_SHARED_FIELDS = {
    name: name
    for name in (
        "label_dim", "augment_dim", "model_channels", "channel_mult", "channel_mult_emb", "num_blocks",
        "attn_resolutions", "dropout",
    )
} | {"img_resolution": "resolution", "img_channels": "channels"}  # fmt: skip
# Class name: our dataclass, argument → field, and defaults that differ from ours.
_NETWORKS: dict[str, tuple[type, dict[str, str], dict[str, Any]]] = {
    "SongUNet": (
        UNetConfig,
        {
            **_SHARED_FIELDS,
            "channel_mult_noise": "channel_mult_noise",
            "embedding_type": "embedding",
            "encoder_type": "encoder",
            "decoder_type": "decoder",
            "resample_filter": "resample_filter",
            "skip_connections": "skip_connections",
        },
        {"channel_mult": (1, 2, 2, 2)},
    ),
    "DhariwalUNet": (ADMConfig, _SHARED_FIELDS, {}),
}
_LONGEST_NAME = 100  # characters of a module's or tensor's name
# Arguments that change nothing about a trained network in float32.
_WITHOUT_EFFECT = {"use_fp16", "label_dropout"}


def config_from_edm(class_name: str, arguments: dict[str, Any]) -> DenoiserConfig:
    """The configuration that EDM's constructor `class_name(**arguments)` stands for.

    Raises InputError for classes and arguments that are not known.
    """
    if class_name not in _PRECONDITIONINGS:
        raise InputError(f"unknown denoiser {short(class_name)}; known ones are {', '.join(_PRECONDITIONINGS)}")
    arguments = {name: value for name, value in arguments.items() if name not in _WITHOUT_EFFECT}
    kind, fields, network_name = _PRECONDITIONINGS[class_name]
    preconditioning = kind(**{name: arguments.pop(name) for name in fields if name in arguments})
    network_name = arguments.pop("model_type", network_name)
    if not isinstance(network_name, str) or network_name not in _NETWORKS:
        raise InputError(f"unknown network {short(network_name)}; known ones are {', '.join(_NETWORKS)}")
    network, names, defaults = _NETWORKS[network_name]
    if unknown := [short(name).strip("'") for name in arguments if name not in names]:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise InputError(f"{network_name} has an unknown argument {', '.join(sorted(unknown)[:3])}{more}")
    return DenoiserConfig(
        network(**defaults | {names[name]: value for name, value in arguments.items()}), preconditioning
    )


def read_edm_snapshot(path: str | Path) -> tuple[DenoiserConfig, dict[str, torch.Tensor]]:
    """The configuration and state dict of the network in an EDM snapshot (its EMA weights) or training state.

    `path` is a `network-snapshot-*.pkl` or a `training-state-*.pt`. Nothing in the file is executed: see
    `diffmem.inert`. The tensors are read-only views of the file. Raises InputError for damaged files, and for anything
    that is not made of tensors, containers and EDM's networks.
    """
    content = read_torch_file(path)
    with parsing(path, "an EDM snapshot", "download or export it again"):
        network = None
        if isinstance(content, dict):
            network = content.get("ema", content.get("net"))
        if not isinstance(network, Record) or not isinstance(network.state, dict):
            raise InputError(f"{path}: no network in it (no entry ema or net); is it an EDM snapshot?")
        args, kwargs = network.state.get("_init_args", ()), network.state.get("_init_kwargs", {})
        if not isinstance(args, tuple | list) or not isinstance(kwargs, dict) or len(args) > len(_LEADING_ARGUMENTS):
            raise InputError(f"{path}: the network's constructor arguments are missing or too many")
        try:
            config = config_from_edm(network.class_name, dict(zip(_LEADING_ARGUMENTS, args, strict=False)) | kwargs)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        records: dict[str, TensorRecord] = {}
        try:
            _collect(network, "", records, 0, Budget(0))
            records.pop("u", None)  # iDDPM's noise levels, which follow from its constants
            stored = {record.storage for record in records.values()}
            if sum(record.size for record in records.values()) > 2 * sum(
                storage.count * storage.dtype.itemsize for storage in stored
            ):
                raise Damaged("its tensors claim more data than is stored")
            return config, {name: record.to_tensor() for name, record in records.items()}
        except (Damaged, Refused) as error:
            raise input_error(path, error) from None


def _collect(module: Any, prefix: str, records: dict[str, TensorRecord], depth: int, budget: Budget) -> None:
    """Fills `records` with the tensors of a module's record and of those inside it, by their state-dict names."""
    if not isinstance(module, Record) or not isinstance(module.state, dict) or depth > 16:
        raise Damaged(f"its module {short(prefix.rstrip('.'))} is not a module")
    for group in ("_parameters", "_buffers"):
        for name, value in _named(module, group, prefix, budget):
            if isinstance(value, TensorRecord):
                records[prefix + name] = value
            elif value is not None:
                raise Damaged(f"its {prefix}{name} is not a tensor")
    for name, value in _named(module, "_modules", prefix, budget):
        if value is not None:
            _collect(value, f"{prefix}{name}.", records, depth + 1, budget)


def _named(module: Record, group: str, prefix: str, budget: Budget) -> list[tuple[str, Any]]:
    values = module.state.get(group, {})
    # A module may hold itself, or one child many times: what is visited is counted.
    budget.charge_operations(1 + len(values) if isinstance(values, dict) else 1)
    if not isinstance(values, dict) or not all(type(name) is str and len(name) <= _LONGEST_NAME for name in values):
        raise Damaged(f"{group} of its module {short(prefix.rstrip('.'))} are not named values")
    return list(values.items())
