"""M3 (2026): nearer to a real image than half of the real images are to each other.

Formula. Memorized where the distance to the nearest training image is below the median, over training images, of the
distance to the nearest other training image. Strict; the median of an even number of distances is the mean of the
middle two. Duplicates count at distance 0. Over more than 10,000 training images the median is that of 10,000 of them,
evenly spaced, each held against all others (its standard error is about 0.6 percentiles).

What it cannot see: the threshold is one for all images, so that images of few details (a flat sky) are memorized by it
without being copies, and near copies of images with many details are not; in a training set half of whose images have a
duplicate the median is 0, and nothing is memorized. Half of honest images are below it, by its making, where training
images are no nearer to each other than unseen ones to them.
"""

from __future__ import annotations

import numpy as np

from diffmem.errors import InputError
from diffmem.memorization.criteria.comparison import Comparison, spread_places
from diffmem.memorization.criteria.criterion import Criterion, Measured, Value

SAMPLE = 10_000


def measure(comparison: Comparison) -> Measured:
    """`m3` and the median that it holds distances against."""
    training = comparison.training
    if len(training) < 2:
        raise InputError("training: M3 needs at least two training images")
    places = spread_places(len(training), SAMPLE)
    median = float(np.median(np.sqrt(comparison.searches.nearest_other(training, places).astype(np.float64))))
    below = comparison.nearest(1).distances[:, 0] < median
    return Measured({"m3": float(below.mean()), "m3_median": median}, {"m3": below}, {"m3": "m3"})


M3 = Criterion(
    name="m3",
    formula="share with d(nearest training image) < median over training images of d(nearest other training image)",
    source="M3, 2026",
    values={
        "m3": Value("share of images below the median", "lower", True),
        "m3_median": Value("the median real–real distance", "neither"),
    },
    measure=measure,
    decides=("m3", True),
    blind="near copies of detailed images; half of unseen images count as memorized",
)
