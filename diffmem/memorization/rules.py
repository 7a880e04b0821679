"""When an image is a copy: by the ratio of distances, by a similarity, or by what a holdout set says.

Every rule has a score, lower = more like a copy:

- "ratio": d1/d2, the distances to the nearest and the second nearest training image (Yoon et al. 2023, the paper); of
  aligned images, the least residual over that of the next candidates. A copy where it is below the threshold.
- "similarity": of vectors compared by the cosine 1 − cos, a copy where cos is above the threshold (SSCD's 0.75, DCR's
  0.5); of others the distance to the nearest training image (root mean square per value; bits that differ of hashes;
  the score of aligned images), a copy where it is below the threshold.
- "calibrated": the same score as "ratio" of pixels and aligned images, as "similarity" of others, a copy where its
  p-value against a holdout set is at most the share of alarms asked for (`diffmem.memorization.calibration`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import numpy as np

from diffmem.errors import InputError
from diffmem.html_report import level
from diffmem.memorization.calibration import ALARMS, Calibration, check_alarms
from diffmem.memorization.criteria import parse_threshold, ratio_rule
from diffmem.memorization.matching import Matches
from diffmem.search import Neighbors

RULES = ("ratio", "similarity", "calibrated")
_ROUNDED = 1 + 1e-9  # what is decided in floats allows for their rounding
PUBLISHED = Fraction(1, 3)  # the paper's threshold on d1/d2
ALIGNED = Fraction(1, 2)  # on the score of aligned images


@dataclass(frozen=True)
class Rule:
    """A rule with its threshold.

    Attributes:
        name: One of `RULES`.
        features: Name of the features that are compared.
        metric: How they are compared: "euclidean", "cosine", "hamming" or "aligned".
        threshold: A fraction for "ratio", a number for "similarity", None for "calibrated".
        alarms: For "calibrated".
    """

    name: str
    features: str
    metric: str
    threshold: Fraction | float | None
    alarms: float

    @classmethod
    def of(cls, name: str, features: str, metric: str, threshold: Any, alarms: float | None, holdout: bool) -> Rule:
        """The rule that these arguments of `diffmem.audit` ask for.

        Raises:
            InputError: There is no such rule, its threshold is missing or is none, or it wants a holdout set.
        """
        if name not in RULES:
            raise InputError(f"rule must be one of {', '.join(RULES)}, got {name!r}")
        if name != "calibrated":
            if alarms is not None:
                raise InputError("alarms= is only for rule='calibrated'")
            alarms = ALARMS
        if name == "ratio":
            default = ALIGNED if metric == "aligned" else PUBLISHED
            return cls(name, features, metric, parse_threshold(default if threshold is None else threshold), alarms)
        if name == "similarity":
            return cls(name, features, metric, _similarity_threshold(threshold, features, metric), alarms)
        if threshold is not None:
            raise InputError("rule='calibrated' finds its own threshold: remove threshold=… and pass alarms=…")
        if not holdout:
            raise InputError(
                "rule='calibrated' is calibrated on real images that the model has not seen: pass holdout=…"
            )
        alarms = ALARMS if alarms is None else alarms
        check_alarms(alarms)
        return cls(name, features, metric, None, float(alarms))

    @property
    def on_ratio(self) -> bool:
        """Whether the score is d1/d2."""
        return self.metric != "aligned" and (
            self.name == "ratio" or (self.name == "calibrated" and self.features == "pixels")
        )

    @property
    def published(self) -> bool:
        """Whether it is the paper's rule: d1/d2 of pixels."""
        return self.name == "ratio" and self.features == "pixels"

    @property
    def score_name(self) -> str:
        """What the score is, for people."""
        if self.metric == "aligned":
            return "aligned residual / others'"
        if self.on_ratio:
            return "d1/d2"
        return {"cosine": "1 − cosine", "hamming": "differing bits", "euclidean": "distance"}[self.metric]

    def scores(self, found: Matches, neighbors: Neighbors) -> np.ndarray:
        """float64 [n], lower = more like a copy."""
        if found.scores is not None:
            return found.scores
        if self.on_ratio:
            return neighbors.distance_ratios
        if self.metric == "cosine":
            return neighbors.squared_distances[:, 0] / 2.0
        if self.metric == "hamming":
            return neighbors.squared_distances[:, 0].astype(np.float64)
        return neighbors.rms[:, 0]

    def copies(self, scores: np.ndarray, neighbors: Neighbors, calibration: Calibration | None) -> np.ndarray:
        """bool [n], which images are copies."""
        if self.name == "calibrated":
            return calibration.copies(scores)
        if self.name == "similarity":
            return 1 - scores > self.threshold if self.metric == "cosine" else scores < self.threshold
        if self.metric == "aligned":
            return scores < float(self.threshold)
        return ratio_rule(neighbors.squared_distances, self.threshold)

    def settled(
        self,
        neighbors: Neighbors,
        scores: np.ndarray,
        memorized: np.ndarray,
        calibration: Calibration | None,
        *,
        identical: bool,
    ) -> np.ndarray:
        """bool [n], of which images exact search gives the same verdict, whatever the search has missed.

        What it did not look at is at least u = `Neighbors.unseen` away, and the distances it found, d1 and d2, are not
        too small. By a ratio with threshold t: a copy stays one where d1 = 0 or d1 < t·u, since then the nearest is
        known, and the second is min(d2, u) away at least. An image that is none becomes one only if its nearest was
        missed, at a distance of x ≥ u; where duplicates are identical images, the nearest one found is then no
        duplicate of it, so that x < t·d1: it stays none where u ≥ t·d1, and, whatever duplicates are, where u ≥ d1. By
        a distance: a copy stays one, and another image stays none where u is not below the threshold.

        Args:
            neighbors: As the rule wants them.
            scores: Of the images.
            memorized: bool [n], the verdicts.
            calibration: Of a calibrated rule.
            identical: Whether only identical training images are duplicates.
        """
        if neighbors.unseen is None:
            return np.ones(len(memorized), bool)
        unseen, nearest = neighbors.unseen, neighbors.distances[:, 0]
        threshold = self.score_threshold(calibration)
        if self.on_ratio:
            stays = (nearest == 0) | (nearest * _ROUNDED < threshold * unseen)
            other = unseen >= nearest * _ROUNDED
            if identical:
                other |= unseen >= threshold * nearest * _ROUNDED
            return np.where(memorized, stays, other)
        lowest = {
            "cosine": np.square(unseen) / 2,
            "hamming": np.square(unseen),
        }.get(self.metric, unseen / math.sqrt(neighbors.dimension))
        return memorized | (lowest >= threshold * _ROUNDED)

    def score_threshold(self, calibration: Calibration | None) -> float:
        """The score below which an image is a copy."""
        if self.name == "calibrated":
            return calibration.threshold
        threshold = float(cast(float, self.threshold))
        return 1 - threshold if self.name == "similarity" and self.metric == "cosine" else threshold

    def described(self, calibration: Calibration | None) -> str:
        """When an image is a copy, as the end of a sentence."""
        if self.name == "calibrated":
            return (
                f"its score ({self.score_name} of {self.features}) is below {calibration.threshold:.4g}, as those of "
                f"{level(self.alarms)} of unseen images are ({calibration.total:,} holdout images)"
            )
        if self.name == "similarity" and self.metric == "cosine":
            return (
                f"the cosine between its {self.features} features and those of a training image is above "
                f"{self.threshold:g}"
            )
        return f"its score ({self.score_name} of {self.features}) is below {self.threshold}"


def _similarity_threshold(threshold: Any, features: str, metric: str) -> float:
    known = {
        "cosine": "SSCD's authors use 0.75 for 90 % precision on their benchmark, DCR's 0.5",
        "hamming": "10 of 64 bits is common for perceptual hashes",
    }.get(metric, "a distance, which depends on the images")
    if threshold is None:
        raise InputError(
            f"rule='similarity' of {features} needs threshold=… ({known}); thresholds do not transfer between data "
            "sets: rule='calibrated' finds one from a holdout set"
        )
    try:
        value = float(Fraction(threshold))
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        value = math.nan
    fits = -1 < value < 1 if metric == "cosine" else 0 < value < math.inf
    if not fits:
        wanted = "a cosine between −1 and 1" if metric == "cosine" else "a distance above 0"
        raise InputError(f"threshold must be {wanted} for rule='similarity' of {features}, got {threshold!r}")
    return value
