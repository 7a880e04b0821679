"""The network that a run trains: diffmem's own, built from the configuration, or a module of someone else's."""

from __future__ import annotations

import copy

import torch

from diffmem.errors import InputError
from diffmem.models import Denoiser, DenoiserConfig, Model, ModuleConfig, WrappedDenoiser
from diffmem.models.wrapped import as_configured


def networks(config: DenoiserConfig, model: Model | None) -> tuple[Denoiser | WrappedDenoiser, ...]:
    """(the denoiser to train, the one for its EMA weights), alike, on the CPU.

    model: the module that `config` describes, which is copied and left as it was, or what makes it; a denoiser of
    diffmem's, whose weights training then starts from; None: a new one of diffmem's. New weights are drawn from torch's
    generator. Raises InputError where the two do not fit, or there is nothing to train.
    """
    if isinstance(model, WrappedDenoiser | Denoiser) and model.config.network != config.network:
        raise InputError(f"model is {model.summary()}, but the configuration's denoiser is another: use model.config")
    if isinstance(config.network, ModuleConfig):
        if model is None:
            raise InputError(f"the configuration is of {config.network.name}, a network of your own: pass it as model")
        own = as_configured(model, config)
        _check_trainable(own)
        return own, copy.deepcopy(own)
    if model is not None and not isinstance(model, Denoiser):
        raise InputError(
            f"model is a {type(model).__name__}, but the configuration's denoiser is one of diffmem's: configure your "
            "own network with TrainingConfig(as_denoiser(model, …).config, …)"
        )
    denoiser, averaged = Denoiser(config), Denoiser(config)
    if model is not None:
        denoiser.load_state_dict(model.state_dict())
    averaged.load_state_dict(denoiser.state_dict())
    return denoiser, averaged


def buffers(denoiser: Denoiser | WrappedDenoiser) -> dict[str, torch.Tensor]:
    """What training changes besides parameters and a checkpoint holds, such as running means; nothing of our own."""
    if isinstance(denoiser, Denoiser):
        return {}
    stored = denoiser.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in denoiser.named_buffers() if name in stored}


def _check_trainable(own: WrappedDenoiser) -> None:
    trained = [(name, each) for name, each in own.plain.named_parameters() if each.requires_grad]
    if not trained:
        raise InputError(f"{own.plain_name}: has no parameter that requires a gradient: there is nothing to train")
    for name, parameter in trained:
        if parameter.dtype != torch.float32:
            raise InputError(
                f"{own.plain_name}: {name} is of {parameter.dtype}, but training keeps weights in float32: pass "
                "model.float(), with precision='bf16' for products in half precision"
            )
