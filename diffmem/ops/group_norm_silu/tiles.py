"""How the Triton kernels cut a batch of feature maps into tiles: which part of an image one program handles.

A group of channels is normalized as a whole. Where it fits on chip, one program reads it once, and writes it once
("whole"). Where it does not, a first kernel leaves partial statistics of tiles, a second one reads the map again and
merges them ("split"). Sizes are powers of two (of four along the pixels, as square maps have), so that there are few
kernels to compile and check: benchmarks/results/kernels.triton-*.csv lists them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

WHOLE = 16384  # elements of the largest group that is kept on chip: 32 per thread of 16 warps
WHOLE_BACKWARD = 8192  # the same where two maps are kept; with more, registers spill
SPLIT = 8192  # elements of a tile of a larger one; half of it where channels were rounded up: masks take registers
SMALL = 2048  # elements below which a program takes further groups along
WIDEST_GROUP = 32  # channels
SECTOR = 32  # bytes that memory hands out at once; channels_last rows of a tile are at least this long


@dataclass(frozen=True)
class Tile:
    """groups × channels × pixels that one program handles, with `warps` warps of 32 threads.

    channels: of one group, rounded up to a power of two; `exact` where nothing was rounded up. The pixels may go past
    the image's, the groups past the last one; what is outside is masked.
    """

    whole: bool
    groups: int
    channels: int
    pixels: int
    exact: bool
    warps: int


def tile(group_channels: int, pixels: int, channels_last: bool, itemsize: int, room: int = WHOLE) -> Tile:
    """The tile for maps of `pixels` pixels of `itemsize` bytes, normalized over `group_channels` channels at once.

    room: elements of the largest tile.
    """
    channels = max(4, _power_of_two(group_channels))
    exact = channels == group_channels
    square = 64
    while square < pixels:
        square *= 4
    groups = 1

    def rows_too_short() -> bool:
        return channels_last and channels * groups * itemsize < SECTOR

    whole = channels * square <= room
    if whole:
        while channels * groups * square < SMALL or (rows_too_short() and channels * groups * square * 2 <= room):
            groups *= 2
    else:
        while rows_too_short():
            groups *= 2
        square = (SPLIT if exact else SPLIT // 2) // (channels * groups)
    elements = channels * groups * square
    per_warp = 512 if whole or exact else 256
    return Tile(
        whole=whole,
        groups=groups,
        channels=channels,
        pixels=square,
        exact=exact,
        warps=min(16, max(1, elements // per_warp)),
    )


def every_tile(channels_last: bool, itemsize: int) -> Iterator[tuple[int, int]]:
    """(group_channels, pixels) that between them lead to every Tile there is, forward and
    backward, each pair once."""
    seen = set()
    for group_channels in (3, 4, 5, 8, 9, 16, 17, 32):
        pixels = 64
        while pixels <= 4 * WHOLE:
            shape = (group_channels, pixels, channels_last, itemsize)
            found = (tile(*shape), tile(*shape, WHOLE_BACKWARD))
            if found not in seen:
                seen.add(found)
                yield group_channels, pixels
            pixels *= 4


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
