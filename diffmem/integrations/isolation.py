"""A look at a model must not change its training: what ranks tell each other, random states, modes, EMA weights."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

from diffmem.errors import InputError

# Under these names training modules keep an average of their weights.
EMA_NAMES = ("ema", "ema_model", "model_ema", "ema_net", "net_ema", "averaged_model")


def ranks() -> tuple[int, int]:
    """This process's rank, and how many there are; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(value: Any) -> list[Any] | None:
    """Every rank's value on the first rank, None on the others."""
    rank, size = ranks()
    if size == 1:
        return [value]
    values = [None] * size if rank == 0 else None
    dist.gather_object(value, values)
    return values


def shared(value: Any) -> Any:
    """The first rank's value on all."""
    if ranks()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def seeds_of_rank(count: int, rank: int, size: int) -> range:
    """The seeds that a rank samples: as many on every rank, so that none waits and collectives inside the network meet;
    the last ranks may sample some beyond `count`."""
    each = -(-count // size)
    return range(rank * each, (rank + 1) * each)


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Python's, numpy's and torch's generators on all devices end up as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the state that others may use)
    devices = (
        list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    )
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextlib.contextmanager
def evaluating_all(modules: Iterable[Any]) -> Iterator[None]:
    """Modules in evaluation mode for as long as this lasts; each of their parts is then in the mode it was in."""
    training = [
        part for module in modules if isinstance(module, nn.Module) for part in module.modules() if part.training
    ]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextlib.contextmanager
def ema_weights(ema: Any, module: nn.Module) -> Iterator[nn.Module]:
    """The module to sample: with the EMA weights, for as long as this lasts.

    Args:
        ema: None; an `AveragedModel` or another module that holds the EMA weights; what stores weights, copies its
            own in their place and restores them (`store`, `copy_to`, `restore`: diffusers' and taming's `EMAModel`,
            torch_ema); or a context manager, or what has one called `average_parameters` or `ema_scope`.
        module: The module that is trained.

    Raises:
        InputError: `ema` is none of these, or holds other parameters.
    """
    if ema is None:
        yield module
        return
    scope = next((getattr(ema, name) for name in ("average_parameters", "ema_scope") if hasattr(ema, name)), None)
    if scope is not None:
        with scope():
            yield module
    elif all(hasattr(ema, name) for name in ("store", "copy_to", "restore")):
        with _stored(ema, _averaged_parameters(ema, module)):
            yield module
    elif isinstance(ema, nn.Module):
        yield ema.module if isinstance(ema, torch.optim.swa_utils.AveragedModel) else ema
    elif isinstance(ema, contextlib.AbstractContextManager):
        with ema:
            yield module
    else:
        raise InputError(
            f"ema is a {type(ema).__name__}, but must be a module with the EMA weights, or have store, copy_to "
            "and restore"
        )


def _averaged_parameters(ema: Any, module: nn.Module) -> list[nn.Parameter]:
    """Those of the module, or of the first part of it that has as many, of the same shapes, as `ema` averages."""
    shadows = getattr(ema, "shadow_params", None)
    if shadows is None:
        return list(module.parameters())
    shapes = [each.shape for each in shadows]
    for part in module.modules():
        parameters = list(part.parameters())
        if [each.shape for each in parameters] == shapes:
            return parameters
    raise InputError(
        f"ema holds averages of {len(shadows)} parameters, but no part of {type(module).__name__} has such: give "
        "the EMA of the network that is sampled"
    )


@contextlib.contextmanager
def _stored(ema: Any, parameters: list[nn.Parameter]) -> Iterator[None]:
    ema.store(parameters)
    try:
        ema.copy_to(parameters)
        yield
    finally:
        ema.restore(parameters)


def find_ema(module: Any) -> Any:
    """What a training module keeps its EMA weights in, under one of the usual names, or the module itself, where
    it puts them in place with `ema_scope`; None where there is neither."""
    if callable(getattr(module, "ema_scope", None)):
        return module
    for name in EMA_NAMES:
        found = getattr(module, name, None)
        if found is not None and not isinstance(found, (bool, int, float, str)):
            return found
    return None


def named_part(module: Any, name: str | Callable[[Any], Any] | None, what: str) -> Any:
    """An attribute ("net.ema") or what a function makes of a module.

    Raises:
        InputError: There is no such attribute.
    """
    if callable(name):
        return name(module)
    for part in (name or "").split(".") if name else ():
        if not hasattr(module, part):
            raise InputError(f"{what}: {type(module).__name__} has no attribute {part}")
        module = getattr(module, part)
    return module
