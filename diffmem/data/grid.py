"""Sheets of many images in a grid, as training code writes its samples: recognized and cut apart."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from diffmem.data.image_set import ImageSet
from diffmem.errors import InputError

PADDINGS = (8, 6, 5, 4, 3, 2, 1, 0)  # pixels between images: EDM's sheets have none, torchvision's make_grid 2


class Grid(NamedTuple):
    """rows × columns images with `padding` pixels around each (none where it is 0)."""

    rows: int
    columns: int
    padding: int


def grid_of(images: ImageSet, size: tuple[int, int]) -> Grid | None:
    """The grid that images would be of, were they sheets of images of this (height, width); None where they cannot be.

    A padding counts where all of it is of a single color on the first sheet, and then goes before none.
    """
    height, width = images.image_shape[1:]
    for padding in PADDINGS:
        rows, rest_rows = divmod(height - padding, size[0] + padding)
        columns, rest_columns = divmod(width - padding, size[1] + padding)
        if rest_rows or rest_columns or rows < 1 or columns < 1 or rows * columns < 2:
            continue
        grid = Grid(rows, columns, padding)
        between = np.ones((height, width), bool)
        for top, left in _places(grid, size):
            between[top : top + size[0], left : left + size[1]] = False
        values = np.asarray(images.images[0])[:, between]
        if (values == values[:, :1]).all():
            return grid
    return None


def _places(grid: Grid, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Where each image begins: (top, left), row by row."""
    height, width = (length + grid.padding for length in size)
    return [
        (grid.padding + row * height, grid.padding + column * width)
        for row in range(grid.rows)
        for column in range(grid.columns)
    ]


def looks_tiled(images: ImageSet, grid: Grid, size: tuple[int, int]) -> bool:
    """Whether values jump where one image of the grid would meet the next, as they do not within images."""
    if grid.padding:
        return True
    some = np.asarray(images.images[:16]).astype(np.float64)
    jumps = []
    for axis, length, count in ((2, size[0], grid.rows), (3, size[1], grid.columns)):
        if count > 1:
            steps = np.abs(np.diff(some, axis=axis)).mean(axis=tuple({0, 1, 2, 3} - {axis}))
            border = np.arange(length - 1, len(steps), length)
            inner = np.delete(steps, border)
            jumps.append(bool(steps[border].mean() > 1.5 * inner.mean() if len(inner) else False))
    return all(jumps)


def split_grid(images: ImageSet, size: tuple[int, int]) -> ImageSet:
    """The images of this (height, width) on the sheets `images`, row by row; blank places at a sheet's
    end are left out.

    Raises InputError where the sheets' size does not fit.
    """
    grid = grid_of(images, size)
    if grid is None:
        height, width = images.image_shape[1:]
        raise InputError(
            f"{images.source}: images of {height}x{width} are no grid of images of {size[0]}x{size[1]}, whatever the "
            "padding between them"
        )
    tiles = np.stack(
        [images.images[:, :, top : top + size[0], left : left + size[1]] for top, left in _places(grid, size)], axis=1
    )  # [sheets, places, C, h, w]
    blank = (tiles == tiles[:, :, :1, :1, :1]).all(axis=(2, 3, 4))
    # Places after the last one that is not blank.
    empty = np.flip(np.logical_and.accumulate(np.flip(blank, 1), axis=1), 1)
    kept = np.argwhere(~empty)
    if not len(kept):
        raise InputError(f"{images.source}: nothing but blank images in the grid")
    note = (
        f"{images.source}: {len(images):,} sheets of {grid.rows}x{grid.columns} images were cut into "
        f"{len(kept):,} images"
    )
    if skipped := int(empty.sum()):
        note += f"; {skipped:,} blank places at their ends were left out"
    names = [
        f"{images.name(int(sheet))}[{place // grid.columns},{place % grid.columns}]" for sheet, place in kept.tolist()
    ]
    return replace(
        images, images=np.ascontiguousarray(tiles[~empty]), names=names, labels=None, notes=(*images.notes, note)
    )
