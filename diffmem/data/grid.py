"""Sheets of many images in a grid, as training code writes its samples: recognized and cut apart."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from diffmem.data.adapt import adapt
from diffmem.data.decode import PixelOptions, decode_image
from diffmem.data.decode_pool import EncodedImages
from diffmem.data.image_set import ImageSet
from diffmem.errors import InputError
from diffmem.progress import silent

PADDINGS = (8, 6, 5, 4, 3, 2, 1, 0)  # pixels between images: EDM's sheets have none, torchvision's make_grid 2
SMALLEST = 8  # pixels of a side that an image on a sheet of unknown kind has at least
MOST_ROWS = 64  # and columns of such a sheet
MOST_VALUES = 2**20  # looked at
BORDER = 0.65  # of the difference between pixels of different images: what neighbors at a border differ by at least


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
    jumps = []
    for axis, length, count in ((2, size[0], grid.rows), (3, size[1], grid.columns)):
        if count > 1:
            steps = _differences(_lines(images.images, axis), 1)
            border = np.arange(length - 1, len(steps), length)
            inner = np.delete(steps, border)
            jumps.append(bool(steps[border].mean() > 1.5 * inner.mean() if len(inner) else False))
    return all(jumps)


def sheets_of(images: np.ndarray) -> Grid | None:
    """The grid of square images, of whatever size, that the first of `images` [N, C, H, W] all look like sheets of;
    None where they do not.

    Between the images lies a padding of a single color, or else, at every border, neighboring pixels differ about as
    much as pixels of different images do. Sheets of images whose edges are blank, without padding, go unseen.
    """
    height, width = images.shape[2:]
    lines = {axis: _lines(images, axis) for axis in (2, 3)}
    if any((values == values[0, 0]).all() for values in lines.values()):
        return None
    for padding in PADDINGS:
        # The smallest that fits first: of a grid, two by two images make up a grid too.
        for side in range(SMALLEST, min(height, width) + 1):
            rows, rest_rows = divmod(height - padding, side + padding)
            columns, rest_columns = divmod(width - padding, side + padding)
            if rest_rows or rest_columns or rows < 1 or columns < 1 or rows * columns < 2:
                continue
            if max(rows, columns) > MOST_ROWS:
                continue
            grid = Grid(rows, columns, padding)
            if _padded(images, grid, side) if padding else _jumps_at_borders(lines, grid, side):
                return grid
    return None


def sheets_of_files(
    source: EncodedImages, indices: Sequence[int] | np.ndarray, options: PixelOptions
) -> tuple[int, int] | None:
    """(rows, columns) of the grid that the files at `indices` look like sheets of, before `options` resize or crop
    them; None where they do not, or are of several sizes."""
    stored = replace(options, size=None, center_crop=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = [np.atleast_3d(np.asarray(decode_image(source.read(int(index)), stored)[0])) for index in indices]
    if not images or any(image.shape != images[0].shape for image in images):
        return None
    return rows_and_columns(np.stack(images).transpose(0, 3, 1, 2))


def rows_and_columns(images: np.ndarray) -> tuple[int, int] | None:
    """How many images the sheets hold that `images` look like; None where they look like none."""
    grid = sheets_of(images)
    return None if grid is None else (grid.rows, grid.columns)


def _padded(images: np.ndarray, grid: Grid, side: int) -> bool:
    """Whether all lines between images are of one color, and there is more than one image."""
    lines = [
        start + offset
        for start in range(0, max(images.shape[2:]), side + grid.padding)
        for offset in range(grid.padding)
    ]
    across, down = ([line for line in lines if line < length] for length in images.shape[2:])
    for image in images[:8]:
        color = image[:, :1, :1]
        if not all((image[:, line] == color[:, 0]).all() for line in across):
            return False
        if not all((image[:, :, line] == color[:, 0]).all() for line in down):
            return False
    first = images[0]
    tiles = (first[:, top : top + side, left : left + side] for top, left in _places(grid, (side, side)))
    return sum(bool((tile != tile[:, :1, :1]).any()) for tile in tiles) > 1


def _jumps_at_borders(lines: dict[int, np.ndarray], grid: Grid, side: int) -> bool:
    for axis, count in ((2, grid.rows), (3, grid.columns)):
        if count == 1:
            continue
        steps = _differences(lines[axis], 1)
        border = np.arange(side - 1, len(steps), side)
        # Blocks of strongly compressed JPEG have steps of half of that between them.
        least = max(BORDER * _differences(lines[axis], side).mean(), 2 * np.delete(steps, border).mean())
        if steps[border].min() <= least:
            return False
    return True


def _lines(images: np.ndarray, axis: int) -> np.ndarray:
    """[lines, length] float32: lines along `axis` through some of `images`, evenly spaced."""
    some = images[:16]
    step = max(1, some.size // MOST_VALUES)
    some = some[:, :, :, ::step] if axis == 2 else some[:, :, ::step]
    return np.moveaxis(some, axis, -1).reshape(-1, some.shape[axis]).astype(np.float32)


def _differences(lines: np.ndarray, apart: int) -> np.ndarray:
    """By how much pixels so far apart differ on average, by place."""
    return np.abs(lines[:, apart:] - lines[:, :-apart]).mean(axis=0)


def split_grid(images: ImageSet, size: tuple[int, int]) -> ImageSet:
    """The images of this (height, width) on the sheets `images`, row by row; blank places at a sheet's
    end are left out. Where the sheets are plainly of larger images, these are cut apart and resized.

    Raises InputError where the sheets' size does not fit.
    """
    wanted, grid = size, grid_of(images, size)
    larger = sheets_of(images.images) if grid is None or grid.padding == 0 else None
    if larger is not None:
        side = (images.image_shape[1] - larger.padding) // larger.rows - larger.padding
        if side > max(size) and size[0] == size[1]:
            grid, size = larger, (side, side)
    if grid is None:
        height, width = images.image_shape[1:]
        raise InputError(
            f"{images.source}: images of {height}x{width} are not a grid of images of {size[0]}x{size[1]} with any "
            "padding"
        )
    tiles = np.stack(
        [images.images[:, :, top : top + size[0], left : left + size[1]] for top, left in _places(grid, size)], axis=1
    )  # [sheets, places, C, h, w]
    blank = (tiles == tiles[:, :, :1, :1, :1]).all(axis=(2, 3, 4))
    # Places after the last one that is not blank.
    empty = np.flip(np.logical_and.accumulate(np.flip(blank, 1), axis=1), 1)
    kept = np.argwhere(~empty)
    if not len(kept):
        raise InputError(f"{images.source}: the grid holds only blank images")
    note = (
        f"{images.source}: {len(images):,} sheets of {grid.rows}x{grid.columns} images were cut into "
        f"{len(kept):,} images"
    )
    if skipped := int(empty.sum()):
        note += f"; {skipped:,} blank cells at the end were skipped"
    cut = np.ascontiguousarray(tiles[~empty])
    if size != wanted:
        note += f", and resized from {size[0]}x{size[1]} to {wanted[0]}x{wanted[1]}"
        cut = adapt(cut, PixelOptions(size=wanted), images.source, silent)
    names = [
        f"{images.name(int(sheet))}[{place // grid.columns},{place % grid.columns}]" for sheet, place in kept.tolist()
    ]
    return replace(images, images=cut, names=names, labels=None, sheets=None, notes=(*images.notes, note))
