"""What a criterion does by itself in a trial, and what other criteria say of the same images.

R_mem moves with N and with the resolution for two reasons: the network copies more or less, and the rule finds the same
copies more or less easily. So every trial also tells how often each criterion calls real images copies that are not
in the training set (by chance), how many noisy copies of training images it finds (the same ones at every N), and how
many of the best snapshot's images are copies by it. Criteria: the ratio rule; the same rule at the threshold that has
alarms on 1 % of the held-out images, whatever N and the resolution are; calibrated L2; and authenticity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffmem.data import ImageSet
from diffmem.evaluation import sample_detector
from diffmem.memorization.criterion_detector import DEFAULT
from diffmem.studies.trial import Trial

AT_ALARMS = "calibrated_ratio"
OTHER_CRITERIA = (AT_ALARMS, "calibrated_l2", "authenticity")
_FORMER_NAMES = {"ratio at 1 % alarms": AT_ALARMS}  # in results that were stored under these
KINDS = ("generated", "held_out", "planted")
GENERATED, HELD_OUT, PLANTED = 1000, 1000, 300  # images at most
_ALARMS = 0.01
_FEWEST = 100  # held-out images, below which 1 % of them are none
_NOISE = 15.0  # standard deviation in gray levels
_PLANTED_OF = 20  # training images that are copied


@dataclass(frozen=True)
class Check:
    """What one criterion says in one trial: (copies, images) of three kinds of images.

    Attributes:
        criterion: "ratio" or one of OTHER_CRITERIA.
        generated: Of the best snapshot, the first seeds.
        held_out: Images of the same source that the training set does not hold.
        planted: Noisy copies of training images (σ of 15 gray levels): the same at every N of a repetition.
    """

    criterion: str
    generated: tuple[int, int]
    held_out: tuple[int, int]
    planted: tuple[int, int]

    def to_text(self) -> str:
        """The check in a cell of a table: "ratio:12/500:0/1000:262/300"."""
        pairs = (self.generated, self.held_out, self.planted)
        return ":".join([self.criterion, *(f"{count}/{total}" for count, total in pairs)])

    @staticmethod
    def from_text(text: str) -> Check:
        """The check that `to_text` gave; raises ValueError for other texts."""
        criterion, *pairs = text.split(":")
        counts = {}
        for kind, pair in zip(KINDS, pairs, strict=True):
            count, total = pair.split("/")
            counts[kind] = int(count), int(total)
        return Check(criterion, **counts)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Check:
        """The check whose fields were stored."""
        counts = {name: (int(values[name][0]), int(values[name][1])) for name in KINDS}
        name = values["criterion"]
        return Check(_FORMER_NAMES.get(name, name), **counts)


def checks(trial: Trial, training: ImageSet, generated: np.ndarray, device: torch.device) -> tuple[Check, ...]:
    """What each criterion says of a trial's images.

    Args:
        trial: The trial.
        training: Its training set.
        generated: uint8 [n, C, H, W], of the best snapshot.
        device: Where to search.
    """
    kinds = (generated, held_out_images(trial, training), planted_copies(trial, training))
    flip = bool(trial.setting.training.get("xflip"))
    found = []
    for name in (DEFAULT, *(name for name in OTHER_CRITERIA if name != AT_ALARMS)):
        detector = sample_detector(training, training.image_shape, device, flip=flip, criterion=name)
        judged = [detector.judge(images) if len(images) else None for images in kinds]
        found.append(Check(name, *(_counts(None if each is None else each.memorized) for each in judged)))
        if name == DEFAULT and len(kinds[1]) >= _FEWEST:
            ratios = [np.zeros(0) if each is None else each.neighbors.distance_ratios for each in judged]
            threshold = np.sort(ratios[1])[int(_ALARMS * len(ratios[1]))]
            found.append(Check(AT_ALARMS, *(_counts(each < threshold) for each in ratios)))
    return tuple(found)


def held_out_images(trial: Trial, training: ImageSet) -> np.ndarray:
    """Images of the trial's source, as its training images are made, that are equal to none of these: uint8
    [n, C, H, W], at most HELD_OUT, in an order of their own that is always the same."""
    pool, known = trial.setting.pool().images, {image.tobytes() for image in training.images}
    order = np.random.default_rng(0).permutation(len(pool))
    rows = []
    for row in order.tolist():
        if pool[row].tobytes() not in known:
            rows.append(row)
            if len(rows) == HELD_OUT:
                break
    return pool[np.array(rows, np.int64)]


def planted_copies(trial: Trial, training: ImageSet) -> np.ndarray:
    """Noisy copies of training images, uint8 [PLANTED, C, H, W]: of the smallest set of at least 20 images that is in
    every larger one of the repetition, so that they are the same at every N."""
    setting = trial.setting
    classes = setting.limits()[0]
    size = classes * max(1, _PLANTED_OF // classes)
    images = training.images if trial.size <= size else setting.training_set(size, trial.repetition).images
    copied = images[np.arange(PLANTED) % len(images)].astype(np.float64)
    noise = np.random.default_rng([trial.repetition, 1]).standard_normal(copied.shape)
    return np.clip(np.rint(copied + _NOISE * noise), 0, 255).astype(np.uint8)


def _counts(memorized: np.ndarray | None) -> tuple[int, int]:
    return (0, 0) if memorized is None else (int(memorized.sum()), len(memorized))
