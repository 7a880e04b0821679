"""What the device does at most: bytes per second of a large copy, operations per second of large matrix products, all
on random data (on constants the matrix units need less power, and are faster than they will be)."""

from __future__ import annotations

import json
from functools import partial

import torch

from benchmarks.gpu.target import KINDS, RATES, Target
from benchmarks.gpu.timing import seconds_per_call
from diffmem.precision import float32_products

DTYPES = {
    "float32 ieee": (torch.float32, "ieee"), "float32 tf32": (torch.float32, "tf32"),
    "bfloat16": (torch.bfloat16, "ieee"), "float16": (torch.float16, "ieee"),
}  # fmt: skip


def run(target: Target) -> None:
    size, side = (1 << 16, 128) if target.tiny else (1 << 31, 8192)
    rates: dict[str, float] = {}

    def add(kind: str, amount: float, call) -> None:
        call()
        found = seconds_per_call([call], target.device)
        rates[kind] = amount / found.seconds
        target.rates[kind] = rates[kind]
        unit = "bytes/s" if kind == "bytes" else "operations/s"
        target.record("ceilings", f"device: {kind}", "measured", f"{rates[kind]:.4g} {unit}, {found.how}")
        (target.out / RATES).write_text(json.dumps(rates) + "\n")

    source = target.bytes(size)
    to = torch.empty_like(source)
    add("bytes", 2.0 * size, partial(to.copy_, source))
    del source, to
    target.empty_cache()
    for kind, (dtype, precision) in DTYPES.items():
        a, b = (target.normal(side, side, dtype=dtype, seed=seed) for seed in (0, 1))
        with float32_products(precision):
            add(kind, 2.0 * side**3, partial(torch.mm, a, b))
    a, b = (target.bytes(side, side, seed=seed).to(torch.int16).sub(128).to(torch.int8) for seed in (0, 1))
    add("int8", 2.0 * side**3, partial(torch._int_mm, a, b.t()))
    assert set(rates) == set(KINDS)
