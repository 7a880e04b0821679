"""Does a verdict mean anything? Sets on different scales are refused, and images that look wrong are warned about.

The rule compares pixels. Where the generated images are black, nearly all the same, or on another scale than the
training images, it finds no copies and says so with a narrow interval. All that is checked here is relative to the
training set, on samples of both sets (`SetFigures`), which may come batch by batch.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from diffmem.data import ImageSet
from diffmem.data.value_range import extremes
from diffmem.errors import InputError

SAMPLE = 1024  # images looked at
SAMPLE_PIXELS = 2**14  # and at most that many pixels of each, evenly spaced
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ over the golden ratio
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
        values = images.astype(np.float64)
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


class SetFigures:
    """What is looked at of a set of images, which may come batch by batch: the figures depend on the images and their
    order alone, not on how they are divided.

    The sample holds the `SAMPLE` images i for which i times the golden ratio, modulo 1, is smallest: they are spread
    evenly over the set, however many follow, and in step with no period of it.

    Args:
        count_identical: Whether to count how often each image occurs, at about 100 bytes per different image.
    """

    def __init__(self, *, count_identical: bool = False) -> None:
        self.total = 0
        self.low, self.high = math.inf, -math.inf  # of floats
        self._rows = np.zeros(0, np.int64)
        self._sample: np.ndarray | None = None
        self._classes: dict[bytes, int] | None = {} if count_identical else None

    @classmethod
    def of(cls, images: np.ndarray, *, count_identical: bool = False) -> SetFigures:
        figures = cls(count_identical=count_identical)
        figures.add(images)
        return figures

    def add(self, images: np.ndarray) -> None:
        """Takes in further images [n, C, H, W] of one size and dtype."""
        if images.dtype != np.uint8:
            low, high = extremes(images)
            self.low, self.high = min(self.low, low), max(self.high, high)
        rows = np.concatenate([self._rows, np.arange(self.total, self.total + len(images))])
        if len(rows) > SAMPLE:
            order = np.argpartition(rows.astype(np.uint64) * GOLDEN, SAMPLE - 1)
            rows = np.sort(rows[order[:SAMPLE]])
        step = math.ceil(math.sqrt(images[0, 0].size / SAMPLE_PIXELS))
        new = images[rows[rows >= self.total] - self.total, :, ::step, ::step]
        if self._sample is None:
            self._sample = new
        else:
            kept = self._sample[np.searchsorted(self._rows, rows[rows < self.total])]
            self._sample = np.concatenate([kept, new])
        self._rows, self.total = rows, self.total + len(images)
        if self._classes is not None:
            for image in images:
                key = hashlib.sha256(np.ascontiguousarray(image).data).digest()
                self._classes[key] = self._classes.get(key, 0) + 1

    @property
    def sample(self) -> np.ndarray:
        """Up to `SAMPLE` of the images, in their order, thinned to `SAMPLE_PIXELS` pixels."""
        assert self._sample is not None
        return self._sample

    @property
    def dtype(self) -> np.dtype:
        return self._sample.dtype

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest value of float images."""
        return self.low, self.high

    @property
    def largest_class(self) -> int:
        """How many images the largest class of identical ones has."""
        return max(self._classes.values())

    @property
    def distinct(self) -> int:
        """How many classes of identical images there are."""
        return len(self._classes)

    @cached_property
    def appearance(self) -> Appearance:
        """Of the sample, once all images are there."""
        return Appearance.of(self._sample)


def check_scale(
    images: SetFigures, training: SetFigures, what: str, sources: tuple[str, str], copies: float = 0.0
) -> None:
    """Refuses sets of floats that look to be on different scales.

    Args:
        images: Figures of the images audited.
        training: Figures of the training images.
        what: "generated" or "holdout".
        sources: Where images and training images came from.
        copies: The share of the images that the rule calls copies; where there are some, [0, 1] is a part of [-1, 1].

    Raises:
        InputError: The images look to be on another of the usual scales than the training images.
    """
    if images.dtype == np.uint8:
        return
    ours, theirs = images.extremes, training.extremes
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
    some = wide.sample
    inside = ((some.min(axis=(1, 2, 3)) >= low) & (some.max(axis=(1, 2, 3)) <= high)).mean()
    if inside > 0.5 or inside**narrow.total > UNLIKELY:
        return
    recipe = f"value_range={{'{what}': {_pair(scale)}, 'training': {_pair(their_scale)}}}"
    raise InputError(
        f"{what} images ({sources[0]}) hold values from {ours[0]:.4g} to {ours[1]:.4g}, training images "
        f"({sources[1]}) from {theirs[0]:.4g} to {theirs[1]:.4g}: they are on different scales. Give the values of "
        f"black and white: {recipe}"
    )


def scale_recipe(images: ImageSet) -> str:
    """The value_range that float images look to have, or a description of it."""
    scale = _scale(extremes(images.images))
    return f"value_range={_pair(scale)}" if scale is not None else "value_range= with the values of black and white"


@dataclass(frozen=True)
class Collapse:
    """How much samples are one and the same: of `total` images the share of a single color, whether all are black, the
    size of the largest class of identical images, and how many classes there are."""

    total: int
    constant: float
    black: bool
    largest: int
    distinct: int

    def suspicions(self, training_size: int, training_constant: float) -> list[str]:
        """What speaks against relying on a verdict about these images. training_constant: share of training images of a
        single color."""
        found, total = [], self.total
        if self.constant > max(ODD, 2 * training_constant):
            share = f"about {self.constant:.0%}" if total > SAMPLE else f"{round(self.constant * total):,}"
            found.append(
                f"{share} of {total:,} images are of a single color{', all of them black' if self.black else ''}: the "
                "sampler may have failed, and the share of copies says nothing about memorization."
            )
        if (samples := self.independent(training_size)) < total:
            identical = (
                f"{self.largest:,} of {total:,} images are identical: they count as one sample, not {self.largest:,}"
            )
            few = (
                f"only {self.distinct:,} of {total:,} images are distinct: they are {samples:,} samples, not {total:,}"
            )
            found.append(f"{identical if samples == 1 else few}, and the interval does not hold.")
        return found

    def independent(self, training_size: int) -> int:
        """How many samples they count as: `total` where identical ones are to be expected, as copies of the same
        training images."""
        if self.total > 1 and self.largest > self.total / 2 and training_size > 3:
            return 1
        # So many different ones are to be expected of copies, each of any of the training images.
        expected = training_size * -math.expm1(self.total * math.log1p(-1 / max(2, training_size)))
        return self.distinct if self.total > 3 and self.distinct < expected / 2 else self.total


def suspicions(images: SetFigures, training: SetFigures) -> tuple[str, ...]:
    """What speaks against relying on an audit of `images` against `training`, one sentence each."""
    ours, about = Appearance.of(images.sample), training.appearance
    total = samples = images.total
    odd = float(ours.constant.mean())
    collapse = Collapse(total, odd, odd == 1 and not ours.means.any(), images.largest_class, images.distinct)
    found = collapse.suspicions(training.total, float(about.constant.mean()))
    if (independent := collapse.independent(training.total)) < total:
        samples = independent
    # Relative to their contrast: on another scale images differ less, but look no more alike.
    elif (
        total > 3
        and odd < 0.5
        and ours.variety * about.contrasts.mean() < (HARDLY * about.variety * ours.contrasts.mean())
    ):
        found.append(
            f"most images hardly differ from each other ({ours.variety:.3g} rms, training images {about.variety:.3g}): "
            "they count as about one sample, and the interval does not hold."
        )
        samples = 1
    if odd < 0.5:
        found += _scale_suspicions(images, training, ours, samples)
    return tuple(found)


def _scale_suspicions(images: SetFigures, training: SetFigures, ours: Appearance, samples: int) -> list[str]:
    about = training.appearance
    way_out = "If they are on another scale, convert both to the same one (value_range=)."
    if images.dtype == np.uint8:
        way_out = "If they were converted from floats, check that black became 0 and white 255."
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
    if not found and images.dtype != np.uint8:
        low, high = training.extremes
        slack = 0.1 * (high - low)
        some = images.sample
        outside = float(((some < low - slack) | (some > high + slack)).mean())
        if outside > 0.01:
            found.append(
                f"{outside:.0%} of the values are well outside those of the training images ({low:.4g} to {high:.4g}). "
                f"{way_out}"
            )
    return found


def single_color_share(images: np.ndarray) -> float:
    """The share of a sample of `images` that are of a single color."""
    return float(Appearance.of(images).constant.mean())


def _clearly_apart(ours: np.ndarray, theirs: np.ndarray, samples: int) -> bool:
    """Whether the means of per-image figures differ by more than so few independent samples would make them."""
    return abs(ours.mean() - theirs.mean()) > STANDARD_ERRORS * theirs.std() / np.sqrt(samples)


def _scale(values: tuple[float, float]) -> tuple[float, float] | None:
    """The usual scale that values from low to high are on, the narrowest that holds them, or None."""
    for scale, (low, high) in SCALES.items():
        if low <= values[0] and values[1] <= high and (scale[1] == 1 or values[1] >= DARKEST):
            return scale
    return None


def _pair(scale: tuple[float, float]) -> str:
    return f"({scale[0]:g}, {scale[1]:g})"
