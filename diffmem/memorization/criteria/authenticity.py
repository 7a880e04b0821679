"""Authenticity (Alaa et al. 2022): is a generated image farther from its nearest real image than that is from others?

Formula. r = the training image nearest to the generated image g, r' the training image nearest to r, not itself:

    g is authentic  iff  d(r, r') < d(r, g),    authenticity = share of authentic images, 0 to 1.

Strict: a tie is not authentic. Nearest images by (distance, lower index). r' may be a duplicate of r, at distance 0:
then every g that is not equal to r is authentic. Decided in integers for uint8 images.

Variants, by their full names:

- `authenticity:dgm-eval` (Stein et al. 2023, `compute_authpct`): 100 times the share; its code uses float32 distances,
  which decide ties and near ties by rounding.
- `authenticity:fld` (Jiralerspong et al. 2023, `AuthPct`): 100 times the share minus 50, over at most 10,000 training
  and 10,000 generated images. Its code draws them at random; here they are evenly spaced, so that the value is
  reproducible and the same where neither set is larger.
- `authenticity:alaa` (the code of Alaa et al., also in synthcity): one decision per *real* image. With s(i) the
  generated image nearest to real image i, real image i counts where d(real s(i), its nearest other) < d(i, generated
  s(i)): the real distances are indexed by the number of the synthetic image, as published. It needs at least as many
  real images as the numbers of generated ones that occur.

What it cannot see: copies in dense regions (d(r, r') is small there, so that a near copy is authentic) and copies of
images that the training set holds twice (d(r, r') = 0). A model that draws the mean of two training images is
authentic.
"""

from __future__ import annotations

import numpy as np

from diffmem.errors import InputError
from diffmem.memorization.criteria.comparison import Comparison
from diffmem.memorization.criteria.criterion import Criterion, Measured, Value, Variant

FLD_SAMPLE = 10_000


def authentic(to_nearest: np.ndarray, of_nearest: np.ndarray) -> np.ndarray:
    """bool [Q]: whether d(r, r') < d(r, g), from squared distances g to r and r to r' [Q]."""
    return of_nearest < to_nearest


def _decide(comparison: Comparison) -> np.ndarray:
    if len(comparison.training) < 2:
        raise InputError("training: authenticity needs at least two training images")
    nearest = comparison.nearest(1)
    of_nearest = comparison.searches.nearest_other(comparison.training, nearest.indices[:, 0])
    return authentic(nearest.squared_distances[:, 0], of_nearest)


def measure(comparison: Comparison) -> Measured:
    """`authenticity`, per generated image."""
    decided = _decide(comparison)
    return Measured({"authenticity": float(decided.mean())}, {"authentic": decided}, {"authenticity": "authentic"})


def measure_dgm_eval(comparison: Comparison) -> Measured:
    """`authenticity:dgm-eval`: 0 to 100."""
    return Measured({"authenticity:dgm-eval": 100 * float(_decide(comparison).mean())})


def measure_fld(comparison: Comparison) -> Measured:
    """`authenticity:fld`: -50 to 50."""
    training, generated = comparison.training.spread(FLD_SAMPLE), comparison.generated.spread(FLD_SAMPLE)
    if len(training) < 2:
        raise InputError("training: authenticity needs at least two training images")
    nearest = comparison.searches.nearest(generated, training, 1)
    of_nearest = comparison.searches.nearest_other(training, nearest.indices[:, 0])
    share = authentic(nearest.squared_distances[:, 0], of_nearest).mean()
    return Measured({"authenticity:fld": 100 * float(share) - 50})


def measure_alaa(comparison: Comparison) -> Measured:
    """`authenticity:alaa`: per real image."""
    training = comparison.training
    if len(training) < 2:
        raise InputError("training: authenticity needs at least two training images")
    nearest = comparison.searches.nearest(training, comparison.generated, 1)
    synthetic = nearest.indices[:, 0]
    if synthetic.max() >= len(training):
        raise InputError(
            f"generated: authenticity:alaa uses {synthetic.max():,}, the index of a generated image, as the index of a "
            f"training image, as the published code does, but there are only {len(training):,}: give at most as many "
            "generated images as training images"
        )
    of_real = comparison.searches.nearest_other(training, synthetic)
    share = authentic(nearest.squared_distances[:, 0], of_real).mean()
    return Measured({"authenticity:alaa": float(share)})


AUTHENTICITY = Criterion(
    name="authenticity",
    formula="share of images g with d(r, nearest other training image) < d(r, g), r the training image nearest to g",
    source="Alaa et al. 2022, arXiv 2102.08921; per generated image as in dgm-eval (Stein et al. 2023)",
    values={"authenticity": Value("share of authentic images", "higher", True)},
    measure=measure,
    decides=("authentic", False),
    blind="near copies in dense regions, and copies of images that the training set holds twice",
    variants={
        "dgm-eval": Variant(Value("the same times 100", "higher"), measure_dgm_eval, "dgm-eval (Stein et al. 2023)"),
        "fld": Variant(
            Value("the same times 100, minus 50, of at most 10,000 images each", "higher"),
            measure_fld,
            "fld (Jiralerspong et al. 2023)",
        ),
        "alaa": Variant(
            Value("share per real image, real distances indexed by synthetic images", "higher", True),
            measure_alaa,
            "the code of Alaa et al. 2022",
        ),
    },
)
