"""Seeds as people write them: `0-9999`, `0,3,5-7`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from diffmem.errors import InputError

PROTOCOL_SEEDS = range(10_000)
_MOST = 100_000_000  # a longer list is a slip of the finger


def parse_seeds(text: str) -> list[int]:
    """The seeds that `text` lists, in its order.

    Args:
        text: Whole numbers and ranges, both ends included, separated by commas.

    Raises:
        InputError: Anything else, or a seed that is listed twice.

    Example:
        >>> parse_seeds("0-2,7")
        [0, 1, 2, 7]
    """
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part, re.ASCII)
        if match is None:
            raise InputError(
                f"seeds: {part.strip()!r} in {text!r} is not a whole number or range; write them as 0,3,5-7"
            )
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise InputError(f"seeds: {part.strip()} ends before it begins")
        ranges.append(range(first, last + 1))
    # Not len(): it fails beyond 2**63.
    if sum(seeds.stop - seeds.start for seeds in ranges) > _MOST:
        raise InputError(f"seeds: {text} are more than {_MOST:,}; sample them in parts")
    chosen = [seed for seeds in ranges for seed in seeds]
    if len(set(chosen)) < len(chosen):
        raise InputError(f"seeds: {text} lists a seed twice")
    return chosen


def checked_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds as whole numbers.

    Args:
        seeds: Distinct whole numbers from 0.

    Raises:
        InputError: There are none, or negative ones, or one is listed twice.
    """
    seeds = [int(seed) for seed in seeds]
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise InputError("seeds: must be distinct whole numbers from 0, at least one")
    return seeds


def format_seeds(seeds: Sequence[int]) -> str:
    """The shortest text that `parse_seeds` reads as these seeds, in this order.

    Args:
        seeds: Whole numbers from 0.

    Example:
        >>> format_seeds([0, 1, 2, 7])
        '0-2,7'
    """
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
