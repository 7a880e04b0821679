"""Groups of duplicate images within a training set.

Two images are linked when their distance is at most the radius (with `flip`, the distance to the mirrored image counts
too); a group is a connected component of these links with at least two members. At radius 0 the groups are the
classes of identical images, found by their SHA-256; above it, by a self-join of the distinct images.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch

from diffmem.errors import InputError
from diffmem.ops.nearest import pairs_within
from diffmem.progress import Progress, silent
from diffmem.search.rows import as_rows, mirror

BLOCK = 2048


@dataclass(frozen=True)
class DuplicateGroups:
    """Which training images are duplicates of which.

    group_of: int64 [N], for each image the lowest index of its group (its own, where it has no duplicate).
    distinct: how many different images the set holds, identical ones counted once.
    """

    group_of: np.ndarray
    distinct: int

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 [N]: the size of each image's group."""
        return np.bincount(self.group_of, minlength=len(self.group_of))[self.group_of]

    @cached_property
    def groups(self) -> list[np.ndarray]:
        """The groups of two or more, each a sorted array of indices, largest first, then by first index."""
        members = np.flatnonzero(self.sizes > 1)
        order = members[np.argsort(self.group_of[members], kind="stable")]
        starts = np.flatnonzero(np.diff(self.group_of[order], prepend=-1))
        found = np.split(order, starts[1:]) if len(order) else []
        return sorted(found, key=lambda group: (-len(group), group[0]))

    @property
    def number_of_groups(self) -> int:
        """Groups of any size: how many images are left when each group counts once."""
        return int((self.group_of == np.arange(len(self.group_of))).sum())


def squared_radius(radius: float | Fraction, dimension: int, integer: bool) -> int | float:
    """The largest squared distance within `radius` (root mean square per value): floor(radius²·d) for uint8 images."""
    exact = Fraction(radius) ** 2 * dimension
    return int(exact) if integer else float(exact)


def find_duplicates(
    images: np.ndarray, radius: float | Fraction = 0, *, flip: bool = False, progress: Progress = silent
) -> DuplicateGroups:
    """The groups of images within `radius` of each other.

    images: [N, C, H, W] (any [N, ...] without `flip`), uint8 or float.
    radius: root mean square difference per value (grey levels for uint8 images); 0 finds identical images.
    Raises InputError for a negative or infinite radius.
    """
    if not 0 <= radius < float("inf"):
        raise InputError(f"the duplicate radius must be 0 or more grey levels (rms), got {radius}")
    identical = _identical(images, flip, progress)
    leaders = np.flatnonzero(identical == np.arange(len(images)))
    group_of = identical
    if radius > 0 and len(leaders) > 1:
        joined = _linked(images, leaders, radius, flip, progress)
        group_of = joined[identical]
    return DuplicateGroups(group_of, len(leaders))


def _identical(images: np.ndarray, flip: bool, progress: Progress) -> np.ndarray:
    """For each image the lowest index with the same contents (or mirrored contents)."""
    first: dict[bytes, int] = {}
    lowest = np.empty(len(images), np.int64)
    for start in range(0, len(images), BLOCK):
        progress("looking for identical training images", start, len(images))
        block = np.ascontiguousarray(images[start : start + BLOCK])
        if block.dtype != np.uint8:
            block = block + np.zeros(1, block.dtype)  # -0.0 and 0.0 are the same value
        digests = [hashlib.sha256(row.data).digest() for row in block]
        if flip:
            digests = [min(d, hashlib.sha256(row.data).digest()) for d, row in zip(digests, mirror(block), strict=True)]
        for row, digest in enumerate(digests, start):
            lowest[row] = first.setdefault(digest, row)
    progress("looking for identical training images", len(images), len(images))
    return lowest


def _linked(images: np.ndarray, leaders: np.ndarray, radius, flip: bool, progress: Progress) -> np.ndarray:
    """For each image index that is a leader, the lowest index of its component (int64 [N], others undefined)."""
    rows = as_rows(images)
    limit = squared_radius(radius, rows.shape[1], rows.dtype == torch.uint8)
    parent = np.arange(len(images))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    everyone = rows if len(leaders) == len(images) else rows[leaders]
    for start in range(0, len(leaders), BLOCK):
        progress("comparing training images with each other", start, len(leaders))
        block = images[leaders[start : start + BLOCK]]
        for queries in (block, mirror(block)) if flip else (block,):
            found_rows, found_columns, _ = pairs_within(as_rows(queries), everyone, limit)
            ahead = found_columns > found_rows + start  # each link once, none to itself
            for a, b in zip((found_rows + start)[ahead].tolist(), found_columns[ahead].tolist(), strict=True):
                low, high = sorted((root(leaders[a]), root(leaders[b])))
                parent[high] = low
    progress("comparing training images with each other", len(leaders), len(leaders))
    for leader in leaders:
        parent[leader] = root(leader)
    return parent
