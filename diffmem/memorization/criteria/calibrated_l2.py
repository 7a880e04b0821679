"""Calibrated L2 (Carlini et al. 2023): how near the nearest training image is beside those around it.

Formula. With d1 ≤ … ≤ dn the distances of a generated image to its n nearest training images, n = 50 and α = 1/2,

    calibrated L2 = d1 / (α · mean(d1 … dn)),

and an image is extracted where that is below 1, strictly.

Source: Carlini et al., Extracting Training Data from Diffusion Models (arXiv 2301.13188), section 4.3. The paper's
distances are root mean square per value; the quotient does not depend on that. The mean runs over the n nearest *of the
generated image*, the nearest included; with fewer than n training images, over all. Where all n distances are 0 the
quotient is 0: an exact copy. Ties do not matter.

What it cannot see: a copy of an image that the training set holds n times or more often, in nearly equal versions: all
n distances are alike then.
"""

from __future__ import annotations

import numpy as np

from diffmem.memorization.criteria.comparison import Comparison
from diffmem.memorization.criteria.criterion import Criterion, Measured, Value

NEAREST = 50
ALPHA = 0.5


def calibrated_l2(distances: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """float64 [Q]: calibrated L2 from the distances [Q, n] to the nearest training images, nearest first."""
    scale = alpha * distances.mean(axis=1)
    return np.divide(distances[:, 0], scale, out=np.zeros(len(distances)), where=scale > 0)


def measure(comparison: Comparison) -> Measured:
    """`calibrated_l2`, the share below 1, and `calibrated_l2_mean`."""
    alpha = comparison.setting("calibrated_l2", "alpha", ALPHA)
    scores = calibrated_l2(comparison.nearest(comparison.setting("calibrated_l2", "n", NEAREST)).distances, alpha)
    below = scores < 1
    return Measured(
        {"calibrated_l2": float(below.mean()), "calibrated_l2_mean": float(scores.mean())},
        {"calibrated_l2": scores, "calibrated_l2_below_1": below},
        {"calibrated_l2": "calibrated_l2_below_1", "calibrated_l2_mean": "calibrated_l2"},
    )


CALIBRATED_L2 = Criterion(
    name="calibrated_l2",
    formula="d1 / (0.5 · mean distance to the 50 nearest training images) < 1",
    source="Carlini et al. 2023, arXiv 2301.13188",
    values={
        "calibrated_l2": Value("share of images below 1", "lower", True),
        "calibrated_l2_mean": Value("mean", "higher"),
    },
    measure=measure,
    decides=("calibrated_l2_below_1", True),
    blind="copies of images that the training set holds in 50 nearly equal versions",
    neighbors=NEAREST,
)
