"""A network's parameters in one buffer, so that optimizer, averaging, sanitizing and all-reduce are one pass each.

Small networks have hundreds of tensors of a few thousand numbers: a loop over them costs more than the arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn as nn

from diffmem.training.config import TrainingConfig

_ALIGNED = 16  # numbers: 64 bytes, a cache line


class FlatParameters:
    """`values`, one parameter that holds all of a module's, which become views of it (and their gradients of its).

    Shapes and memory order stay as they were. The gaps between tensors, up to a cache line, are zeros and stay so.
    """

    def __init__(self, module: nn.Module, gradients: bool):
        parameters = list(module.parameters())
        starts, total = [], 0
        for parameter in parameters:
            starts.append(total)
            total += -(-parameter.numel() // _ALIGNED) * _ALIGNED
        first = parameters[0]
        values = torch.zeros(total, dtype=first.dtype, device=first.device)
        self.values = nn.Parameter(values, requires_grad=gradients)
        if gradients:
            self.values.grad = torch.zeros_like(values)
        for parameter, start in zip(parameters, starts, strict=True):
            size, stride = parameter.size(), parameter.stride()
            view = values.as_strided(size, stride, start)
            view.copy_(parameter.data)
            parameter.data = view
            parameter.requires_grad_(gradients)
            if gradients:
                parameter.grad = self.values.grad.as_strided(size, stride, start)


def make_optimizer(config: TrainingConfig, flat: FlatParameters) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over the one buffer, in its fused form."""
    shared = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        return torch.optim.SGD([flat.values], momentum=config.momentum, **shared)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind([flat.values], betas=config.betas, eps=config.eps, **shared)


def sanitize(gradient: torch.Tensor) -> None:
    """In place: NaN becomes 0, ±inf ±1e5, so that one bad number costs one number and not the run."""
    torch.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5, out=gradient)
