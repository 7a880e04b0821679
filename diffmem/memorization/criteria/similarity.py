"""Similarity (Somepalli et al. 2023, DCR): the cosine with the most similar training image.

Formula. s(x) = max over training images y of ⟨x, y⟩ / (‖x‖ ‖y‖); `top1_similarity` is its mean, `top1_similarity_p95`
its 95th percentile, `top1_similarity_above_0.5` and `_above_0.75` the shares above those, strictly. The background is
the same of training images with the others (without themselves): `top1_similarity_background`, over at most 2,000
training images, evenly spaced.

Source: Somepalli et al., Diffusion Art or Digital Forgery? (CVPR 2023) and its code, on SSCD vectors, with 0.5; Pizzi
et al. 2022 give 0.75 (90 % precision on DISC). Vectors are taken as they are, not centered: all pixels are positive, so
that their cosines are high for images that have nothing in common but brightness. Vectors of zeros have no direction:
they count as similarity 0 where they are generated ones, and are left out of the training set.

What it cannot see: on pixels, copies that are moved or mirrored; on any features, brightness and contrast (a vector's
length); and thresholds do not travel between data sets: the background and the holdout set say what a value means.
"""

from __future__ import annotations

import numpy as np

from diffmem.errors import InputError
from diffmem.memorization.criteria.comparison import Comparison, spread_places
from diffmem.memorization.criteria.criterion import Criterion, Measured, Value

BACKGROUND = 2000  # training images
THRESHOLDS = (0.5, 0.75)


def measure(comparison: Comparison) -> Measured:
    """`top1_similarity` and what lies around it."""
    training, searches = comparison.training, comparison.searches
    similarities = np.nan_to_num(searches.largest_cosine(comparison.generated, training), nan=0.0)
    values = {
        "top1_similarity": float(similarities.mean()),
        "top1_similarity_p95": float(np.percentile(similarities, 95)),
    }
    per_image = {"top1_similarity": similarities}
    means = {"top1_similarity": "top1_similarity"}
    for threshold in THRESHOLDS:
        name = f"top1_similarity_above_{threshold}"
        per_image[name] = similarities > threshold
        values[name], means[name] = float(per_image[name].mean()), name
    notes: tuple[str, ...] = ()
    try:
        sample = spread_places(len(training), BACKGROUND)
        background = searches.largest_cosine(training, training, places=sample)
        values["top1_similarity_background"] = float(np.nan_to_num(background, nan=0.0).mean())
    except InputError as error:  # a single training image
        values["top1_similarity_background"], notes = float("nan"), (str(error),)
    return Measured(values, per_image, means, notes=notes)


TOP1_SIMILARITY = Criterion(
    name="top1_similarity",
    formula="largest cosine with a training image",
    source="Somepalli et al. 2023, arXiv 2212.03860; Pizzi et al. 2022 (SSCD)",
    values={
        "top1_similarity": Value("mean", "lower"),
        "top1_similarity_p95": Value("95th percentile", "lower"),
        "top1_similarity_above_0.5": Value("share above 0.5", "lower", True),
        "top1_similarity_above_0.75": Value("share above 0.75", "lower", True),
        "top1_similarity_background": Value("mean over training images, against the other training images", "neither"),
    },
    measure=measure,
    blind="on pixels, shifted copies; brightness and contrast; no threshold transfers between data sets",
)
