"""Precision, recall, density, coverage: the other side of the trade-off, whether the images are good and diverse.

Formulas. B(x) = the ball around x that reaches to its k-th nearest other image of its own set (k = 5);

    precision = share of generated images in the ball of some training image
    recall    = share of training images in the ball of some generated image
    density   = mean over generated images of (number of training images' balls it is in) / k
    coverage  = share of training images with a generated image in their ball

All strict: an image on the edge of a ball is outside, so that balls of radius 0 (k duplicates) hold nothing. Of each
set at most 10,000 images are taken, evenly spaced, as dgm-eval takes 10,000: the values depend on both numbers.

Source: Kynkäänniemi et al. 2019 (precision, recall) and Naeem et al., Reliable Fidelity and Diversity Metrics for
Generative Models (ICML 2020), whose code `prdc` this equals. The interval of recall and coverage treats training images
as drawn independently.

What they cannot see: copying. A generator that returns training images has precision, recall and coverage of a perfect
one, and more density: a high value of these beside a sign of copying means copying, not quality.
"""

from __future__ import annotations

import numpy as np

from diffmem.errors import InputError
from diffmem.lazy import torch
from diffmem.memorization.criteria.comparison import Comparison, Points, Searches
from diffmem.memorization.criteria.criterion import Criterion, Measured, Value
from diffmem.memorization.statistics import wilson_interval
from diffmem.search.balls import count_in_balls

K = 5
SAMPLE = 10_000


def squared_radii(points: Points, searches: Searches, k: int = K) -> np.ndarray:
    """[n]: the squared distance of each point to its k-th nearest other one."""
    return searches.nearest(points, points, k).squared_distances[:, k - 1]


def measure(comparison: Comparison) -> Measured:
    """`precision`, `recall`, `density` and `coverage`."""
    sample = comparison.setting("precision_recall", "sample", SAMPLE)
    k = comparison.setting("precision_recall", "k", K)
    searches = comparison.searches
    training, generated = comparison.training.spread(sample), comparison.generated.spread(sample)
    for points in (training, generated):
        if len(points) <= k:
            raise InputError(f"{points.what}: precision and recall need more than {k} images")
    real, ours = squared_radii(training, searches, k), squared_radii(generated, searches, k)
    found = count_in_balls(
        searches.index(training),
        training.rows,
        generated.rows,
        torch.from_numpy(real),
        torch.from_numpy(ours),
        progress=searches.progress,
    )
    precise, recalled, covered = found.of_queries > 0, found.in_queries > 0, found.of_rows > 0
    density = found.of_queries / k
    whole = len(generated) == len(comparison.generated)
    return Measured(
        {
            "precision": float(precise.mean()),
            "recall": float(recalled.mean()),
            "density": float(density.mean()),
            "coverage": float(covered.mean()),
        },
        {"precision": precise, "density": density} if whole else {},
        {"precision": "precision", "density": "density"} if whole else {},
        {
            "recall": wilson_interval(int(recalled.sum()), len(recalled)),
            "coverage": wilson_interval(int(covered.sum()), len(covered)),
            **({} if whole else {"precision": wilson_interval(int(precise.sum()), len(precise))}),
        },
        () if whole else (f"precision, recall, density and coverage are of {len(generated):,} generated images.",),
    )


PRECISION_RECALL = Criterion(
    name="precision_recall",
    formula="overlap of balls that reach to the 5th nearest image of the same set",
    source="Kynkäänniemi et al. 2019; Naeem et al. 2020, arXiv 2002.09797",
    values={
        "precision": Value("generated images in a training image's ball", "neither", True),
        "recall": Value("training images in a generated image's ball", "neither", True),
        "density": Value("training images' balls around a generated image, / 5", "neither"),
        "coverage": Value("training images with a generated image in their ball", "neither", True),
    },
    measure=measure,
    blind="copying: a generator that returns training images scores as a perfect one",
)
