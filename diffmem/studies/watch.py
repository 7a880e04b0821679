"""What a study of training time measures of every snapshot beside its copies, and when such a run ends.

A setting that has a `watch` is audited at lengths a factor of √2 apart (`leveling.audit_steps`), every audit with all
of its samples, and ends with the first one whose R_mem is at least `stop_at`: what came before is on record, and what
comes after is not asked about. Unseen images, the same for every size of a repetition, tell what is no memorization:

- the loss gap (`diffmem.evaluation.loss_gap`) by noise level;
- the rule's false alarms: how many of them it calls copies;
- three phases (Pham et al. 2025, arXiv 2505.21777; `diffmem.memorization.criteria`), by one distance δ for both of its
  thresholds: that within which one in a hundred of the unseen images has another one. So a generated image is memorized
  where a training image is as near as unseen images hardly ever are to each other, spurious where another generated
  image is and no training image, generalized else; and δ is the same for all sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffmem.data import ImageSet
from diffmem.errors import InputError
from diffmem.evaluation import Evaluation
from diffmem.evaluation.loss_gap import LossGapMeter
from diffmem.memorization import CopyDetector
from diffmem.memorization.criteria import Comparison, Points, Searches
from diffmem.memorization.criteria.three_phases import THREE_PHASES
from diffmem.studies.parts import part_of

NEAR = 0.01  # share of unseen images that have another one within δ


@dataclass(frozen=True)
class Watch:
    """What is watched.

    Attributes:
        holdout: How many images of the source are kept from training, at every size.
        stop_at: The run ends with the first audit whose R_mem is at least this.
        stop_after: But not before so many images seen, so that runs can be compared at that length.
    """

    holdout: int = 400
    stop_at: float = 0.6
    stop_after: int = 0

    def __post_init__(self) -> None:
        if self.holdout < 20 or not 0 < self.stop_at <= 1 or self.stop_after < 0:
            raise InputError(
                f"watch: holdout is {self.holdout}, stop_at {self.stop_at} and stop_after {self.stop_after}, but they "
                "must be at least 20, a share above 0, and at least 0"
            )

    @staticmethod
    def of(values: Mapping[str, Any]) -> Watch:
        """From the values that a setting holds; raises InputError where they are none."""
        return part_of(Watch, values)

    def ends(self, images: int, ratio: float) -> str | None:
        """Why a run ends with an audit, if it does."""
        if ratio < self.stop_at or images < self.stop_after:
            return None
        return f"R_mem is past {self.stop_at:.4g}"


@dataclass(frozen=True)
class Watched:
    """What was found of one snapshot beside its copies.

    Attributes:
        gap: The loss gap, per level sigma, training, unseen, error, p (`LossGap.to_json`).
        memorized: Generated images within δ of a training image.
        spurious: Others within δ of another generated image.
        generalized: The rest.
    """

    gap: list[list[float]]
    memorized: int
    spurious: int
    generalized: int

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of the three phases."""
        counts = self.memorized, self.spurious, self.generalized
        return tuple(count / sum(counts) for count in counts)  # type: ignore[return-value]


class Watcher:
    """Measures snapshots of one run.

    Args:
        training: Its training set.
        unseen: Images that it is not trained on.
        detector: Decides which images are copies.
    """

    def __init__(self, training: ImageSet, unseen: ImageSet, detector: CopyDetector) -> None:
        self.meter = LossGapMeter(training, unseen)
        alarms = detector.judge(unseen.images).memorized
        self.alarms = int(alarms.sum()), len(alarms)
        self.training = Points(training.images, "training")
        points = Points(unseen.images, "holdout")
        others = np.sqrt(Searches(device="cpu").nearest_other(points, np.arange(len(points))))
        self.delta = float(np.quantile(others, NEAR)) / np.sqrt(points.dimension)  # root mean square, gray levels

    def measure(self, denoiser: Any, found: Evaluation) -> Watched:
        """What is found of a snapshot whose images were all kept."""
        delta = self.delta / 255
        settings = {"three_phases": {"delta_m": delta, "delta_s": delta}}
        generated = Points(found.images, "generated")
        searches = Searches(device="cpu")
        shares = THREE_PHASES.measure(Comparison(generated, self.training, searches=searches, settings=settings))
        counts = [int(which.sum()) for which in shares.per_image.values()]
        return Watched(self.meter.measure(denoiser).to_json(), *counts)
