"""Nearest neighbours as the memorization rule wants them: mirrored queries on request, and a second neighbour that is
no duplicate of the first."""

from __future__ import annotations

import numpy as np

from diffmem.progress import Progress, silent
from diffmem.search.duplicates import DuplicateGroups
from diffmem.search.faiss_index import FaissIndex
from diffmem.search.index import TrainingIndex
from diffmem.search.neighbors import Neighbors
from diffmem.search.rows import mirror
from diffmem.search.sharded import ShardedIndex

SearchIndex = TrainingIndex | ShardedIndex | FaissIndex

WIDEST_QUERY = 64  # neighbours asked for at once before a group is left out of the training set instead


class DistinctNeighbors:
    """The two nearest training images of any images, duplicates left in or taken out.

    index, training: the training images [N, C, H, W] and their index.
    groups: which training images are duplicates of which.
    flip: a training image counts at the smaller of its distances to the image and to the mirrored image.
    """

    def __init__(
        self,
        index: SearchIndex,
        training: np.ndarray,
        groups: DuplicateGroups,
        *,
        flip: bool = False,
        progress: Progress = silent,
    ):
        self.index, self.training, self.groups, self.flip, self.progress = index, training, groups, flip, progress

    def nearest(self, images: np.ndarray, k: int = 2) -> Neighbors:
        """The k nearest training images, duplicates left in."""
        return self._nearest(self.index, images, k)

    def outside_duplicates(self, images: np.ndarray, nearest: Neighbors) -> Neighbors:
        """`nearest` (k = 2) with each second neighbour replaced by the nearest image outside the group of the first."""
        group_of = self.groups.group_of
        result = _copy(nearest)
        firsts = group_of[nearest.indices[:, 0]]
        open_rows = np.flatnonzero(firsts == group_of[nearest.indices[:, 1]])
        for k in (8, WIDEST_QUERY):
            if len(open_rows) == 0 or k > len(self.training):
                break
            wider = self._nearest(self.index, images[open_rows], k)
            outside = group_of[wider.indices] != firsts[open_rows, None]
            found = np.flatnonzero(outside.any(axis=1))
            _set_second(result, open_rows[found], wider, found, outside.argmax(axis=1)[found])
            open_rows = np.delete(open_rows, found)
        # Groups so large that they fill the widest query: leave each out of the training set in turn.
        for group in np.unique(firsts[open_rows]):
            rows = open_rows[firsts[open_rows] == group]
            others = np.flatnonzero(group_of != group)
            index = TrainingIndex(self.training[others], device=str(self.index.device))
            found = self._nearest(index, images[rows], 1)
            found = Neighbors(others[found.indices], found.squared_distances, found.dimension, found.mirrored)
            _set_second(result, rows, found, np.arange(len(rows)), np.zeros(len(rows), np.int64))
        return result

    def _nearest(self, index: SearchIndex, images: np.ndarray, k: int) -> Neighbors:
        straight = index.query(images, k, progress=self.progress)
        if not self.flip:
            return straight
        # The k nearest by the smaller distance are among the k nearest of the two orientations: an image of that answer
        # has fewer than k images before it in its own orientation's order, as each of those comes before it in the
        # joint order too.
        return _merge_orientations(straight, index.query(mirror(images), k, progress=self.progress))


def _copy(neighbors: Neighbors) -> Neighbors:
    mirrored = None if neighbors.mirrored is None else neighbors.mirrored.copy()
    return Neighbors(neighbors.indices.copy(), neighbors.squared_distances.copy(), neighbors.dimension, mirrored)


def _set_second(
    target: Neighbors, rows: np.ndarray, source: Neighbors, source_rows: np.ndarray, columns: np.ndarray
) -> None:
    target.indices[rows, 1] = source.indices[source_rows, columns]
    target.squared_distances[rows, 1] = source.squared_distances[source_rows, columns]
    if target.mirrored is not None:
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
