"""Copies that the rule does not see, since the training set holds their image in versions that are nearly the same.

Where a training image is stored twice with different compression, a copy of it has d1 ≈ d2, and no two training images
are identical. So each image that is not a copy is looked at again. Let y_1, y_2, … be its nearest training images at
distances d_1 ≤ d_2 ≤ …, and t ≤ 1/2 the threshold. It is a hidden copy where for some j > 2

    d_1 < t · d_j    and    ‖y_1 − y_i‖ < d_j / 2  for all i < j:

it would be a copy were y_2 … y_(j−1) not there, and these are near y_1. With a duplicate radius of at least the largest
‖y_1 − y_i‖ the rule counts it, since ‖y_1 − y_j‖ ≥ d_j − d_1 > d_j / 2 lies beyond that radius.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from diffmem.memorization.criteria import ratio_rule
from diffmem.search import DistinctNeighbors, Neighbors


def hidden_copies(radii: np.ndarray) -> tuple[str, ...]:
    """A warning that names how many hidden copies there are and the duplicate radius that counts them, or none.

    Args:
        radii: float64 [Q], of all images audited (see `hidden_radii`).
    """
    hidden = np.isfinite(radii)
    if not hidden.any():
        return ()
    # A few smooth images must not decide the radius: too wide a one makes copies of images that are none.
    radius = _rounded_up(min(radii[hidden].max(), 2 * np.median(radii[hidden])))
    count = int(hidden.sum())
    counted = "them" if (radii[hidden] <= radius).all() else f"{int((radii[hidden] <= radius).sum()):,} of them"
    those = "1 more image is a copy" if count == 1 else f"{count:,} more images are copies"
    return (
        f"{those} of training images that the set holds in several versions, up to {radii[hidden].max():.3g} (rms) "
        f"apart, which hides them from the rule. Count {counted} with duplicate_radius={radius:g}; use a holdout set "
        "to check what else that counts.",
    )


def hidden_radii(
    search: DistinctNeighbors, nearest: Neighbors, memorized: np.ndarray, threshold: Fraction
) -> np.ndarray:
    """float64 [Q]: for each hidden copy the least duplicate radius (rms) with which the rule counts it, else NaN.

    Args:
        search: Search over the training images.
        nearest: The nearest training images of each image, duplicates counted as neighbors.
        memorized: bool [Q], by the rule.
        threshold: On d1/d2.
    """
    squared, k = nearest.squared_distances, nearest.squared_distances.shape[1]
    radii = np.full(len(squared), np.nan)
    if k < 3 or threshold > Fraction(1, 2):
        return radii
    rows = np.flatnonzero(~memorized & ratio_rule(squared[:, [0, -1]], threshold))
    firsts = np.repeat(nearest.indices[rows, 0], k)
    apart = search.squared_distances(firsts, nearest.indices[rows].reshape(-1)).reshape(len(rows), k)
    widest = np.maximum.accumulate(apart, axis=1)
    for j in range(2, k):
        beside = squared[rows, j]
        found = ratio_rule(np.stack([squared[rows, 0], beside], 1), threshold)
        found &= (4 * widest[:, j - 1] < beside) & np.isnan(radii[rows])
        radii[rows[found]] = np.sqrt(widest[found, j - 1] / nearest.dimension)
    return radii


def _rounded_up(value: float) -> float:
    """To two significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit * (1 + 1e-12)) * unit:.2g}")
