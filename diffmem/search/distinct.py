"""Nearest neighbors as the memorization rule wants them: mirrored queries on request, and a second neighbor that is
no duplicate of the first."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from diffmem.errors import InputError
from diffmem.ops.nearest import exact_squared_distances, pairs_within
from diffmem.progress import Progress, silent
from diffmem.search.duplicates import DuplicateGroups, squared_radius
from diffmem.search.faiss_index import FaissIndex, FaissStats
from diffmem.search.index import TrainingIndex
from diffmem.search.neighbors import Neighbors
from diffmem.search.rows import as_rows, mirror
from diffmem.search.sharded import ShardedIndex
from diffmem.search.vectors import VectorIndex

SearchIndex = TrainingIndex | ShardedIndex | FaissIndex | VectorIndex

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


class DistinctNeighbors:
    """The two nearest training images of any images, duplicates counted as neighbors or taken out.

    Args:
        index: An index of the training images.
        training: The training images, [N, C, H, W], or vectors [N, d]; queries are then `Views`.
        groups: The training set's duplicates, found with the same radius and flip.
        radius: Root mean square difference per value within which two training images are duplicates.
        flip: A training image counts at the smaller of its distances to the image and to the mirrored image; of
            vectors, two training images' do not.
        progress: Called as `progress(stage, done, total)`.

    Attributes:
        recall: Recall of the last call of `nearest`, if the index may miss neighbors: what it measured of itself, for
            each orientation.
    """

    def __init__(
        self,
        index: SearchIndex,
        training: np.ndarray,
        groups: DuplicateGroups,
        *,
        radius: float | Fraction = 0,
        flip: bool = False,
        progress: Progress = silent,
    ):
        self.index, self.training, self.groups, self.flip, self.progress = index, training, groups, flip, progress
        self.recall: tuple[FaissStats, ...] = ()
        self.radius, self._rows = radius, as_rows(training)
        self._limit = squared_radius(radius, self._rows.shape[1], self._rows.dtype == torch.uint8)

    def nearest(self, images: np.ndarray | Views, k: int = 2) -> Neighbors:
        """The k nearest training images, duplicates counted as neighbors."""
        self.recall = ()
        return self._nearest(self.index, images, k)

    def outside_duplicates(self, images: np.ndarray | Views, nearest: Neighbors) -> Neighbors:
        """`nearest` (k = 2) with each second neighbor replaced by the nearest image that is farther than the radius
        from the first one.

        Raises InputError where all training images lie within the radius of one.
        """
        result = nearest.copy()
        firsts = nearest.indices[:, 0]
        # An image that is alone in its group has no other within the radius.
        open_rows = np.flatnonzero(self.groups.sizes[firsts] > 1)
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
            others = self._outside(first)
            index = TrainingIndex(self.training[others], device=str(self.index.device))
            near = self._nearest(index, images[rows], 1)
            near = Neighbors(others[near.indices], near.squared_distances, near.dimension, near.mirrored)
            _set_second(result, rows, near, np.arange(len(rows)), np.zeros(len(rows), np.int64))
        return result

    def are_duplicates(self, some: np.ndarray, others: np.ndarray) -> np.ndarray:
        """bool [n]: whether training images some[i] and others[i] lie within the radius of each other."""
        return self.squared_distances(some, others) <= self._limit

    def squared_distances(self, some: np.ndarray, others: np.ndarray) -> np.ndarray:
        """[n]: the squared distances of training images some[i] and others[i], the smaller one of the two orientations
        with `flip`; int64 for uint8 images."""
        columns = torch.from_numpy(others)
        squared = exact_squared_distances(self._rows, self._rows, torch.from_numpy(some), columns).numpy()
        if self.flip and self.training.ndim == 4 and len(some):
            unique, rows = np.unique(some, return_inverse=True)
            mirrored = as_rows(mirror(self.training[unique]))
            flipped = exact_squared_distances(mirrored, self._rows, torch.from_numpy(rows), columns).numpy()
            squared = np.minimum(squared, flipped)
        return squared

    def _outside(self, first: int) -> np.ndarray:
        """The training images that are farther than the radius from training image `first`."""
        image = self.training[first : first + 1]
        near = np.zeros(len(self.training), bool)
        for view in (image, mirror(image)) if self.flip and image.ndim == 4 else (image,):
            near[pairs_within(as_rows(view), self._rows, self._limit)[1].numpy()] = True
        if near.all():
            raise InputError(
                f"all {len(near):,} training images lie within the duplicate radius {float(self.radius):g} of training "
                f"image {first}: choose a smaller duplicate radius"
            )
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
        found = index.query(images, k, progress=self.progress)
        if isinstance(index, FaissIndex) and index.stats is not None:
            self.recall = (*self.recall, index.stats)
        return found


def _set_second(
    target: Neighbors, rows: np.ndarray, source: Neighbors, source_rows: np.ndarray, columns: np.ndarray
) -> None:
    target.indices[rows, 1] = source.indices[source_rows, columns]
    target.squared_distances[rows, 1] = source.squared_distances[source_rows, columns]
    if target.mirrored is not None and source.mirrored is not None:
        target.mirrored[rows, 1] = source.mirrored[source_rows, columns]


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
    return Neighbors(indices, squared, straight.dimension, flags)
