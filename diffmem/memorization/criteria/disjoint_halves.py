"""Disjoint halves (Kadkhodaie et al. 2024): do models trained on disjoint halves draw the same from one latent?

Formula. Images less their own mean (over all values): with x_i and x'_i from the same latent i of both models,

    disjoint_halves          = mean of cos(x_i − mean, x'_i − mean)
    disjoint_halves_training = mean over i of the larger of both models' cosines with their nearest training image

nearest by that cosine. A model that generalizes has the first near 1 and the second below it; one that memorizes has
the first low and the second near 1. An image of one value throughout has no direction: it counts as cosine 0.

Source: Kadkhodaie et al., Generalization in Diffusion Models Arises from Geometry-Adaptive Harmonic Representations
(ICLR 2024), figure 2.

What it cannot see: copying of images that both halves hold, which it takes for generalization: look for duplicates
first.
"""

from __future__ import annotations

import numpy as np

from diffmem.errors import InputError
from diffmem.memorization.criteria.comparison import BLOCK_VALUES, Comparison, Points, Searches
from diffmem.memorization.criteria.criterion import Criterion, Measured, Value


def mean_free(values: np.ndarray) -> np.ndarray:
    """float32 [n, d]: each row less its mean."""
    rows = values.reshape(len(values), -1)
    out = np.empty(rows.shape, np.float32)
    step = max(1, BLOCK_VALUES // rows.shape[1])
    for start in range(0, len(rows), step):
        block = rows[start : start + step].astype(np.float64)
        out[start : start + step] = block - block.mean(axis=1, keepdims=True)
    return out


def pair_cosines(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """float64 [n]: the cosine of some[i] and others[i], less their means; 0 for images of one value."""
    found = np.empty(len(some))
    for row, (x, y) in enumerate(zip(some, others, strict=True)):
        x, y = (np.asarray(each, np.float64).ravel() for each in (x, y))
        x, y = x - x.mean(), y - y.mean()
        lengths = np.sqrt((x @ x) * (y @ y))
        found[row] = x @ y / lengths if lengths > 0 else 0.0
    return found


def measure(comparison: Comparison) -> Measured:
    """`disjoint_halves` and `disjoint_halves_training`."""
    generated, second = comparison.generated, comparison.second
    if len(generated) != len(second):
        raise InputError(
            f"second: {len(second):,} images, generated: {len(generated):,}: both models draw one image per latent"
        )
    between = pair_cosines(generated.values, second.values)
    searches = Searches(comparison.searches.device, comparison.searches.progress)
    to_training = []
    for images, training in (
        (generated, comparison.training),
        (second, comparison.second_training or comparison.training),
    ):
        free = Points(mean_free(images.values), images.what), Points(mean_free(training.values), training.what)
        to_training.append(np.nan_to_num(searches.largest_cosine(*free), nan=0.0))
    nearest = np.maximum(*to_training)
    names = "disjoint_halves", "disjoint_halves_training"
    return Measured(
        {name: float(each.mean()) for name, each in zip(names, (between, nearest), strict=True)},
        dict(zip(names, (between, nearest), strict=True)),
        {name: name for name in names},
    )


DISJOINT_HALVES = Criterion(
    name="disjoint_halves",
    formula="mean cosine of the mean-free images of two models from the same latents, and with their training images",
    source="Kadkhodaie et al. 2024, arXiv 2310.02557",
    values={
        "disjoint_halves": Value("between the two models", "higher"),
        "disjoint_halves_training": Value("with the nearest training image", "lower"),
    },
    measure=measure,
    blind="copies of images that both training sets hold, which count as generalization",
    needs=("second",),
)
