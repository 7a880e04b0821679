"""On a GPU: our kernels, or PyTorch's scaled_dot_product_attention?

Measured once per device and shape, at its first use, and kept in the autotune cache (`diffmem.ops.autotune`). PyTorch's
is used where nothing was measured: while a graph is traced or captured nothing can be, and DIFFMEM_ATTENTION=cache
forbids it. DIFFMEM_ATTENTION=triton or torch decides without a measurement.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, cast

import torch

from diffmem.errors import InputError
from diffmem.ops.attention.tiles import precision_of
from diffmem.ops.autotune import AutotuneCache, device_name, seconds_of
from diffmem.ops.registry import constant_in_graphs

SETTING = "DIFFMEM_ATTENTION"
DEFAULT = "torch"  # where nothing was measured
CACHE = AutotuneCache("attention")
RUNS = 10


def fastest_backend(
    qkv: torch.Tensor, num_heads: int, backends: dict[str, Callable[[torch.Tensor, int], torch.Tensor]]
) -> str:
    """The key of `backends` ("triton", "torch") to be used for qkv on its device. Raises InputError for an unknown
    setting."""
    shape = (qkv.shape[2] * qkv.shape[3], num_heads, qkv.shape[1] // (3 * num_heads))
    layout = "contiguous" if qkv.is_contiguous() else "channels_last"
    training = torch.is_grad_enabled() and qkv.requires_grad
    case = (qkv.device.type, qkv.device.index, *shape, qkv.dtype, layout, training)
    if not torch.compiler.is_compiling() and _unmeasured(*case):
        CACHE.add(*cache_key(*case), measure(qkv, num_heads, backends))
    return settled(*case)


@constant_in_graphs  # torch.compile is not to trace how the choice is made
def settled(
    device_type: str,
    device_index: int | None,
    tokens: int,
    num_heads: int,
    head_channels: int,
    dtype: torch.dtype,
    layout: str,
    training: bool,
) -> str:
    """What the setting says, else what was measured, else DEFAULT."""
    setting = _setting()
    if setting in ("triton", "torch"):
        return setting
    case = (device_type, device_index, tokens, num_heads, head_channels, dtype, layout, training)
    return CACHE.best(*cache_key(*case)) or DEFAULT


def _setting() -> str:
    setting = os.environ.get(SETTING, "measure")
    if setting not in (known := ("measure", "cache", "triton", "torch")):
        raise InputError(f"{SETTING}={setting}: choose {', '.join(known)}")
    return setting


def _unmeasured(device_type: str, *case: Any) -> bool:
    """Whether a measurement is wanted, missing and possible."""
    if _setting() != "measure" or CACHE.best(*cache_key(device_type, *case)) is not None:
        return False
    return not (device_type == "cuda" and torch.cuda.is_current_stream_capturing())


def cache_key(
    device_type: str,
    device_index: int | None,
    tokens: int,
    num_heads: int,
    head_channels: int,
    dtype: torch.dtype,
    layout: str,
    training: bool,
) -> tuple[str, str]:
    """Device and case of a measurement; the batch size of the first use stands for all."""
    number = f"{str(dtype).removeprefix('torch.')} {precision_of(dtype)}"
    step = "training" if training else "inference"
    case = f"{tokens} tokens, {num_heads} heads of {head_channels}, {number}, {layout}, {step}"
    return device_name(torch.device(device_type, cast(int, device_index))), case


def measure(
    qkv: torch.Tensor, num_heads: int, backends: dict[str, Callable[[torch.Tensor, int], torch.Tensor]], **options: Any
) -> dict[str, float]:
    """Seconds that each backend takes for qkv, with its gradient where that is wanted. options: of `seconds_of`."""
    training = torch.is_grad_enabled() and qkv.requires_grad
    values = qkv.detach().requires_grad_(training)

    def run(backend: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        out = backend(values, num_heads)
        if training:
            torch.autograd.grad(out, values, torch.ones_like(out))

    runs: dict[str, Any] = {name: (lambda backend=backend: run(backend)) for name, backend in backends.items()}
    return seconds_of(runs, qkv.device, **{"runs": RUNS, **options})
