"""Lower bounds of all distances between queries and training images, by one narrow matrix product.

They are those of the filtered search (csrc/nearest/nearest.h), whose code an index holds already: of its first fine
levels, 60 coordinates each, and the length of what they leave out, in int16.
"""

from __future__ import annotations

import math

import numpy as np

from diffmem.lazy import torch
from diffmem.search.filtered import LEVEL_COORDINATES, FilteredRows
from diffmem.search.index import TrainingIndex


class LowerBounds:
    """Which pairs of queries and training images may be within a distance of each other.

    Args:
        index: Index of the training images. One without a code (a small set, or one on a GPU) excludes no pair.
        queries: [Q, d] rows, of the training images' dtype.
        levels: How many levels of the code are used, where it has so many.
    """

    def __init__(self, index: TrainingIndex, queries: torch.Tensor, levels: int = 1) -> None:
        self.coded = index.filtered
        self.shape = len(queries), len(index)
        if self.coded is None:
            return
        filtered: FilteredRows = self.coded
        near = torch.ones(len(queries), dtype=torch.bool)
        if queries.dtype != torch.uint8:
            near = filtered.within_reach(queries)
        self.outside = torch.nonzero(~near)[:, 0]  # farther out than the code reaches: nothing is said of them
        levels = min(levels, filtered.levels)
        self.coordinates = levels * LEVEL_COORDINATES
        self.queries = torch.zeros(len(queries), self.coordinates + 1)
        self.errors = torch.zeros(len(queries), dtype=torch.float64)
        code = filtered.encode(queries[near])
        self.queries[near] = _values(code.fine, levels)
        self.errors[near] = torch.from_numpy(code.error[:, levels].astype(np.float64))
        place = np.empty(len(filtered.order), np.int64)
        place[filtered.order] = np.arange(len(place))
        self.training = _values(filtered.fine, levels)[torch.from_numpy(place)]
        self.longest = float(self.training.norm(dim=1).max())
        d, m = index.dimension, self.coordinates
        delta = 4 * (d + m + 8) * math.sqrt(m + 1) * 2.0**-53
        self.slack = float(filtered.error[levels]) * (1 + 1e-6) + 4 * 32767 * math.sqrt(delta)
        self.rounding = 1 + (d + 16) * 2.0**-52

    def may_be_within(
        self, rows: slice, columns: slice, squared: torch.Tensor | None, of_training: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pairs that may be within a distance given by query, or within one given by training image.

        Args:
            rows: Queries.
            columns: Training images.
            squared: [q], a squared distance for each of these queries, or None.
            of_training: [n], one for each of these training images, or None.

        Returns:
            bool [q, n]: True for every pair at most so far apart, and for some others.
        """
        from diffmem.precision import float32_products

        shape = tuple(len(range(*part.indices(n))) for part, n in zip((rows, columns), self.shape, strict=True))
        if self.coded is None:
            return torch.ones(shape, dtype=torch.bool)
        x, y = self.queries[rows], self.training[columns]
        norms = x.double().square().sum(dim=1)
        with float32_products("ieee"):
            # ‖x − y‖² − ‖x‖²; the norms are integers below 2³¹, rounded once.
            scores = torch.addmm(y.double().square().sum(dim=1).float(), x, y.T, alpha=-2)
        product = 3 * (self.coordinates + 4) * 2.0**-23 * (norms.sqrt() + self.longest) * self.longest
        found = torch.zeros(shape, dtype=torch.bool)
        if squared is not None:
            reach = self._reach(squared, self.errors[rows])
            found |= scores <= _up(reach.square() + product - norms)[:, None]
        if of_training is not None:
            reach = self._reach(of_training, self.errors[rows].max())
            # One more addition in float32, of numbers below 4 (longest + ‖x‖)².
            product += 2.0**-22 * (norms.sqrt() + self.longest).square()
            found |= scores + (norms - product).float()[:, None] <= _up(reach.square())
        for row in (self.outside - rows.indices(self.shape[0])[0]).tolist():
            if 0 <= row < shape[0]:
                found[row] = True
        return found

    def _reach(self, squared: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
        """How far apart the codes of two points within a distance can be."""
        assert self.coded is not None
        return self.coded.scale * squared.double().sqrt() * self.rounding + errors * (1 + 1e-6) + self.slack


def _values(fine: np.ndarray, levels: int) -> torch.Tensor:
    """float32 [n, 60·levels + 1]: the coordinates of the first levels, and the length that these leave out."""
    parts = [fine[level, :, :LEVEL_COORDINATES] for level in range(levels)]
    parts.append(fine[levels - 1, :, LEVEL_COORDINATES : LEVEL_COORDINATES + 1])
    return torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))


def _up(values: torch.Tensor) -> torch.Tensor:
    """float64 as the next float32 above."""
    rounded = values.float()
    return torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
