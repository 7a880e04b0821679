"""How the Triton kernels of attention are cut: tokens and channels of one program, its warps, its pipeline.

A program handles `block_m` tokens and goes through all others `block_n` at a time. Scores are sums over the head's
channels, `block_k` at a time; of the result's channels it makes `block_d`, so that wide heads take several programs,
each of which computes the scores again. Half precision keeps a whole head of up to 256 channels forward, 128 backward;
TF32 64; IEEE float32 has no matrix units, and its products keep few channels at a time. Shared memory stays below the
99 KB that every GPU since sm_80 gives a block.
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
    """Tokens and channels of one program, powers of two, 16 or more; stages: rounds in flight at once."""

    block_m: int
    block_n: int
    block_k: int
    block_d: int
    warps: int
    stages: int


def tile(kernel: str, head_channels: int, dtype: torch.dtype, precision: str) -> Tile:
    """The tile of one of KERNELS. precision: "ieee", or "tf32" where float32 may be rounded to it."""
    channels = max(16, 1 << (head_channels - 1).bit_length())
    block_m, block_n = 64, 32
    if dtype == torch.float32 and precision == "ieee":
        block_m, block_k, block_d = 32, 16, 32
    elif dtype == torch.float32:
        block_k, block_d = 64 if channels <= 64 else 32, 64
    elif channels <= (256 if kernel == "forward" else 128):
        block_k = block_d = channels
        if channels in (64, 128) if kernel == "forward" else channels <= 64:
            block_n = 64
    else:
        block_k, block_d = 64, 128
        block_n = 64 if kernel == "query_gradient" else 32
    # Twice the warps, and other rounds, where the compiled code would keep anything in local memory.
    most = {"forward": 64, "query_gradient": 32, "key_value_gradient": 0}[kernel]
    wide = channels > most if block_m == 64 else kernel == "query_gradient"
    warps = 8 if wide else 4
    return Tile(block_m, block_n, min(block_k, channels), min(block_d, channels), warps, stages=2)


def precision_of(dtype: torch.dtype) -> str:
    """How products of float32 are formed: as PyTorch's switches say (`diffmem.precision`)."""
    return matmul_precision() if dtype == torch.float32 else "ieee"


def every_tile(kernel: str, dtype: torch.dtype, precision: str) -> Iterator[int]:
    """Channels of a head that between them lead to every tile of `kernel`, each once, and to loops over channels of
    every kind: one round, and several."""
    seen = set()
    for head_channels in (16, 32, 64, 128, 256, 512):
        found = tile(kernel, head_channels, dtype, precision)
        key = (found, head_channels > found.block_k)
        if key not in seen:
            seen.add(key)
            yield head_channels
