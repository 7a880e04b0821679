"""How the Triton kernels of attention are cut: tokens and channels of one program, and its warps.

A program handles `rows` tokens and goes through all others `columns` at a time. Scores are sums over the head's
channels, `inner` at a time; of the result's channels it makes `outer`, so that wide heads take several programs, each
of which computes the scores anew. With matrix units (half precision, TF32) `outer` is as large as registers allow;
IEEE float32 has none, and its products keep few channels at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from diffmem.precision import matmul_precision

KERNELS = ("forward", "query_gradient", "key_value_gradient")
WIDEST_HEAD, MOST_TOKENS = 512, 4096


@dataclass(frozen=True)
class Tile:
    """Tokens and channels of one program; powers of two, 16 or more."""

    rows: int
    columns: int
    inner: int
    outer: int
    warps: int
    stages: int


def tile(kernel: str, tokens: int, head_channels: int, dtype: torch.dtype, precision: str) -> Tile:
    """The tile of one of KERNELS. precision: "ieee", or "tf32" where float32 may be rounded to it."""
    side = 16 if tokens <= 16 else 64
    channels = max(16, 1 << (head_channels - 1).bit_length())
    warps = 4
    if dtype == torch.float32 and precision == "ieee":
        side = min(side, 32)
        inner, outer = 16, 32
    elif dtype == torch.float32:
        inner, outer = 32, 64
    else:
        inner, outer = 128 if channels <= 128 else 64, 128
    columns = min(side, 32)
    # Twice the warps where four would run out of registers.
    most = {"forward": 64, "query_gradient": 32, "key_value_gradient": 0}[kernel]
    if side == 64 and channels > most:
        warps = 8
    return Tile(side, columns, min(inner, channels), min(outer, channels), warps, 1 if side == 16 else 2)


def precision_of(dtype: torch.dtype) -> str:
    """How products of float32 are formed: as PyTorch's switches say (`diffmem.precision`)."""
    return matmul_precision() if dtype == torch.float32 else "ieee"


def every_tile(kernel: str, dtype: torch.dtype, precision: str) -> Iterator[tuple[int, int]]:
    """(tokens, head_channels) that between them lead to every tile of `kernel`, each once, and to loops over channels
    of every kind: one round, and several."""
    seen = set()
    for tokens in (16, 64):
        for head_channels in (16, 32, 64, 128, 256):
            found = tile(kernel, tokens, head_channels, dtype, precision)
            key = (found, head_channels > found.inner)
            if key not in seen:
                seen.add(key)
                yield tokens, head_channels
