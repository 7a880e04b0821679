"""On a GPU: our kernels, or PyTorch's scaled_dot_product_attention?

Measured once per device and shape, at its first use (`diffmem.ops.measured`), unless DIFFMEM_ATTENTION=triton, pytorch
or rule decides. While a graph is traced or captured nothing can be measured; then, and for `rule`, what was measured
before counts, and else this rule. PyTorch's way copies the packed map apart and the result back, about 8 c values per
token that ours does not move; ours computes the scores again for each of the ⌈c/outer⌉ parts of a wide head, 2 N c
operations more per token and part. So: our kernels while the repeated products take less time than the copies,

    2 N (parts − 1) ≤ 8 · itemsize · balance        balance = operations in the time of a byte from or to memory,

75 with matrix units and 5 for float32 without: half of what an A100's datasheet says (312 and 19.5 TFLOP/s, 2 TB/s).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from diffmem.errors import InputError
from diffmem.ops.attention.tiles import precision_of, tile
from diffmem.ops.measured import Remembered, device_name, seconds_of

SETTING = "DIFFMEM_ATTENTION"
MEASURED = Remembered("attention")
RUNS = 10
_BALANCE = {"matrix": 75, "plain": 5}


def by_rule(tokens: int, head_channels: int, dtype: torch.dtype, precision: str) -> str:
    """ "triton" or "pytorch", from counts alone."""
    plain = dtype == torch.float32 and precision == "ieee"
    parts = -(-head_channels // tile("forward", tokens, head_channels, dtype, precision).outer)
    repeated, copied = 2 * tokens * (parts - 1), 8 * dtype.itemsize
    return "triton" if repeated <= copied * _BALANCE["plain" if plain else "matrix"] else "pytorch"


def preferred(qkv: torch.Tensor, num_heads: int, ways: dict[str, Callable[[torch.Tensor, int], torch.Tensor]]) -> str:
    """The key of `ways` ("triton", "pytorch") to be used for qkv on its device. Raises InputError for an unknown
    setting."""
    shape = (qkv.shape[2] * qkv.shape[3], num_heads, qkv.shape[1] // (3 * num_heads))
    layout = "contiguous" if qkv.is_contiguous() else "channels_last"
    training = torch.is_grad_enabled() and qkv.requires_grad
    case = (qkv.device.type, qkv.device.index, *shape, qkv.dtype, layout, training)
    if not torch.compiler.is_compiling() and _unmeasured(*case):
        MEASURED.add(*filed_under(*case), measure(qkv, num_heads, ways))
    return settled(*case)


@torch.compiler.assume_constant_result  # torch.compile is not to trace how the choice is made
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
    """What the setting says, else what was measured, else the rule."""
    setting = _setting()
    if setting in ("triton", "pytorch"):
        return setting
    case = (device_type, device_index, tokens, num_heads, head_channels, dtype, layout, training)
    return MEASURED.best(*filed_under(*case)) or by_rule(tokens, head_channels, dtype, precision_of(dtype))


def _setting() -> str:
    setting = os.environ.get(SETTING, "measure")
    if setting not in (known := ("measure", "rule", "triton", "pytorch")):
        raise InputError(f"{SETTING}={setting}: choose {', '.join(known)}")
    return setting


def _unmeasured(device_type: str, *case) -> bool:
    """Whether a measurement is wanted, missing and possible."""
    if _setting() != "measure" or MEASURED.best(*filed_under(device_type, *case)) is not None:
        return False
    return not (device_type == "cuda" and torch.cuda.is_current_stream_capturing())


def filed_under(
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
    return device_name(torch.device(device_type, device_index)), case


def measure(
    qkv: torch.Tensor, num_heads: int, ways: dict[str, Callable[[torch.Tensor, int], torch.Tensor]], **options
) -> dict[str, float]:
    """Seconds that each way takes for qkv, with its gradient where that is wanted. options: of `seconds_of`."""
    training = torch.is_grad_enabled() and qkv.requires_grad
    values = qkv.detach().requires_grad_(training)

    def run(way: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        out = way(values, num_heads)
        if training:
            torch.autograd.grad(out, values, torch.ones_like(out))

    runs = {name: (lambda way=way: run(way)) for name, way in ways.items()}
    return seconds_of(runs, qkv.device, **{"runs": RUNS, **options})
