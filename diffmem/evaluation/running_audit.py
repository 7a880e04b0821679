"""The detector for images that a network will make, and an audit that keeps pace with the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffmem.data import ImageSet, load_images
from diffmem.errors import InputError
from diffmem.memorization import Audit, CopyDetector, CopyRate, Detection, check_sets
from diffmem.progress import Progress, silent

if TYPE_CHECKING:
    from diffmem.data import ImageSource


def sample_detector(
    training: ImageSource,
    image_shape: tuple[int, int, int],
    device: torch.device,
    *,
    holdout: ImageSource | None = None,
    flip: bool = False,
    keep_images: bool = False,
    progress: Progress = silent,
) -> CopyDetector:
    """A detector for uint8 images that are yet to be sampled, by the rule of `diffmem.audit`'s defaults.

    Args:
        training: The training images, as for `diffmem.audit`.
        image_shape: (C, H, W) of the images to come.
        device: Where to search.
        holdout: Real images that the model has not seen, as for `diffmem.audit`.
        flip: Whether mirrored images are compared too.
        keep_images: See `CopyDetector`.
        progress: A callback.

    Raises:
        InputError: Before anything is sampled, for all that `diffmem.audit` would complain about afterwards.
    """
    training = load_images(training, progress=progress)
    holdout = None if holdout is None else load_images(holdout, progress=progress)
    if training.image_shape != image_shape:
        theirs, ours = ("x".join(map(str, shape)) for shape in (training.image_shape, image_shape))
        raise InputError(
            f"training images ({training.source}) are {theirs}, this network makes {ours}: give a training "
            "set of that size, or write the images first and bring both to one size with diffmem audit"
        )
    check_sets(ImageSet(np.zeros((1, *image_shape), np.uint8), source="to be sampled"), training, "generated")
    return CopyDetector(
        training, flip=flip, holdout=holdout, device=str(device), keep_images=keep_images, progress=progress
    )


class RunningAudit:
    """Counts copies block by block, in whatever order they come, and audits all at the end. Each image is searched
    once.

    Args:
        detector: Of `sample_detector`; it keeps images.
    """

    def __init__(self, detector: CopyDetector):
        self.detector = detector
        self._found: dict[int, Detection] = {}

    @property
    def rate(self) -> CopyRate:
        """How many of the images so far are copies."""
        return CopyRate(sum(each.count for each in self._found.values()), sum(map(len, self._found.values())))

    def add(self, block: int, images: np.ndarray) -> None:
        """Counts the copies among the uint8 images [n, C, H, W] of a block."""
        self._found[block] = self.detector.judge(images)

    def so_far(self) -> str:
        """The running estimate, for a progress line."""
        return f"{self.rate.ratio:.1%} copies so far"

    def audit(self, generated: ImageSet, blocks: Sequence[tuple[int, int]]) -> Audit:
        """The audit of all images.

        Args:
            generated: The images, block after block.
            blocks: (number, images) of each block, in this order; those that were not added are searched now.
        """
        found, start = [], 0
        for block, size in blocks:
            known = self._found.get(block)
            found.append(self.detector.judge(generated.images[start : start + size]) if known is None else known)
            start += size
        self.detector.update(generated, Detection.join(found))
        return self.detector.compute()
