"""Distance to the closest record and nearest-neighbor distance ratio: what privacy reports show of synthetic data.

Formulas. With d1 ≤ d2 the distances of a generated image to its two nearest training images: `nearest_distance` is the
mean of d1 (Euclidean, not divided by √values), `nearest_distance_min`, `_p5` and `_median` its least value, 5th
percentile (linear interpolation) and median; `distance_ratio` is the mean of d1/d2, taken as 0 where d1 = 0.

Sources: Zhao et al., CTAB-GAN (2021), and the reports of synthetic-data tools ("DCR", "NNDR"). Duplicates are left in,
so that a near copy of an image that the training set holds twice has a ratio of 1: `ratio` leaves them out.

What they cannot see: few copies among many images move neither a mean nor a median (hence the least value), and a
distance means nothing without that of honest images beside it.
"""

from __future__ import annotations

import numpy as np

from diffmem.errors import InputError
from diffmem.memorization.criteria.comparison import Comparison
from diffmem.memorization.criteria.criterion import Criterion, Measured, Value


def measure_distance(comparison: Comparison) -> Measured:
    """`nearest_distance` and its quantiles."""
    nearest = comparison.nearest(1)
    distances = nearest.distances[:, 0]
    values = {
        "nearest_distance": float(distances.mean()),
        "nearest_distance_min": float(distances.min()),
        "nearest_distance_p5": float(np.percentile(distances, 5)),
        "nearest_distance_median": float(np.median(distances)),
    }
    per_image = {"nearest_distance": distances, "nearest_index": nearest.indices[:, 0]}
    return Measured(values, per_image, {"nearest_distance": "nearest_distance"})


def measure_ratio(comparison: Comparison) -> Measured:
    """`distance_ratio`."""
    if len(comparison.training) < 2:
        raise InputError("training: a distance ratio needs at least two training images")
    ratios = comparison.nearest(2).distance_ratios
    name = "distance_ratio"
    return Measured({name: float(ratios.mean())}, {name: ratios}, {name: name})


NEAREST_DISTANCE = Criterion(
    name="nearest_distance",
    formula="d1, the Euclidean distance to the nearest training image (distance to the closest record)",
    source="Zhao et al. 2021 (CTAB-GAN); reports of synthetic-data tools",
    values={
        "nearest_distance": Value("mean", "higher"),
        "nearest_distance_min": Value("least", "higher"),
        "nearest_distance_p5": Value("5th percentile", "higher"),
        "nearest_distance_median": Value("median", "higher"),
    },
    measure=measure_distance,
    blind="few copies among many images: neither mean nor median move",
)

DISTANCE_RATIO = Criterion(
    name="distance_ratio",
    formula="mean of d1 / d2 (nearest-neighbor distance ratio)",
    source="Zhao et al. 2021 (CTAB-GAN); reports of synthetic-data tools",
    values={"distance_ratio": Value("mean d1/d2", "higher")},
    measure=measure_ratio,
    blind="copies of images that the training set holds twice: d1 and d2 are alike",
    neighbors=2,
)
