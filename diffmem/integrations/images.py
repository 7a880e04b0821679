"""What frameworks hand out as images, as gray levels that can be compared with those of a training set."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffmem.data import ImageSet, load_images
from diffmem.data.value_range import OVERSHOOT, extremes
from diffmem.errors import InputError

# Black and white, and how far beyond a sampler's values may reach: little where white is 255, or latents would do.
RANGES = (((0.0, 1.0), OVERSHOOT), ((-1.0, 1.0), 2 * OVERSHOOT), ((0.0, 255.0), 0.5))


def gray_levels(images: Any, value_range: tuple[float, float] | None = None, **reading: Any) -> ImageSet:
    """Images as uint8, whatever they are given as.

    Args:
        images: Anything that `diffmem.load_images` reads, or what a pipeline of diffusers returns.
        value_range: The values of black and white of floats. None: (0, 1), (-1, 1) or (0, 255), the first that holds
            all of them.
        **reading: Further arguments of `diffmem.load_images`.

    Raises:
        InputError: There are no images, their values are not finite, or lie in none of these ranges.
    """
    loaded = load_images(getattr(images, "images", images), **reading)
    if loaded.images.dtype != np.uint8:
        loaded = load_images(loaded, value_range=value_range or range_of(loaded))
    return loaded


def range_of(images: ImageSet) -> tuple[float, float]:
    """Which values mean black and white, by the values that there are: a sampler's reach a little beyond.

    Raises:
        InputError: They lie in none of the usual ranges.
    """
    low, high = extremes(images.images)
    for (black, white), slack in RANGES:
        if black - slack <= low and high <= white + slack:
            return black, white
    told = f"{images.source}: values from {low:.4g} to {high:.4g}"
    if images.image_shape[0] == 4:
        raise InputError(f"{told} in 4 channels look like latents, not images: decode them")
    raise InputError(f"{told}: give value_range, the values of black and white, such as (-1, 1)")
