"""What a search answers: for each query, its k nearest training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Neighbors:
    """The k nearest training images of each of Q queries, nearest first; equal distances go to the lower index.

    Attributes:
        indices: int64 [Q, k], into the training set.
        squared_distances: [Q, k] squared Euclidean distances, int64 and exact for uint8 images, float64 for floats.
        dimension: d, the number of values of one image.
        mirrored: bool [Q, k], True where the mirrored query was the nearer one; None where mirroring was not asked for.
        unseen: float64 [Q], from a search that may miss neighbors: no training image that it did not look at is nearer
            than this (Euclidean); None: it looked at all.
    """

    indices: np.ndarray
    squared_distances: np.ndarray
    dimension: int
    mirrored: np.ndarray | None = None
    unseen: np.ndarray | None = None

    @property
    def distances(self) -> np.ndarray:
        """Euclidean distances, float64 [Q, k]."""
        return np.sqrt(self.squared_distances.astype(np.float64))

    @property
    def rms(self) -> np.ndarray:
        """Distance / √d: the root mean square difference per value (gray levels for uint8), float64 [Q, k]."""
        return np.sqrt(self.squared_distances / np.float64(self.dimension))

    @property
    def distance_ratios(self) -> np.ndarray:
        """d1 / d2, nearest over second nearest, float64 [Q], for display: 0 where d1 is 0. Needs k of at least 2."""
        first, second = self.squared_distances[:, :2].astype(np.float64).T
        return np.sqrt(np.divide(first, second, out=np.zeros_like(first), where=first > 0))

    def first(self, k: int) -> Neighbors:
        """The k nearest alone."""
        mirrored = None if self.mirrored is None else self.mirrored[:, :k]
        return Neighbors(self.indices[:, :k], self.squared_distances[:, :k], self.dimension, mirrored, self.unseen)

    def select(self, rows: np.ndarray) -> Neighbors:
        """The answers to the queries of `rows`."""
        mirrored = None if self.mirrored is None else self.mirrored[rows]
        unseen = None if self.unseen is None else self.unseen[rows]
        return Neighbors(self.indices[rows], self.squared_distances[rows], self.dimension, mirrored, unseen)

    @classmethod
    def join(cls, parts: Sequence[Neighbors]) -> Neighbors:
        """The answers of several queries of the same training set as one."""
        if len(parts) == 1:
            return parts[0]
        arrays = [np.concatenate([getattr(part, name) for part in parts]) for name in ("indices", "squared_distances")]
        mirrored = None if parts[0].mirrored is None else np.concatenate([part.mirrored for part in parts])
        unseen = None
        if any(part.unseen is not None for part in parts):
            looked_at_all = [np.full(len(part), np.inf) if part.unseen is None else part.unseen for part in parts]
            unseen = np.concatenate(looked_at_all)
        return cls(arrays[0], arrays[1], parts[0].dimension, mirrored, unseen)

    def copy(self) -> Neighbors:
        """The same with arrays of its own."""
        mirrored = None if self.mirrored is None else self.mirrored.copy()
        unseen = None if self.unseen is None else self.unseen.copy()
        return Neighbors(self.indices.copy(), self.squared_distances.copy(), self.dimension, mirrored, unseen)

    def __len__(self) -> int:
        return len(self.indices)
