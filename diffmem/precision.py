"""How products are formed: the names of the precisions, and the switches of PyTorch behind them.

ieee    float32 throughout: the reference protocol
tf32    float32, whose products on a GPU's matrix units are of numbers rounded to 10 bits (TF32)
bf16    the network in bfloat16 by autocast; weights, gradients, noise and losses stay float32
fp16    the same in float16, for sampling only

On a CPU, 3×3 convolutions and normalizations stay in float32 under autocast where `diffmem.ops` has kernels for them.
There bf16 takes about as long as ieee (0.9 to 1.06 times, Zen 4 with AVX512_BF16), and 1.8 times as long where the
processor has no instructions for it, which is said once.

On a GPU, PyTorch rounds the inputs of convolutions to TF32 unless it is told not to. There are two families of
switches: `allow_tf32` and `set_float32_matmul_precision`, and from torch 2.9 on `fp32_precision`. Reading the first
raises where only the second was set, and setting it to False leaves convolutions in TF32 where the second, set for all
backends at once, says so. So here the second is read where there is one, and both are set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from diffmem.errors import InputError
from diffmem.logs import logger

_log = logger(__name__)
AUTOCAST = {"ieee": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TRAINING_PRECISIONS = ("ieee", "tf32", "bf16")


def matmul_precision() -> str:
    """How matrix products of float32 are formed on a GPU: "ieee" or "tf32"."""
    found = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if found in (None, "none"):  # torch before 2.9, or nothing was set there
        return "tf32" if _read(lambda: torch.backends.cuda.matmul.allow_tf32) else "ieee"
    return "tf32" if found == "tf32" else "ieee"


def rounds_on_cpu() -> bool:
    """Whether products of float32 matrices may be of rounded numbers on the CPU too ("medium" precision: bfloat16)."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return getattr(matmul, "fp32_precision", "ieee") not in ("ieee", "none")


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Products of float32, of matrices and of convolutions, in this precision ("ieee", "tf32") while it lasts; all
    switches are afterwards as they were. The others of AUTOCAST stand for "ieee": what autocast leaves in float32.

    Raises InputError for an unknown name.
    """
    if precision not in AUTOCAST:
        raise InputError(f"precision is {precision!r}, but must be one of {', '.join(AUTOCAST)}")
    kept = _switches()
    rounded = precision == "tf32"
    torch.set_float32_matmul_precision("high" if rounded else "highest")
    torch.backends.cuda.matmul.allow_tf32 = rounded
    torch.backends.cudnn.allow_tf32 = rounded
    for backend in _backends():
        if backend.fp32_precision != (wanted := "tf32" if rounded else "ieee"):
            backend.fp32_precision = wanted
    try:
        yield
    finally:
        _restore(kept)


@cache
def warn_where_slow(precision: str, device_type: str) -> None:
    """Says, once per process, where a precision is slower than "ieee": half precision without instructions for it."""
    known = {"bf16": "_is_mkldnn_bf16_supported", "fp16": "_is_mkldnn_fp16_supported"}.get(precision)
    supported = getattr(torch.ops.mkldnn, known, None) if known and device_type == "cpu" else None
    if supported is not None and not supported():
        _log.warning("this CPU has no instructions for %s, which takes longer than ieee on it", precision)


@contextlib.contextmanager
def measured_convolutions(device: torch.device) -> Iterator[None]:
    """On a GPU, cuDNN tries its algorithms on each shape and keeps the fastest, while this lasts; not where
    deterministic algorithms were asked for, since which one is fastest may differ from run to run."""
    kept = torch.backends.cudnn.benchmark
    if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = kept


def _backends() -> list[Any]:
    """What has a switch `fp32_precision` of its own: each kind of product on each backend."""
    found = [torch.backends.cuda.matmul]
    for module in (torch.backends.cudnn, torch.backends.mkldnn):
        found += [part for name in ("matmul", "conv", "rnn") if (part := getattr(module, name, None)) is not None]
    return [each for each in found if hasattr(each, "fp32_precision")]


def _switches() -> dict[str, Any]:
    """All that `float32_products` changes; None: could not be read."""
    return {
        "matmul": _read(torch.get_float32_matmul_precision),
        "allow_matmul": _read(lambda: torch.backends.cuda.matmul.allow_tf32),
        "allow_cudnn": _read(lambda: torch.backends.cudnn.allow_tf32),
        "fp32_precision": [(each, each.fp32_precision) for each in _backends()],
    }


def _restore(kept: dict[str, Any]) -> None:
    if kept["matmul"] is not None:
        torch.set_float32_matmul_precision(kept["matmul"])
    if kept["allow_matmul"] is not None:
        torch.backends.cuda.matmul.allow_tf32 = kept["allow_matmul"]
    if kept["allow_cudnn"] is not None:
        torch.backends.cudnn.allow_tf32 = kept["allow_cudnn"]
    for backend, precision in kept["fp32_precision"]:
        if backend.fp32_precision == precision:
            continue
        backend.fp32_precision = "none"  # what follows the switch above it goes on doing so
        if backend.fp32_precision != precision:
            backend.fp32_precision = precision


def _read(switch: Callable[[], Any]) -> Any:
    """Its value, or None where PyTorch refuses to say, because the new switches were set and the old ones were not."""
    try:
        return switch()
    except RuntimeError:
        return None
