"""Nearest neighbors as the memorization rule wants them: mirrored queries on request, and a second neighbor that is
no duplicate of the first."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from diffmem.errors import InputError
from diffmem.lazy import torch
from diffmem.ops.nearest import exact_squared_distances, pairs_within
from diffmem.progress import Progress, silent
from diffmem.search.duplicates import squared_radius
from diffmem.search.faiss_index import FaissIndex
from diffmem.search.index import TrainingIndex
from diffmem.search.neighbors import Neighbors
from diffmem.search.rows import as_rows, mirror
from diffmem.search.sharded import ShardedIndex
from diffmem.search.vectors import VectorIndex

SearchIndex = TrainingIndex | ShardedIndex | FaissIndex | VectorIndex

GATHERED = 1 << 24  # values compared at a time
WIDEST_QUERY = 64  # neighbors asked for at once before duplicates are left out of the training set instead


@dataclass(frozen=True)
class Views:
    """Query rows, as they are and mirrored, where mirroring rows is not mirroring images: vectors of images.

    Attributes:
        straight: [Q, d].
        mirrored: [Q, d], of the mirrored images; None where these are not asked for.
    """

    straight: np.ndarray
    mirrored: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.straight)

    def __getitem__(self, rows: np.ndarray) -> Views:
        return Views(self.straight[rows], None if self.mirrored is None else self.mirrored[rows])


class StoredRows(Protocol):
    """Training rows that are not held in memory: those of an index in its folder."""

    dimension: int
    dtype: np.dtype
    groups_hold: bool  # whether the duplicates known are all there are within the radius, with `flip`

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number, as they are compared: [n, d], or images [n, C, H, W]."""
        ...

    def within(self, view: np.ndarray, limit: int | float) -> np.ndarray:
        """The rows within a squared distance of one row [1, …], ascending."""
        ...


class Groups(Protocol):
    """Duplicates of a training set, as `DuplicateGroups` has them."""

    @property
    def distinct(self) -> int: ...

    def sizes_of(self, rows: np.ndarray) -> np.ndarray: ...


class DistinctNeighbors:
    """The two nearest training images of any images, duplicates counted as neighbors or taken out.

    Args:
        index: An index of the training images.
        training: The training images, [N, C, H, W], or vectors [N, d]; queries are then `Views`. Or where these lie.
        groups: The training set's duplicates, found with the same radius and flip.
        radius: Root mean square difference per value within which two training images are duplicates.
        flip: A training image counts at the smaller of its distances to the image and to the mirrored image; of
            vectors, two training images' do not.
        progress: Called as `progress(stage, done, total)`.
    """

    def __init__(
        self,
        index: SearchIndex,
        training: np.ndarray | StoredRows,
        groups: Groups,
        *,
        radius: float | Fraction = 0,
        flip: bool = False,
        progress: Progress = silent,
    ):
        self.index, self.training, self.groups, self.flip, self.progress = index, training, groups, flip, progress
        self._exact: DistinctNeighbors | None = None
        self.radius = radius
        dimension = math.prod(training.shape[1:]) if isinstance(training, np.ndarray) else training.dimension
        integer = training.dtype == np.uint8
        self._limit = squared_radius(radius, dimension, integer)

    @cached_property
    def _rows(self) -> torch.Tensor | None:
        return as_rows(self.training) if isinstance(self.training, np.ndarray) else None

    def exactly(self) -> DistinctNeighbors:
        """The same through an exact index, where this one may miss neighbors."""
        if self._exact is None:
            index: Any
            if isinstance(self.index, FaissIndex) or getattr(self.index, "method", None) == "faiss":
                rows = self.index.rows  # type: ignore[union-attr]
                index = TrainingIndex(rows, device=str(self.index.device))
            else:
                index = getattr(self.index, "exact", self.index)
            self._exact = DistinctNeighbors(
                index, self.training, self.groups, radius=self.radius, flip=self.flip, progress=self.progress
            )
        return self._exact

    def nearest(self, images: np.ndarray | Views, k: int = 2) -> Neighbors:
        """The k nearest training images, duplicates counted as neighbors."""
        return self._nearest(self.index, images, k)

    def outside_duplicates(self, images: np.ndarray | Views, nearest: Neighbors) -> Neighbors:
        """`nearest` (k = 2) with each second neighbor replaced by the nearest image that is farther than the radius
        from the first one.

        Raises InputError where all training images lie within the radius of one.
        """
        result = nearest.copy()
        firsts = nearest.indices[:, 0]
        open_rows = np.arange(len(firsts))
        if isinstance(self.training, np.ndarray) or self.training.groups_hold:
            # An image that is alone in its group has no other within the radius.
            open_rows = np.flatnonzero(self.groups.sizes_of(firsts) > 1)
        open_rows = open_rows[self.are_duplicates(firsts[open_rows], nearest.indices[open_rows, 1])]
        for k in (8, WIDEST_QUERY):
            if len(open_rows) == 0 or k > len(self.training):
                break
            wider = self._nearest(self.index, images[open_rows], k)
            among = np.repeat(firsts[open_rows], k)
            outside = ~self.are_duplicates(among, wider.indices.reshape(-1)).reshape(-1, k)
            found = np.flatnonzero(outside.any(axis=1))
            _set_second(result, open_rows[found], wider, found, outside.argmax(axis=1)[found])
            open_rows = np.delete(open_rows, found)
        # Images with so many duplicates that they fill the widest query: leave each one's out of the training set.
        for first in np.unique(firsts[open_rows]):
            rows = open_rows[firsts[open_rows] == first]
            if not isinstance(self.training, np.ndarray):
                self._set_beyond(result, images, int(first), rows)
                continue
            others = self._outside(first)
            index = TrainingIndex(self.training[others], device=str(self.index.device))
            near = self._nearest(index, images[rows], 1)
            near = replace(near, indices=others[near.indices])
            _set_second(result, rows, near, np.arange(len(rows)), np.zeros(len(rows), np.int64))
        return result

    def are_duplicates(self, some: np.ndarray, others: np.ndarray) -> np.ndarray:
        """bool [n]: whether training images some[i] and others[i] lie within the radius of each other."""
        return self.squared_distances(some, others) <= self._limit

    def squared_distances(self, some: np.ndarray, others: np.ndarray) -> np.ndarray:
        """[n]: the squared distances of training images some[i] and others[i], the smaller one of the two orientations
        with `flip`; int64 for uint8 images."""
        if isinstance(self.training, np.ndarray) and self.training.dtype == np.uint8:
            return self._of_bytes(some, others)
        columns = torch.from_numpy(others)
        if self._rows is None:
            which, columns = (torch.from_numpy(each) for each in np.unique(others, return_inverse=True))
            right = as_rows(self._take(which.numpy()))
        else:
            right = self._rows
        unique, rows = np.unique(some, return_inverse=True)
        left = self._take(unique)
        squared = exact_squared_distances(as_rows(left), right, torch.from_numpy(rows), columns).numpy()
        if self.flip and left.ndim == 4 and len(some):
            mirrored = as_rows(mirror(left))
            flipped = exact_squared_distances(mirrored, right, torch.from_numpy(rows), columns).numpy()
            squared = np.minimum(squared, flipped)
        return squared

    def _of_bytes(self, some: np.ndarray, others: np.ndarray) -> np.ndarray:
        """`squared_distances` of images of bytes in memory, without PyTorch."""
        assert isinstance(self.training, np.ndarray)
        squared = np.empty(len(some), np.int64)
        step = max(1, GATHERED // math.prod(self.training.shape[1:]))
        for start in range(0, len(some), step):
            part = slice(start, start + step)
            left, right = self._take(some[part]), self._take(others[part])
            squared[part] = _squared_differences(left, right)
            if self.flip and left.ndim == 4:
                squared[part] = np.minimum(squared[part], _squared_differences(mirror(left), right))
        return squared

    def _take(self, rows: np.ndarray) -> np.ndarray:
        return self.training[rows] if isinstance(self.training, np.ndarray) else self.training.take(rows)

    def _set_beyond(self, result: Neighbors, images: np.ndarray | Views, first: int, rows: np.ndarray) -> None:
        """Sets the second neighbors of `rows`, whose first one has very many duplicates, without leaving these out: by
        as many neighbors as there are duplicates, and one more."""
        assert not isinstance(self.training, np.ndarray)
        image = self.training.take(np.array([first]))
        views = (image, mirror(image)) if self.flip and image.ndim == 4 else (image,)
        near = np.unique(np.concatenate([self.training.within(view, self._limit) for view in views]))
        if len(near) == len(self.training):
            raise InputError(_all_within(len(near), float(self.radius), first))
        found = self._nearest(self.exactly().index, images[rows], len(near) + 1)
        outside = ~np.isin(found.indices, near)
        _set_second(result, rows, found, np.arange(len(rows)), outside.argmax(axis=1))

    def _outside(self, first: int) -> np.ndarray:
        """The training images that are farther than the radius from training image `first`."""
        assert isinstance(self.training, np.ndarray)
        assert self._rows is not None
        image = self.training[first : first + 1]
        near = np.zeros(len(self.training), bool)
        for view in (image, mirror(image)) if self.flip and image.ndim == 4 else (image,):
            near[pairs_within(as_rows(view), self._rows, self._limit)[1].numpy()] = True
        if near.all():
            raise InputError(_all_within(len(near), float(self.radius), first))
        return np.flatnonzero(~near)

    def _nearest(self, index: SearchIndex, images: np.ndarray | Views, k: int) -> Neighbors:
        views = images if isinstance(images, Views) else Views(images, mirror(images) if self.flip else None)
        straight = self._query(index, views.straight, k)
        if views.mirrored is None:
            return straight
        # The k nearest by the smaller distance are among the k nearest of the two orientations: an image of that answer
        # has fewer than k images before it in its own orientation's order, as each of those comes before it in the
        # joint order too.
        return _merge_orientations(straight, self._query(index, views.mirrored, k))

    def _query(self, index: SearchIndex, images: np.ndarray, k: int) -> Neighbors:
        return index.query(images, k, progress=self.progress)


def _squared_differences(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """int64 [n], of images of bytes [n, …]."""
    # A square of a difference of bytes is below 2^16 and fits int32; the sums are int64.
    difference = (left.astype(np.int32) - right).reshape(len(left), -1)
    return np.square(difference).sum(axis=1, dtype=np.int64)


def _all_within(images: int, radius: float, first: int) -> str:
    return (
        f"all {images:,} training images lie within the duplicate radius {radius:g} of training image {first}: choose "
        "a smaller duplicate radius"
    )


def _set_second(
    target: Neighbors, rows: np.ndarray, source: Neighbors, source_rows: np.ndarray, columns: np.ndarray
) -> None:
    target.indices[rows, 1] = source.indices[source_rows, columns]
    target.squared_distances[rows, 1] = source.squared_distances[source_rows, columns]
    if target.mirrored is not None and source.mirrored is not None:
        target.mirrored[rows, 1] = source.mirrored[source_rows, columns]
    if target.unseen is not None and source.unseen is not None:
        target.unseen[rows] = np.minimum(target.unseen[rows], source.unseen[source_rows])


def _merge_orientations(straight: Neighbors, mirrored: Neighbors) -> Neighbors:
    """The k nearest distinct images of both answers, by (distance, index); an unmirrored match goes before a
    mirrored one."""
    k = straight.indices.shape[1]
    indices = np.hstack([straight.indices, mirrored.indices])
    squared = np.hstack([straight.squared_distances, mirrored.squared_distances])
    flags = np.repeat([[False, True]], k, axis=1).repeat(len(indices), axis=0)
    order = np.lexsort((flags, indices, squared), axis=1)
    indices, squared, flags = (np.take_along_axis(values, order, 1) for values in (indices, squared, flags))
    # An image found in both orientations counts once, where it is nearer.
    repeated = np.zeros(indices.shape, bool)
    for column in range(1, indices.shape[1]):
        repeated[:, column] = (indices[:, :column] == indices[:, column : column + 1]).any(axis=1)
    keep = np.argsort(repeated, axis=1, kind="stable")[:, :k]
    indices, squared, flags = (np.take_along_axis(values, keep, 1) for values in (indices, squared, flags))
    unseen = None
    if straight.unseen is not None and mirrored.unseen is not None:
        unseen = np.minimum(straight.unseen, mirrored.unseen)
    return Neighbors(indices, squared, straight.dimension, flags, unseen)
