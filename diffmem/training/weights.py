"""A network's parameters in one buffer, so that optimizer, averaging, sanitizing and all-reduce are one pass each.

Small networks have hundreds of tensors of a few thousand numbers: a loop over them costs more than the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from diffmem.models.blocks import QueryKeyValue
from diffmem.training.config import TrainingConfig

_ALIGNED = 16  # numbers: 64 bytes, a cache line


class FlatParameters:
    """`values`, one parameter that holds all of a module's, which become views of it (and their gradients of its).

    Parameters that require no gradient are left out. Shapes and memory order stay as they were. The gaps between
    tensors, up to a cache line, are zeros and stay so. Training states hold such a buffer in the order of EDM's tensors
    (`to_stored`, `from_stored`), whatever order a module prefers in memory.
    """

    def __init__(self, module: nn.Module, gradients: bool) -> None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        regrouped = {
            id(parameter)
            for part in module.modules()
            if isinstance(part, QueryKeyValue)
            for parameter in part.parameters()
        }
        self._regrouped: list[tuple[slice, torch.Size]] = []
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
            size, stride = parameter.size(), _dense_stride(parameter)
            if id(parameter) in regrouped:
                self._regrouped.append((slice(start, start + parameter.numel()), size))
            view = values.as_strided(size, stride, start)
            view.copy_(parameter.data)
            parameter.data = view
            parameter.requires_grad_(gradients)
            if gradients:
                parameter.grad = self.gradient.as_strided(size, stride, start)

    @property
    def gradient(self) -> torch.Tensor:
        """The gradient of `values`, where there is one."""
        assert self.values.grad is not None
        return self.values.grad

    def to_stored(self, buffer: torch.Tensor) -> torch.Tensor:
        """A copy of `buffer`, laid out like `values` (weights, their averages, an optimizer's moments), as training
        states hold it."""
        stored = buffer.detach().clone()
        for part, shape in self._regrouped:
            stored[part] = QueryKeyValue.to_edm(stored[part].view(shape)).flatten()
        return stored

    def from_stored(self, stored: torch.Tensor) -> torch.Tensor:
        """The buffer laid out like `values` that a training state holds as `stored`."""
        buffer = stored.clone()
        for part, (parts, channels, *rest) in self._regrouped:
            buffer[part] = QueryKeyValue.from_edm(buffer[part].view(parts * channels, *rest)).flatten()
        return buffer


def _dense_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's own memory order, unless that leaves gaps or names a number twice."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.size(), strict=True) if n != 1):
        if stride != expected:
            return torch.empty(tensor.size(), device="meta").stride()
        expected *= size
    return tensor.stride()


def make_optimizer(config: TrainingConfig, flat: FlatParameters) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over the one buffer, in its fused form."""
    shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        return torch.optim.SGD([flat.values], momentum=config.momentum, **shared)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind([flat.values], betas=config.betas, eps=config.eps, **shared)


def sanitize(gradient: torch.Tensor) -> None:
    """In place: NaN becomes 0, ±inf ±1e5, so that one bad number costs one number and not the run."""
    torch.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5, out=gradient)
