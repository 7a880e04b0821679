"""How often a verdict is wrong: thresholds, p-values and false discoveries from images that are not copies.

A holdout set of n real images, which the model has not seen, says what scores images have that are not copies. Where
such an image and those of the holdout set are exchangeable, the conformal p-value

    p = (1 + #{holdout scores ≤ s}) / (n + 1)

of its score s (lower = more like a copy) is at most α with probability at most α, for every α, every score and every n,
ties included (Vovk 2005). So "p ≤ α" is wrong of at most the share α of images that are not copies; it is the threshold
s < s_(k), k = ⌊α (n + 1)⌋, on the k-th lowest holdout score, and needs n ≥ 1/α − 1 images. Over a batch, Benjamini and
Hochberg's step-up keeps the expected share of false ones among all that are called copies: these p-values share their
holdout set, and are positively dependent in the way that it allows (Bates et al. 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from diffmem.errors import InputError
from diffmem.memorization.statistics import beta_interval

ALARMS = 0.01  # share of alarms where none is asked for


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the scores of a holdout set say about others.

    Attributes:
        scores: float64 [n], those of the holdout images, ascending; lower = more like a copy.
        alarms: α, the share of images that are not copies about which the verdict may be wrong.

    Raises:
        InputError: α lies outside (0, 1), a score is NaN, or there are too few images for α.

    Example:
        >>> calibration = Calibration(np.arange(99.0), alarms=0.05)
        >>> calibration.threshold, calibration.p_values(np.array([-1.0, 3.5, 1000])).tolist()
        (4.0, [0.01, 0.05, 1.0])
    """

    scores: np.ndarray
    alarms: float = ALARMS

    def __post_init__(self) -> None:
        check_alarms(self.alarms)
        scores = np.sort(np.asarray(self.scores, np.float64).ravel())
        if np.isnan(scores).any():
            raise InputError(f"holdout: {int(np.isnan(scores).sum()):,} of {len(scores):,} scores are NaN")
        object.__setattr__(self, "scores", scores)
        if self.rank < 1:
            raise InputError(
                f"holdout: {len(scores):,} unseen images are too few for alarms={self.alarms:g}: give "
                f"{images_needed(self.alarms):,} or more, or raise it to alarms={smallest_alarms(len(scores))}"
            )

    @property
    def total(self) -> int:
        """n, how many holdout images there are."""
        return len(self.scores)

    @cached_property
    def rank(self) -> int:
        """k = ⌊α (n + 1)⌋, exactly, of α as it is written (0.01, not its nearest binary fraction)."""
        return math.floor(_exact(self.alarms) * (len(self.scores) + 1))

    @property
    def threshold(self) -> float:
        """The score below which an image is a copy: p ≤ α just there."""
        return float(self.scores[self.rank - 1])

    @property
    def alarm_interval(self) -> tuple[float, float]:
        """Where the share of alarms that this very threshold raises lies, with 95 % confidence over the choice of the
        holdout set: it is at most Beta(k, n + 1 − k) distributed, with mean k/(n + 1) ≤ α (exactly so without ties).
        """
        return beta_interval(self.rank, len(self.scores) + 1 - self.rank)

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """float64 [Q], the p-value of each score."""
        return (1 + np.searchsorted(self.scores, scores, side="right")) / (len(self.scores) + 1)

    def copies(self, scores: np.ndarray) -> np.ndarray:
        """bool [Q], which scores belong to copies: p ≤ α, decided on the scores."""
        return np.asarray(scores) < self.threshold

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types, without the scores."""
        return {
            "alarms": self.alarms,
            "images": self.total,
            "threshold": self.threshold,
            "alarm_interval": list(self.alarm_interval),
        }


def check_alarms(alarms: float) -> None:
    """Raises InputError unless `alarms` is a share that can be asked for."""
    try:
        fits = 0 < float(alarms) < 1
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise InputError(f"alarms must be a share between 0 and 1, such as 0.01, got {alarms!r}")


def images_needed(alarms: float) -> int:
    """The least number of holdout images that can tell a share of alarms: ⌈1/α⌉ − 1."""
    return math.ceil(1 / _exact(alarms)) - 1


def smallest_alarms(images: int) -> str:
    """The least share of alarms that so many holdout images can tell, 1/(n + 1), rounded up to two digits."""
    exact = Fraction(1, images + 1)
    unit = Fraction(10) ** (math.floor(math.log10(float(exact))) - 1)
    return f"{float(math.ceil(exact / unit) * unit):.2g}"


def false_discovery_rates(p_values: np.ndarray) -> np.ndarray:
    """The q-value of each of a batch of p-values: the least false discovery rate at which it is among the discoveries
    of Benjamini and Hochberg (1995), min over j ≥ i of p_(j) · Q / j, at most 1.

    Args:
        p_values: float64 [Q].

    Returns:
        float64 [Q].

    Example:
        >>> false_discovery_rates(np.array([0.01, 0.5, 0.02])).tolist()
        [0.03, 0.5, 0.03]
    """
    count = len(p_values)
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, np.float64)[order] * count / np.arange(1, count + 1)
    q_values = np.empty(count)
    q_values[order] = np.minimum(np.minimum.accumulate(steps[::-1])[::-1], 1)
    return q_values


def _exact(share: float) -> Fraction:
    """The simplest fraction that a float stands for."""
    exact = Fraction(share)
    simple = exact.limit_denominator(10**6)
    return simple if float(simple) == float(share) else exact
