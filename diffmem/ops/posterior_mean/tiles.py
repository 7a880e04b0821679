"""How the Triton kernels of the posterior mean cut queries, images and pixels into tiles.

Sizes are powers of two, one set for few queries and one for many, so that there are few kernels to compile and check:
benchmarks/results/kernels.triton-*.csv lists them all. They are the largest of those tried (16 and 64 queries; 32 to
128 images and values; 4 and 8 warps; 2 and 3 stages) that leave all of sm_80, sm_90 and sm_100 without spills.
"""

from __future__ import annotations

from dataclasses import dataclass

SPAN = 1024  # images for which one maximum and one sum are kept, and which are read or left out as a whole
QUERIES = (16, 64)  # of a tile


@dataclass(frozen=True)
class ScoreTile:
    """block_m queries × block_n images, block_k values at a time, by `warps` warps of 32 threads."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class SumTile:
    """block_m queries × block_n values, block_k images at a time, over `group` spans."""

    block_m: int
    block_n: int
    block_k: int
    group: int
    warps: int
    stages: int


def score_tile(queries: int) -> ScoreTile:
    if queries <= QUERIES[0]:
        return ScoreTile(16, 64, 64, 4, 3)
    return ScoreTile(64, 64, 128, 8, 3)


def sum_tile(queries: int) -> SumTile:
    if queries <= QUERIES[0]:
        return SumTile(16, 64, 64, 4, 4, 3)
    return SumTile(64, 64, 64, 4, 8, 3)
