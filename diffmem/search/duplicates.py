"""Groups of duplicate images within a training set.

Two images are linked when their distance is at most the radius (with `flip`, the distance to the mirrored image counts
too); a group is a connected component of these links with at least two members. At radius 0 the groups are the
classes of identical images, found by their SHA-256, of bytes only where a cheap key repeats; above it, by a self-join
through the search index.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np

from diffmem.errors import InputError
from diffmem.lazy import torch
from diffmem.ops.nearest import pairs_within
from diffmem.progress import Progress, silent
from diffmem.search.faiss_index import FaissIndex
from diffmem.search.index import TrainingIndex
from diffmem.search.rows import Images, as_rows, mirror
from diffmem.search.sharded import ShardedIndex
from diffmem.search.vectors import VectorIndex

BLOCK = 2048
NEIGHBORS_ASKED = (4, 64)


@dataclass(frozen=True)
class DuplicateGroups:
    """Which training images are duplicates of which.

    Attributes:
        group_of: int64 [N], for each image the lowest index of its group (its own, where it has no duplicate).
        distinct: How many different images the set holds, identical ones counted once.
    """

    group_of: np.ndarray
    distinct: int

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 [N]: the size of each image's group."""
        return np.bincount(self.group_of, minlength=len(self.group_of))[self.group_of]

    def sizes_of(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n]: the size of the groups of some images."""
        return self.sizes[rows]

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
    images: np.ndarray,
    radius: float | Fraction = 0,
    *,
    flip: bool = False,
    index: TrainingIndex | ShardedIndex | VectorIndex | None = None,
    progress: Progress = silent,
) -> DuplicateGroups:
    """The groups of images within `radius` of each other.

    Args:
        images: [N, C, H, W] (any [N, ...] without `flip`), uint8 or float.
        radius: Root mean square difference per value (gray levels for uint8 images); 0 finds identical images.
        flip: Compare with mirrored images too.
        index: An exact index of `images` made before; above radius 0 one is made where none is given.
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: A negative or infinite radius, or an index of other images.

    Example:
        >>> images = np.array([[[[0]]], [[[9]]], [[[0]]]], np.uint8)
        >>> find_duplicates(images).group_of.tolist()
        [0, 1, 0]
    """
    if not (isinstance(radius, Real) and 0 <= radius < float("inf")):
        raise InputError(f"the duplicate radius must be 0 or more gray levels (rms), got {radius!r}")
    if index is not None:
        check_index(index, images)
    identical = _identical(images, flip, progress)
    leaders = np.flatnonzero(identical == np.arange(len(images)))
    if radius == 0 or len(leaders) < 2:
        return DuplicateGroups(identical, len(leaders))
    rows = as_rows(images)
    limit = squared_radius(radius, rows.shape[1], rows.dtype == torch.uint8)
    join = _SelfJoin(rows, limit, index or TrainingIndex(images, progress=progress))
    forest = _Forest(identical)
    for start in range(0, len(leaders), BLOCK):
        progress("comparing training images with each other", start, len(leaders))
        block = leaders[start : start + BLOCK]
        pixels = images[block]
        for queries in (pixels, mirror(pixels)) if flip else (pixels,):
            found_rows, found_columns = join(queries)
            # Identical images stand for each other; each link once, none to itself.
            links = np.stack([block[found_rows], identical[found_columns]], axis=1)
            for low, high in np.unique(links[links[:, 0] < links[:, 1]], axis=0).tolist():
                forest.join(low, high)
    progress("comparing training images with each other", len(leaders), len(leaders))
    return DuplicateGroups(forest.roots(), len(leaders))


def check_index(index: TrainingIndex | ShardedIndex | FaissIndex | VectorIndex, images: Images) -> None:
    """Raises InputError where an index was made of other images, or of the same ones in another order.

    Args:
        index: Made before.
        images: The training images, [N, C, H, W] or an ImageSet.

    Raises:
        InputError: The index is not one of these images.
    """
    if not hasattr(index, "holds"):
        raise InputError(f"index is not an index of images but an object of type {type(index).__name__}")
    if len(index) != len(images):
        raise InputError(f"index holds {len(index):,} images, the training set {len(images):,}: rebuild the index")
    if not index.holds(images):
        raise InputError(
            f"index holds {len(index):,} images, but not those of the training set (other pixels, another order, size "
            "or dtype): rebuild the index from this training set"
        )


def pairs_within_radius(
    images: np.ndarray, rows: torch.Tensor, radius: float | Fraction, index: TrainingIndex
) -> tuple[np.ndarray, np.ndarray]:
    """(image numbers, row numbers) of all pairs within a radius of each other.

    Args:
        images: [Q, d], of the rows' dtype.
        rows: [N, d].
        radius: Root mean square difference per value.
        index: An exact index of `rows`.
    """
    limit = squared_radius(radius, rows.shape[1], rows.dtype == torch.uint8)
    return _SelfJoin(rows, limit, index)(images)


class _SelfJoin:
    """All training images within a squared distance of some queries, through an index of nearest neighbors.

    Few images have more than a few duplicates: the nearest four are asked for first, the nearest 64 where all four lie
    within the radius, and every pair only where all 64 do.
    """

    def __init__(
        self, rows: torch.Tensor, limit: int | float, index: TrainingIndex | ShardedIndex | VectorIndex
    ) -> None:
        self.rows, self.limit, self.index = rows, limit, index

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(query rows, training rows) of the pairs within the limit."""
        found, open_rows = [], np.arange(len(images))
        for k in NEIGHBORS_ASKED:
            if k > len(self.rows) or len(open_rows) == 0:
                break
            neighbors = self.index.query(images[open_rows], k)
            within: Any = neighbors.squared_distances <= self.limit
            full = within.all(axis=1)
            rows, columns = np.nonzero(within & ~full[:, None])
            found.append((open_rows[rows], neighbors.indices[rows, columns]))
            open_rows = open_rows[full]
        if len(open_rows):
            first, second, _ = pairs_within(as_rows(images[open_rows]), self.rows, self.limit)
            found.append((open_rows[first.numpy()], second.numpy()))
        queries, training = zip(*found, strict=True)
        return np.concatenate(queries), np.concatenate(training)


class _Forest:
    """Disjoint sets of indices, each rooted in its lowest."""

    def __init__(self, parent: np.ndarray) -> None:
        self.parent = parent.copy()

    def root(self, index: int) -> int:
        while self.parent[index] != index:
            self.parent[index] = self.parent[self.parent[index]]
            index = self.parent[index]
        return index

    def join(self, a: int, b: int) -> None:
        low, high = sorted((self.root(a), self.root(b)))
        self.parent[high] = low

    def roots(self) -> np.ndarray:
        """int64 [N]: the root of every index."""
        parent = self.parent
        while (above := parent[parent]).tobytes() != parent.tobytes():
            parent = above
        return parent


def _identical(images: np.ndarray, flip: bool, progress: Progress) -> np.ndarray:
    """For each image the lowest index with the same contents (or mirrored contents)."""
    keys = None if flip else _keys(images)
    lowest = np.arange(len(images))
    # An image whose key no other has is like no other: there is nothing to hash.
    rows = lowest.copy() if keys is None else np.flatnonzero(np.isin(keys, _repeated(keys)))
    first: dict[bytes, int] = {}
    for start in range(0, len(rows), BLOCK):
        progress("finding identical training images", start, len(rows))
        part = rows[start : start + BLOCK]
        block = np.ascontiguousarray(images[start : start + BLOCK] if keys is None else images[part])
        if block.dtype != np.uint8:
            block = block + np.zeros(1, block.dtype)  # -0.0 and 0.0 are the same value
        digests = [hashlib.sha256(row.data).digest() for row in block]
        if flip:
            digests = [min(d, hashlib.sha256(row.data).digest()) for d, row in zip(digests, mirror(block), strict=True)]
        for row, digest in zip(part.tolist(), digests, strict=True):
            lowest[row] = first.setdefault(digest, row)
    progress("finding identical training images", len(rows), len(rows))
    return lowest


def _keys(images: np.ndarray) -> np.ndarray | None:
    """uint64 [N], equal for equal images of bytes, and hardly ever for others; None where images are not whole words.

    Images as words times random odd ones, modulo 2⁶⁴.
    """
    if images.dtype != np.uint8 or images[:1].nbytes % 8 or images.size == 0 or not images.flags.c_contiguous:
        return None
    words = images.reshape(len(images), -1).view(np.uint64)
    return words @ (np.random.default_rng(0).integers(0, 2**64, words.shape[1], np.uint64) | np.uint64(1))


def _repeated(keys: np.ndarray) -> np.ndarray:
    """The keys that occur more than once."""
    ordered = np.sort(keys)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
