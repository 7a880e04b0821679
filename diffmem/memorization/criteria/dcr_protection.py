"""DCR overfitting protection (sdmetrics): are generated images nearer to the training images than to held-out ones?

Formula. p = share of generated images with d(nearest training image) < d(nearest held-out image), strictly (a tie
counts as nearer to the holdout set, as there); score = min(1, 2 (1 − p)). `dcr_closer_to_training` is p,
`dcr_protection` the
score: 1 means no copying, 0 copying throughout.

Source: sdmetrics, `DCROverfittingProtection`, with sets of one size. The larger set has the nearer image more often, so
with N training and H held-out images p is N / (N + H) for honest images: that is the value for honest images given
here. `dcr_balanced` takes as many training images as there are held-out ones, evenly spaced, so that 1/2 is honest: it
sees copies of these training images only.

What it cannot see: copies of images that the holdout set happens to hold too, and, balanced, of training images left
out.
"""

from __future__ import annotations

from collections.abc import Mapping

from diffmem.memorization.criteria.comparison import Comparison
from diffmem.memorization.criteria.criterion import Criterion, Measured, Value


def protection(closer: float) -> float:
    """The score from the share of images that are nearer to the training images."""
    return min(1.0, 2 * (1 - closer))


def measure(comparison: Comparison) -> Measured:
    """`dcr_protection`, `dcr_closer_to_training` and `dcr_balanced`."""
    generated, training, holdout = comparison.generated, comparison.training, comparison.holdout
    to_holdout = comparison.searches.nearest(generated, holdout, 1).squared_distances[:, 0]
    closer = comparison.nearest(1).squared_distances[:, 0] < to_holdout
    as_many = training.spread(len(holdout))
    to_some = comparison.nearest(1).squared_distances[:, 0]
    if as_many is not training:
        to_some = comparison.searches.nearest(generated, as_many, 1).squared_distances[:, 0]
    balanced = to_some < to_holdout
    p = float(closer.mean())
    return Measured(
        {"dcr_protection": protection(p), "dcr_closer_to_training": p, "dcr_balanced": float(balanced.mean())},
        {"closer_to_training": closer, "closer_to_training_balanced": balanced},
        {"dcr_closer_to_training": "closer_to_training", "dcr_balanced": "closer_to_training_balanced"},
    )


def honest(comparison: Comparison) -> Mapping[str, float]:
    """An image like those of both sets is nearer to one of them by the chance of their sizes."""
    n, h = len(comparison.training), len(comparison.holdout)
    p, balanced = n / (n + h), min(n, h) / (min(n, h) + h)
    return {"dcr_protection": protection(p), "dcr_closer_to_training": p, "dcr_balanced": balanced}


DCR_PROTECTION = Criterion(
    name="dcr_protection",
    formula="min(1, 2 (1 − p)), p = share with d(nearest training image) < d(nearest held-out image)",
    source="sdmetrics, DCROverfittingProtection",
    values={
        "dcr_protection": Value("1 means no copying", "higher"),
        "dcr_closer_to_training": Value("share nearer to the training images", "half", True),
        "dcr_balanced": Value("the same with as many training as held-out images", "half", True),
    },
    measure=measure,
    blind="copies of images that the holdout set also holds; depends on the sizes of the sets",
    needs=("holdout",),
    honest=honest,
)
