"""Ratio (Yoon et al. 2023; the paper): the share of images with d1 < d2 / 3.

Formula. d1, d2: Euclidean distances of a generated image to its nearest and second nearest training image; memorized
where d1/d2 < 1/3. `ratio` takes the second neighbor among the training images that are not identical to the first (what
`diffmem.audit` reports); `ratio_raw` leaves duplicates in (the paper's R_mem).

Source: Yoon et al., Diffusion Probabilistic Models Generalize when They Fail to Memorize (ICML 2023 workshop); Gu et
al., On Memorization in Diffusion Models (arXiv 2310.02664). Strict: d1/d2 equal to the threshold is not a copy; decided
in integers for uint8 images. d1 = 0 is a copy whatever d2 is; the code published with the paper has 0/0 there for an
exact copy of an image that the training set holds twice, and does not count it: `ratio:published`.

What it cannot see: copies that differ by more than a third of the distance between training images (shifted, mirrored,
recolored), and those of images that the training set holds in nearly equal versions; and its threshold is not one of
copying: as N grows, d2 shrinks, so that the same noisy copy may count at N = 300 and not at N = 50,000.

f_mem (Bonnaire et al. 2025): the same share by `ratio_raw`, with the standard deviation of 1,000 bootstrap samples of
the generated images.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from diffmem.errors import InputError
from diffmem.memorization.criteria.comparison import Comparison
from diffmem.memorization.criteria.criterion import Criterion, Measured, Value, Variant
from diffmem.memorization.criteria.exact_rule import parse_threshold, published_rule, ratio_rule
from diffmem.search import DistinctNeighbors, find_duplicates

BOOTSTRAPS = 1000


def _threshold(comparison: Comparison) -> Fraction:
    return parse_threshold(comparison.setting("ratio", "threshold", "1/3"))


def _two_nearest(comparison: Comparison) -> np.ndarray:
    if len(comparison.training) < 2:
        raise InputError("training: the rule needs at least two training images")
    return comparison.nearest(2).squared_distances


def measure(comparison: Comparison) -> Measured:
    """`ratio` and `ratio_raw`."""
    threshold, raw = _threshold(comparison), ratio_rule(_two_nearest(comparison), _threshold(comparison))
    training = comparison.training.values
    groups = find_duplicates(training, progress=comparison.searches.progress)
    if groups.distinct < 2:
        raise InputError("training: the rule needs at least two distinct training images")
    distinct = DistinctNeighbors(comparison.searches.index(comparison.training), training, groups)
    squared = distinct.outside_duplicates(comparison.generated.values, comparison.nearest(2)).squared_distances
    memorized = ratio_rule(squared, threshold)
    return Measured(
        {"ratio": float(memorized.mean()), "ratio_raw": float(raw.mean())},
        {"memorized": memorized, "raw_memorized": raw},
        {"ratio": "memorized", "ratio_raw": "raw_memorized"},
    )


def measure_published(comparison: Comparison) -> Measured:
    """`ratio:published`: as the code published with the paper counts."""
    memorized = published_rule(_two_nearest(comparison), _threshold(comparison))
    name = "ratio:published"
    return Measured({name: float(memorized.mean())}, {name: memorized}, {name: name})


def bootstrap_shares(hits: int, total: int, draws: int, seed: int) -> np.ndarray:
    """float64 [draws]: the share of hits in samples of `total` images drawn with replacement.

    The number of hits in such a sample is binomial, so it is drawn instead of the images.
    """
    return np.random.default_rng(seed).binomial(total, hits / total, draws) / total


def measure_f_mem(comparison: Comparison) -> Measured:
    """`f_mem` and its bootstrap error."""
    memorized = ratio_rule(_two_nearest(comparison), _threshold(comparison))
    draws = comparison.setting("f_mem", "bootstraps", BOOTSTRAPS)
    shares = bootstrap_shares(int(memorized.sum()), len(memorized), draws, comparison.seed)
    low, high = np.percentile(shares, [2.5, 97.5])
    values = {"f_mem": float(memorized.mean()), "f_mem_std": float(shares.std())}
    return Measured(values, intervals={"f_mem": (float(low), float(high))})


RATIO = Criterion(
    name="ratio",
    formula="share of images with d1 / d2 < 1/3, d1 and d2 to the two nearest training images",
    source="Yoon et al. 2023; Gu et al. 2023, arXiv 2310.02664",
    values={
        "ratio": Value("copies by the rule of the paper, duplicates of the nearest image excluded", "lower", True),
        "ratio_raw": Value("the same with duplicates as neighbors: the paper's R_mem", "lower", True),
    },
    measure=measure,
    decides=("memorized", True),
    blind="copies that are shifted, mirrored or recolored; its strictness grows with the training set",
    neighbors=2,
    variants={
        "published": Variant(
            Value("the same where d1 = d2 = 0, an exact copy of a duplicated image, does not count", "lower", True),
            measure_published,
            "the code published with arXiv 2310.02664",
        )
    },
)

F_MEM = Criterion(
    name="f_mem",
    formula="the ratio rule with duplicates as neighbors, over 1,000 bootstrap samples",
    source="Bonnaire et al. 2025, arXiv 2505.17638",
    values={
        "f_mem": Value("share of copies by the ratio rule", "lower", True),
        "f_mem_std": Value("its standard deviation over the bootstrap samples", "neither"),
    },
    measure=measure_f_mem,
    blind="what the ratio rule does not detect; the bootstrap covers the choice of latents, not that of the model",
    neighbors=2,
)
