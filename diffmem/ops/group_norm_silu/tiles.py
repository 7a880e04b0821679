"""How the Triton kernels cut a batch of feature maps into tiles: which part of an image one program handles.

A program has some whole groups of one image, `width` channels that lie side by side, and goes through their pixels
`block_p` at a time; where one tile holds them all (`single_pass`) it keeps them. `block_c` is width rounded up to a
power of two. In a channels_last map a pixel's row of `width` channels is contiguous: it begins at a multiple of `align`
channels, 8 wherever that many groups fit (else 4), so that it is moved 16 bytes at a time whatever the groups' width
is, and it is more than 8 channels long: a sector of 32 bytes, or nearly, in half precision.
benchmarks/results/kernels.triton-*.csv lists all tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

BLOCKS = (16, 32, 64, 128)  # values of block_c
WIDEST = BLOCKS[-1]
LOOPED = 2048  # elements of a tile of a loop: 16 bytes per thread, or twice that, in half precision
SINGLE = (16, 64)  # pixels of tiles that hold all of an image's
ENOUGH = 512  # programs that keep a large GPU busy: four for each of some 130 multiprocessors


@dataclass(frozen=True)
class Tile:
    """`groups` groups in a tile of block_p pixels by block_c channels, with `warps` warps of 32 threads.

    The pixels may go past the image's, the groups past the last one; what is outside is masked.
    """

    groups: int
    block_c: int
    block_p: int
    align: int
    single_pass: bool
    warps: int


def tile(group_channels: int, num_groups: int, pixels: int, channels_last: bool, batch: int) -> Tile:
    """The tile for `batch` maps of `pixels` pixels and num_groups groups of group_channels channels."""
    block_c, groups, align = _columns(group_channels, num_groups, channels_last, batch)
    for block_p in SINGLE:
        if pixels <= block_p and block_c <= 64:
            return Tile(groups, block_c, block_p, align, True, max(1, min(8, block_c * block_p // 512)))
    # Twice the warps where the compiled code would keep anything in local memory.
    warps = 4 if block_c == 32 else 8
    if not channels_last and block_c == WIDEST:
        warps = 16
    return Tile(groups, block_c, LOOPED // block_c, align, False, warps)


def fits(group_channels: int, channels_last: bool) -> bool:
    """Whether there is a tile for groups of that many channels."""
    return group_channels <= WIDEST and (not channels_last or math.lcm(group_channels, 4) <= WIDEST)


def _columns(group_channels: int, num_groups: int, channels_last: bool, batch: int) -> tuple[int, int, int]:
    """block_c, groups and align: the widest rows that leave ENOUGH programs, else the narrowest."""
    if not channels_last:  # pixels are contiguous: the fewest channels
        block_c = next(each for each in BLOCKS if each >= group_channels)
        return block_c, block_c // group_channels, 1
    for multiple in (16, 8, 4):  # 16: sectors of 32 bytes are not shared with the neighboring programs
        step = multiple // math.gcd(multiple, group_channels)  # groups that come to such a multiple
        fitting = {each: each // group_channels // step * step for each in BLOCKS}
        fitting = {each: groups for each, groups in fitting.items() if groups}
        if fitting:
            usual = [each for each in fitting if each <= 64] or [WIDEST]
            busy = [each for each in usual if batch * -(-num_groups // fitting[each]) >= ENOUGH]
            block_c = max(busy, default=min(usual))
            return block_c, fitting[block_c], min(8, multiple)
    raise AssertionError("fits() says whether there is a tile")


def every_tile(channels_last: bool) -> Iterator[tuple[int, int, int]]:
    """(group_channels, pixels, batch) of maps of 32 groups that between them lead to all there is to compile, each pair
    once: tiles that differ in `groups` alone are one kernel."""
    seen = set()
    for group_channels, pixels, batch in product((8, 16, 32, 42, 64, 128), (16, 64, 256), (512, 32, 4)):
        if fits(group_channels, channels_last):
            found = tile(group_channels, 32, pixels, channels_last, batch)
            key = (found.block_c, found.block_p, found.align, found.single_pass, found.warps)
            if key not in seen:
                seen.add(key)
                yield group_channels, pixels, batch
