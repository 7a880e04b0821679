"""An audit that keeps pace with the sampler."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffmem.data import ImageSet, load_images
from diffmem.errors import InputError
from diffmem.memorization import Audit, audit, parse_threshold, ratio_rule
from diffmem.progress import Progress, silent
from diffmem.search import DistinctNeighbors, Neighbors, TrainingIndex

if TYPE_CHECKING:
    from diffmem.data import ImageSource


class RunningAudit:
    """Counts copies block by block, by the rule of `diffmem.audit`'s defaults, and audits the whole at the end.

    training, holdout, flip: as for `diffmem.audit`. image_shape: (C, H, W) of the images to come. Raises InputError,
    before anything is sampled, for all that `diffmem.audit` would complain about afterwards.
    """

    def __init__(
        self,
        training: ImageSource,
        holdout: ImageSource | None,
        image_shape: tuple[int, int, int],
        device: torch.device,
        progress: Progress = silent,
        flip: bool = False,
    ):
        self.flip = flip
        self.training = load_images(training, progress=progress)
        self.holdout = None if holdout is None else load_images(holdout, progress=progress)
        self.progress = progress
        if self.training.image_shape != image_shape:
            theirs, ours = ("x".join(map(str, shape)) for shape in (self.training.image_shape, image_shape))
            raise InputError(
                f"training images ({self.training.source}) are {theirs}, this network makes {ours}: give a training "
                "set of that size, or write the images first and bring both to one size with diffmem audit"
            )
        self.index = TrainingIndex(self.training, device=str(device), progress=progress)
        # One image stands for those to come, so that sets that do not fit together come to light now.
        stand_in = ImageSet(np.zeros((1, *image_shape), np.uint8), source="to be sampled")
        first = audit(stand_in, self.training, holdout=self.holdout, index=self.index, flip=flip, progress=progress)
        self._holdout_audit = first.holdout
        self._search = DistinctNeighbors(self.index, self.training.images, first.duplicate_groups, flip=flip)
        self._threshold = parse_threshold(first.settings["threshold"])
        self.count = self.total = 0

    def judge(self, images: np.ndarray) -> tuple[np.ndarray, Neighbors]:
        """Which of uint8 images [n, C, H, W] are copies (bool [n]), and their nearest and second nearest images."""
        nearest = self._search.outside_duplicates(images, self._search.nearest(images))
        return ratio_rule(nearest.squared_distances, self._threshold), nearest

    def add(self, images: np.ndarray) -> None:
        """Counts the copies among uint8 images [n, C, H, W]."""
        memorized, _ = self.judge(images)
        self.count += int(memorized.sum())
        self.total += len(images)

    def so_far(self) -> str:
        """The running estimate, for a progress line."""
        return f"{self.count / self.total:.1%} copies so far"

    def audit(self, generated: ImageSet) -> Audit:
        """The audit of all images."""
        result = audit(generated, self.training, index=self.index, flip=self.flip, progress=self.progress)
        return replace(result, holdout=self._holdout_audit)
