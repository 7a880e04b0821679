"""The detector for images that a network will make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffmem.data import ImageSet, load_images
from diffmem.errors import InputError
from diffmem.memorization import CopyDetector, CriterionDetector, check_criterion, check_sets, is_index
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
    criterion: str | None = None,
    progress: Progress = silent,
) -> CopyDetector:
    """A detector for uint8 images that are yet to be sampled, by the rule of `diffmem.audit`'s defaults.

    Args:
        training: The training images, as for `diffmem.audit`; or an index folder of pixels, which is searched exactly.
        image_shape: (C, H, W) of the images to come.
        device: Where to search.
        holdout: Real images that the model has not seen, as for `diffmem.audit`.
        flip: Whether mirrored images are compared too.
        keep_images: See `CopyDetector`.
        criterion: By which images are copies, in place of the rule; see `diffmem.memorization.CriterionDetector`.
        progress: A callback.

    Raises:
        InputError: Before anything is sampled, for all that `diffmem.audit` would complain about afterwards.
    """
    if is_index(training):
        return _indexed_detector(training, image_shape, holdout, flip, keep_images, criterion, progress)
    training = load_images(training, progress=progress)
    holdout = None if holdout is None else load_images(holdout, progress=progress)
    check_shape(training, image_shape)
    check_sets(ImageSet(np.zeros((1, *image_shape), np.uint8), source="to be sampled"), training, "generated")
    options: dict[str, Any] = {
        "flip": flip, "holdout": holdout, "device": str(device), "keep_images": keep_images, "progress": progress,
        "second_look": keep_images,  # for a report; counts in a loop do without
    }  # fmt: skip
    if check_criterion(criterion) == "ratio":
        return CopyDetector(training, **options)
    return CriterionDetector(training, check_criterion(criterion), **options)


def _indexed_detector(
    training: Any,
    image_shape: tuple[int, int, int],
    holdout: Any,
    flip: bool,
    keep_images: bool,
    criterion: str | None,
    progress: Progress,
) -> CopyDetector:
    """The same for an index folder."""
    if check_criterion(criterion) != "ratio":
        raise InputError(
            f"criterion={criterion!r} compares with training images in memory: give the training set, not its index"
        )
    detector = CopyDetector(
        index=training, exact=True, flip=flip, holdout=holdout, keep_images=keep_images, progress=progress,
        second_look=keep_images,
    )  # fmt: skip
    if not isinstance(detector.training, ImageSet):
        raise InputError(
            f"training: {detector.training.source} is an index of {detector.rule.features} features, but sampled "
            "images are compared by pixels: give the training set, or an index of its pixels"
        )
    check_shape(detector.training, image_shape)
    return detector


def check_shape(training: ImageSet, image_shape: tuple[int, int, int]) -> None:
    """Raises InputError where images (C, H, W) that are to come cannot be compared with these training images."""
    if training.image_shape != image_shape:
        theirs, ours = ("x".join(map(str, shape)) for shape in (training.image_shape, image_shape))
        raise InputError(
            f"training images ({training.source}) are {theirs}, but this network generates {ours}: give a training set "
            "of that size, or write the images first and resize both with diffmem audit"
        )
