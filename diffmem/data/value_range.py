"""Floats as gray levels: which values are black and white, and 8-bit images from floats."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from diffmem.data.storage import allocate
from diffmem.errors import InputError
from diffmem.progress import Progress

BLOCK_VALUES = 2**22
OVERSHOOT = (
    0.25  # of the range: how far beyond black and white a sampler's values may reach before they mean another range
)


def check_value_range(value_range: object) -> tuple[float, float]:
    """(black, white) as two finite floats. Raises InputError for anything else."""
    try:
        low, high = (float(value) for value in value_range)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(
            "value_range must be the values of black and white, such as (-1, 1), (0, 1) or (0, 255), got "
            f"{value_range!r}"
        )
    return low, high


def extremes(images: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest value of `images`."""
    parts = [(block.min(), block.max()) for _, block in _blocks(images)]
    return float(min(low for low, _ in parts)), float(max(high for _, high in parts))


def as_bytes(images: np.ndarray, value_range: tuple[float, float], where: str, progress: Progress) -> np.ndarray:
    """Float images [N, C, H, W] as uint8: round(255 · (x − black) / (white − black)), halves up, clipped to 0 … 255.

    uint8 images are returned as they are: theirs are gray levels already. Raises InputError where values reach farther
    beyond the range than a sampler's do, so that it cannot be the right one.
    """
    if images.dtype == np.uint8:
        return images
    black, white = value_range
    low, high = extremes(images)
    slack = OVERSHOOT * (white - black)
    if low < black - slack or high > white + slack:
        raise InputError(
            f"{where}: values from {low:.4g} to {high:.4g} do not lie within value_range=({black:g}, {white:g}): give "
            "the values of black and white"
        )
    levels = allocate(images.shape, np.uint8)
    for start, block in _blocks(images):
        scaled = (block.astype(np.float64) - black) * (255 / (white - black))
        levels[start : start + len(block)] = np.clip(np.floor(scaled + 0.5), 0, 255)
        progress("converting floats to uint8", start + len(block), len(images))
    return levels


def _blocks(images: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    rows = max(1, BLOCK_VALUES // max(1, images[:1].size))
    for start in range(0, len(images), rows):
        yield start, images[start : start + rows]
