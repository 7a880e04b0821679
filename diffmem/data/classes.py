"""Labels as something needs them: an error where a set has none that will do, with the reason."""

from __future__ import annotations

import numpy as np

from diffmem.data.image_set import ImageSet
from diffmem.data.labels import LEFT_OUT
from diffmem.errors import InputError

# Class numbers from here on are taken for something else (identifiers, dates), unless there are as many images.
MAX_CLASSES = 100_000


def class_indices(images: ImageSet, purpose: str, *, any_number: bool = False) -> np.ndarray:
    """The class number of each image, int64 [N].

    purpose: what needs them, for messages.
    any_number: also negative numbers and large ones, which tell classes apart but cannot be inputs of a network.

    Raises `InputError` where `images` has no labels, vectors that are not one-hot, or numbers that will not do.
    """
    labels = _labels(images, purpose)
    if labels.ndim != 1:
        raise InputError(
            f"{images.source}: {purpose} needs a class number for each image, and its labels are vectors of length"
            f" {labels.shape[1]} that are not one-hot"
        )
    return labels if any_number else _checked(images, labels, purpose)


def label_dim(images: ImageSet, purpose: str) -> int:
    """How many inputs a network needs for the labels of `images`: the highest class number + 1, or the length of the
    vectors. Raises `InputError` as `class_indices` does, but for vectors.
    """
    labels = _labels(images, purpose)
    return labels.shape[1] if labels.ndim == 2 else int(_checked(images, labels, purpose).max()) + 1


def missing_classes(labels: np.ndarray) -> str | None:
    """What is missing among class numbers int64 [N], in words: "3 of the class numbers 0 to 9 …"; None where nothing
    is."""
    count, present = int(labels.max()) + 1, len(np.unique(labels))
    if present == count:
        return None
    absent = np.setdiff1d(np.arange(count), labels)[0]
    return f"{count - present:,} of the class numbers 0 to {count - 1:,} do not occur (the first: {absent})"


def _labels(images: ImageSet, purpose: str) -> np.ndarray:
    if images.labels is None:
        reason = next((note.removeprefix(LEFT_OUT) for note in images.notes if note.startswith(LEFT_OUT)), None)
        raise InputError(
            f"{images.source}: {purpose} needs labels, but there are none"
            + ("" if reason is None else f" that can be used ({reason})")
        )
    return images.labels


def _checked(images: ImageSet, labels: np.ndarray, purpose: str) -> np.ndarray:
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        first = int(np.flatnonzero(labels < 0)[0])
        raise InputError(
            f"{images.source}: {purpose} needs class numbers from 0 up, and {int((labels < 0).sum()):,} are negative"
            f" (the first: {labels[first]} of {images.name(first)}): number the classes from 0 with"
            " labels='consecutive'"
        )
    if highest >= max(MAX_CLASSES, len(images)):
        raise InputError(
            f"{images.source}: {purpose} needs class numbers, and {highest} (of"
            f" {images.name(int(labels.argmax()))}) is too large to be one: number the classes from 0 with"
            " labels='consecutive'"
        )
    return labels
