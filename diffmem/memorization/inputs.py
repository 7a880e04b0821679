"""Sets that are audited together must fit together: loaded, brought to one dtype, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from diffmem.data import ImageSet
from diffmem.data.grid import MOST_ROWS, grid_of, looks_tiled
from diffmem.data.value_range import extremes
from diffmem.errors import InputError
from diffmem.memorization.plausibility import scale_recipe


def value_ranges(value_range: Any) -> dict[str, Any]:
    """value_range by set."""
    sets = ("generated", "training", "holdout")
    if not isinstance(value_range, Mapping):
        return dict.fromkeys(sets, value_range)
    if unknown := set(value_range) - set(sets):
        raise InputError(f"value_range: {', '.join(map(str, unknown))} is not one of the sets {', '.join(sets)}")
    # Without one of its own, the holdout set is taken to be made like the training set.
    return {"holdout": value_range.get("training"), **value_range}


def in_one_precision(*sets: ImageSet | None) -> tuple[ImageSet | None, ...]:
    """The sets, those of float32 as float64 where any is float64: each float32 value is a float64 value."""
    if not any(each is not None and each.images.dtype == np.float64 for each in sets):
        return sets
    return tuple(
        replace(each, images=each.images.astype(np.float64))
        if each is not None and each.images.dtype == np.float32
        else each
        for each in sets
    )


def check_sets(images: ImageSet, training: ImageSet, what: str, *, sizes: bool = True) -> None:
    """Refuses sets that cannot be compared.

    Args:
        images: The set to audit.
        training: The training set.
        what: What to call the first: "generated" or "holdout".
        sizes: Whether they must be of one size.

    Raises:
        InputError: A set is empty, or dtype, channels or size differ: with what brings both to one.
    """
    for name, image_set in ((what, images), ("training", training)):
        if len(image_set) == 0:
            raise InputError(f"the {name} set ({image_set.source}) is empty")
    if images.images.dtype != training.images.dtype:
        floats = training if images.images.dtype == np.uint8 else images
        low, high = extremes(floats.images)
        raise InputError(
            f"{what} images ({images.source}) are {images.images.dtype}, training images ({training.source}) are "
            f"{training.images.dtype}: convert the floats, {low:.4g} to {high:.4g}, to uint8 with "
            f"{scale_recipe(floats)}"
        )
    ours, theirs = images.image_shape, training.image_shape
    if ours[0] != theirs[0]:
        kinds = {1: "gray (1 channel)", 3: "color (3 channels)"}
        our_kind, their_kind = (kinds.get(shape[0], f"{shape[0]}-channel") for shape in (ours, theirs))
        way_out = "convert both with color='gray' or color='rgb'"
        if not {ours[0], theirs[0]} <= {1, 3, 4}:
            way_out = "if an array's axes are in another order, pass layout='NCHW' or layout='NHWC'"
        raise InputError(
            f"{what} images ({images.source}) are {our_kind}, training images ({training.source}) are {their_kind}: "
            f"{way_out}"
        )
    if sizes and ours != theirs:
        raise InputError(
            f"{what} images ({images.source}) are {ours[1]}x{ours[2]}, training images ({training.source}) are "
            f"{theirs[1]}x{theirs[2]}: {_size_advice(images, training, what)}"
        )


def _size_advice(images: ImageSet, training: ImageSet, what: str) -> str:
    """How to bring both to one size: the smaller one, since enlarged images have lost what the others still hold."""
    ours, theirs = images.image_shape[1:], training.image_shape[1:]
    smaller = min(ours, theirs, key=lambda size: (size[0] * size[1], size))
    advice = f"resize both to the smaller size with resize={min(smaller)}"
    if ours[0] * theirs[1] != ours[1] * theirs[0]:
        advice += ", and center_crop=True if the training images were center-cropped"
    grid = grid_of(images, theirs) if what == "generated" else None
    if grid is not None and max(grid.rows, grid.columns) <= MOST_ROWS:
        seen = "They look like" if looks_tiled(images, grid, theirs) else "Where they are"
        advice += (
            f". {seen} sheets of {grid.rows}x{grid.columns} images in a grid"
            f"{': cut them apart' if seen == 'They look like' else ', cut them apart'} with split_grid=True instead"
        )
    return advice
