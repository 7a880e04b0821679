"""Does a verdict mean anything? Sets on different scales are refused, and images that look wrong are warned about.

The rule compares pixels. Where the generated images are black, nearly all the same, or on another scale than the
training images, it finds no copies and says so with a narrow interval. All that is checked here is relative to the
training set, on evenly spaced samples of both sets.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from diffmem.data import ImageSet
from diffmem.data.value_range import extremes
from diffmem.errors import InputError

SAMPLE = 1024  # images looked at
SAMPLE_PIXELS = 2**14  # and at most that many pixels of each, evenly spaced
# The usual ranges of floats, each within the next, and what a sampler's values may reach.
SCALES = {(0.0, 1.0): (-0.2, 1.2), (-1.0, 1.0): (-1.5, 1.5), (0.0, 255.0): (-32.0, 287.0)}
DARKEST = 32.0  # a set of 0 … 255 reaches this
UNLIKELY = 0.01  # probability below which images do not happen to lie in part of a range
MANY = 0.1  # share of copies that only images on one scale have
ODD = 0.05  # share of single-color images that is remarkable
STANDARD_ERRORS = 5.0
CONTRAST = 0.6  # factor on the contrast that a scale, but hardly a model, changes it by
BRIGHTNESS = 0.6  # the same for brightness, in standard deviations of the training set's values
HARDLY = 0.1  # how much generated images vary, over how much training images do


@dataclass(frozen=True)
class Appearance:
    """Figures of a sample of images: per image mean, standard deviation about each channel's mean (contrast), and
    whether it is of a single color; over all of them the deviation of values, and the median deviation (rms) of an
    image from the set's median image."""

    means: np.ndarray
    contrasts: np.ndarray
    constant: np.ndarray
    deviation: float
    variety: float

    @classmethod
    def of(cls, images: np.ndarray) -> Appearance:
        values = _sampled(images).astype(np.float64)
        channels = values.reshape(len(values), values.shape[1], -1)
        some = values[:: max(1, len(values) // 256)]  # medians are slow
        variety = np.square(some - np.median(some, axis=0)).mean(axis=(1, 2, 3))
        return cls(
            values.mean(axis=(1, 2, 3)),
            np.sqrt(channels.var(axis=2).mean(axis=1)),
            (channels.max(axis=2) == channels.min(axis=2)).all(axis=1),
            float(values.std()),
            float(np.sqrt(np.median(variety))),
        )


def check_scale(images: ImageSet, training: ImageSet, what: str, copies: float = 0.0) -> None:
    """Raises InputError where float images look to be on another of the usual scales than the training images. copies:
    the share of them that the rule calls copies; where there are some, [0, 1] is a part of [-1, 1]."""
    if images.images.dtype == np.uint8:
        return
    ours, theirs = extremes(images.images), extremes(training.images)
    if ours[0] == ours[1] or theirs[0] == theirs[1]:
        return  # a single value fits every scale
    scale, their_scale = _scale(ours), _scale(theirs)
    if scale is None or their_scale is None or scale == their_scale:
        return
    if copies > MANY and (0.0, 255.0) not in (scale, their_scale):
        return
    # Images of the wider scale may happen to lie within the narrower one: how many of the wider set do?
    order = list(SCALES)
    narrow, wide = (images, training) if order.index(scale) < order.index(their_scale) else (training, images)
    low, high = SCALES[scale if narrow is images else their_scale]
    some = _sampled(wide.images)
    inside = ((some.min(axis=(1, 2, 3)) >= low) & (some.max(axis=(1, 2, 3)) <= high)).mean()
    if inside > 0.5 or inside ** len(narrow) > UNLIKELY:
        return
    recipe = f"value_range={{'{what}': {_pair(scale)}, 'training': {_pair(their_scale)}}}"
    raise InputError(
        f"{what} images ({images.source}) hold values from {ours[0]:.4g} to {ours[1]:.4g}, training images "
        f"({training.source}) from {theirs[0]:.4g} to {theirs[1]:.4g}: they are on different scales. Say what black "
        f"and white are: {recipe}"
    )


def scale_recipe(images: ImageSet) -> str:
    """The value_range that float images look to have, or a description of it."""
    scale = _scale(extremes(images.images))
    return f"value_range={_pair(scale)}" if scale is not None else "value_range= with the values of black and white"


def suspicions(images: ImageSet, training: ImageSet, about: Appearance) -> tuple[str, ...]:
    """What speaks against relying on an audit of `images`, one sentence each. about: the training images' figures."""
    ours, found = Appearance.of(images.images), []
    total = samples = len(images)
    odd = float(ours.constant.mean())
    if odd > max(ODD, 2 * about.constant.mean()):
        share = f"about {odd:.0%}" if total > SAMPLE else f"{int(ours.constant.sum()):,}"
        black = ", all of them black" if odd == 1 and not ours.means.any() else ""
        found.append(
            f"{share} of {total:,} images are of a single color{black}: the sampler may have failed, and says nothing "
            "about what the model remembers."
        )
    largest = _largest_class(images.images)
    if total > 1 and largest > total / 2 and len(training) > 3:
        found.append(
            f"{largest:,} of {total:,} images are identical: they are one sample, not {largest:,}, and the interval "
            "does not hold."
        )
        samples = 1
    # Relative to their contrast: on another scale images differ less, but look no more alike.
    elif (
        total > 3
        and odd < 0.5
        and ours.variety * about.contrasts.mean() < (HARDLY * about.variety * ours.contrasts.mean())
    ):
        found.append(
            f"most images hardly differ from each other ({ours.variety:.3g} rms, training images {about.variety:.3g}): "
            "they are about one sample, and the interval does not hold."
        )
        samples = 1
    if odd < 0.5:
        found += _scale_suspicions(images, training, ours, about, samples)
    return tuple(found)


def _scale_suspicions(
    images: ImageSet, training: ImageSet, ours: Appearance, about: Appearance, samples: int
) -> list[str]:
    way_out = "If they are on another scale, bring both to the same one (value_range=)."
    found = []
    if about.contrasts.mean() > 0 and _clearly_apart(ours.contrasts, about.contrasts, samples):
        ratio = ours.contrasts.mean() / about.contrasts.mean()
        if not CONTRAST < ratio < 1 / CONTRAST:
            found.append(f"the images have {ratio:.2g} times the contrast of the training images. {way_out}")
    shift = ours.means.mean() - about.means.mean()
    if not found and abs(shift) > BRIGHTNESS * about.deviation and _clearly_apart(ours.means, about.means, samples):
        direction = "brighter" if shift > 0 else "darker"
        found.append(
            f"the images are {direction} than the training images by {abs(shift):.3g} on average "
            f"({ours.means.mean():.3g} against {about.means.mean():.3g}). {way_out}"
        )
    if not found and images.images.dtype != np.uint8:
        low, high = extremes(training.images)
        slack = 0.1 * (high - low)
        some = _sampled(images.images)
        outside = float(((some < low - slack) | (some > high + slack)).mean())
        if outside > 0.01:
            found.append(
                f"{outside:.0%} of the values lie well outside those of the training images ({low:.4g} to {high:.4g}). "
                f"{way_out}"
            )
    return found


def _clearly_apart(ours: np.ndarray, theirs: np.ndarray, samples: int) -> bool:
    """Whether the means of per-image figures differ by more than so few independent samples would make them."""
    return abs(ours.mean() - theirs.mean()) > STANDARD_ERRORS * theirs.std() / np.sqrt(samples)


def _sampled(images: np.ndarray) -> np.ndarray:
    step = math.ceil(math.sqrt(images[0, 0].size / SAMPLE_PIXELS))
    rows = np.linspace(0, len(images) - 1, min(len(images), SAMPLE)).astype(np.int64)
    return images[rows, :, ::step, ::step]


def _scale(values: tuple[float, float]) -> tuple[float, float] | None:
    """The usual scale that values from low to high are on, the narrowest that holds them, or None."""
    for scale, (low, high) in SCALES.items():
        if low <= values[0] and values[1] <= high and (scale[1] == 1 or values[1] >= DARKEST):
            return scale
    return None


def _pair(scale: tuple[float, float]) -> str:
    return f"({scale[0]:g}, {scale[1]:g})"


def _largest_class(images: np.ndarray) -> int:
    """How many images the largest class of identical ones has."""
    counts: dict[bytes, int] = {}
    for image in images:
        key = hashlib.sha256(np.ascontiguousarray(image).data).digest()
        counts[key] = counts.get(key, 0) + 1
    return max(counts.values())
