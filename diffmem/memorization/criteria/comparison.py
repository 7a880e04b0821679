"""The sets that a criterion compares, and the searches between them, each made once and shared by all criteria."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from diffmem.errors import InputError
from diffmem.progress import Progress, silent
from diffmem.search import Neighbors, TrainingIndex
from diffmem.search.rows import as_rows, check_finite

IN_MEMORY = 1 << 31  # bytes of unit vectors up to which they are kept in memory
BLOCK_VALUES = 1 << 24
COSINE_CANDIDATES = 2
COSINE_WIDEST = 64
COSINE_ROUNDING = 3e-7  # of the distance of two unit vectors that were rounded to float32


@dataclass(frozen=True, eq=False)
class Points:
    """A set of points.

    Attributes:
        values: [n, d] vectors or [n, C, H, W] images; uint8, float32 or float64.
        what: "generated", "training", "holdout" or "second", for messages.
        cells: int64 [n], the cell of each, or None.
    """

    values: np.ndarray
    what: str
    cells: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def rows(self) -> torch.Tensor:
        """[n, d]."""
        return as_rows(self.values, f"{self.what} images")

    @property
    def dimension(self) -> int:
        """d."""
        return self.rows.shape[1]

    @cached_property
    def zero(self) -> np.ndarray:
        """bool [n]: rows of zeros, which have no direction."""
        return np.concatenate([(block == 0).all(dim=1).numpy() for block in self._blocks()])

    @cached_property
    def nonnegative(self) -> bool:
        """Whether no value is negative, so that no cosine is."""
        return self.rows.dtype == torch.uint8 or all(bool((block >= 0).all()) for block in self._blocks())

    def select(self, places: np.ndarray) -> Points:
        """Those of `places`."""
        return Points(self.values[places], self.what, None if self.cells is None else self.cells[places])

    def spread(self, most: int) -> Points:
        """At most so many of them, evenly spaced; the same object each time, so that searches are shared."""
        if len(self) <= most:
            return self
        return self._spread.setdefault(most, self.select(spread_places(len(self), most)))

    @cached_property
    def _spread(self) -> dict[int, Points]:
        return {}

    def unit(self) -> np.ndarray:
        """float32 [n', d]: the rows that are not zeros, divided by their length (in float64); on disk where large."""
        shape = int((~self.zero).sum()), self.dimension
        if shape[0] * shape[1] * 4 <= IN_MEMORY:
            out = np.empty(shape, np.float32)
        else:
            with tempfile.TemporaryFile() as file:
                out = np.memmap(file, np.float32, "w+", shape=shape)
        start = 0
        for block in self._blocks():
            block = block[(block != 0).any(dim=1)].double()
            # Scaled first, so that squares neither overflow nor vanish.
            block /= block.abs().amax(dim=1, keepdim=True)
            out[start : start + len(block)] = (block / block.norm(dim=1, keepdim=True)).numpy()
            start += len(block)
        return out

    def _blocks(self) -> Iterator[torch.Tensor]:
        return self.rows.split(max(1, BLOCK_VALUES // self.dimension))


def spread_places(count: int, most: int) -> np.ndarray:
    """int64: at most `most` of `count` places, evenly spaced."""
    return np.linspace(0, count - 1, min(most, count)).astype(np.int64)


@dataclass(eq=False)
class Searches:
    """Searches between sets of points: what was found is kept, by the sets."""

    device: str = "auto"
    progress: Progress = silent
    _indices: dict[int, TrainingIndex] = field(default_factory=dict)
    _found: dict[tuple[int, int], Neighbors] = field(default_factory=dict)
    _others: dict[int, np.ndarray] = field(default_factory=dict)
    _unit: dict[int, np.ndarray] = field(default_factory=dict)
    _unit_indices: dict[int, TrainingIndex] = field(default_factory=dict)
    _cosines: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    _kept: list[Points] = field(default_factory=list)

    def index(self, points: Points) -> TrainingIndex:
        """The exact index of some points."""
        if id(points) not in self._indices:
            self._kept.append(points)  # its id stays its own
            self._indices[id(points)] = TrainingIndex(points.values, device=self.device, progress=self.progress)
        return self._indices[id(points)]

    def nearest(self, points: Points, targets: Points, k: int) -> Neighbors:
        """The k nearest targets of each point. Of a point among the same points: of the others."""
        k = min(k, len(targets) - (points is targets))
        key = id(points), id(targets)
        if key not in self._found or self._found[key].indices.shape[1] < k:
            self._kept.append(points)
            self._found[key] = self._search(points, targets, k)
        return self._found[key].first(k)

    def _search(self, points: Points, targets: Points, k: int) -> Neighbors:
        index = self.index(targets)
        if points is not targets:
            return index.query(points.values, k, progress=self.progress)
        return without_self(index.query(points.values, k + 1, progress=self.progress), np.arange(len(points)))

    def nearest_other(self, points: Points, places: np.ndarray) -> np.ndarray:
        """[len(places)]: the squared distance of each of these points to the nearest other one, 0 where it has a
        duplicate; infinite where there is no other. Each place is searched once."""
        integer = points.rows.dtype == torch.uint8
        unknown = -1 if integer else -1.0
        if len(points) < 2:
            return np.full(len(places), np.inf)
        known = self._others.setdefault(id(points), np.full(len(points), unknown))
        missing = np.unique(places[known[places] == unknown])
        if len(missing):
            self._kept.append(points)
            found = self.index(points).query(points.values[missing], 2, progress=self.progress)
            known[missing] = without_self(found, missing).squared_distances[:, 0]
        return known[places]

    def largest_cosine(self, points: Points, targets: Points, places: np.ndarray | None = None) -> np.ndarray:
        """float64 [n]: the cosine of each point with the target that has the largest, NaN for points of zeros; of a
        point among the same points with another one.

        Candidates come from vectors rounded to float32, and their cosines are computed from the values, in float64:
        a target is missed only where 64 others are as near to within 3e-7.

        Args:
            points: Of which cosines are wanted.
            targets: With which.
            places: Only of these points.
        """
        key = id(points), id(targets)
        if places is None and key in self._cosines:
            return self._cosines[key]
        if targets.zero.all():
            raise InputError(f"{targets.what}: all vectors are zeros, which have no direction")
        units = self._units(points)
        own = np.cumsum(~points.zero) - 1  # place -> row of `units`
        wanted = np.arange(len(points)) if places is None else places
        rows = wanted[~points.zero[wanted]]
        cosines = np.full(len(wanted), np.nan)
        cosines[~points.zero[wanted]] = self._cosines_of(points, targets, rows, units[own[rows]])
        if places is None:
            self._cosines[key] = cosines
        return cosines

    def largest_absolute_cosine(self, points: Points, targets: Points) -> np.ndarray:
        """The same of |cosine|: MiFID takes opposite vectors for equal ones."""
        cosines = self.largest_cosine(points, targets)
        if points.nonnegative and targets.nonnegative:
            return cosines
        key = id(points), -id(targets)
        if key not in self._cosines:
            rows = np.flatnonzero(~points.zero)
            opposite = np.full(len(points), np.nan)
            opposite[rows] = -self._cosines_of(points, targets, rows, -self._units(points), sign=-1)
            self._cosines[key] = opposite
        return np.maximum(np.abs(cosines), np.abs(self._cosines[key]))

    def _units(self, points: Points) -> np.ndarray:
        if id(points) not in self._unit:
            self._kept.append(points)
            self._unit[id(points)] = points.unit()
        return self._unit[id(points)]

    def _unit_index(self, points: Points) -> TrainingIndex:
        if id(points) not in self._unit_indices:
            self._unit_indices[id(points)] = TrainingIndex(
                self._units(points), device=self.device, progress=self.progress
            )
        return self._unit_indices[id(points)]

    def _cosines_of(
        self, points: Points, targets: Points, rows: np.ndarray, units: np.ndarray, sign: int = 1
    ) -> np.ndarray:
        """The largest sign · cosine of points[rows], whose unit vectors (times sign) are given."""
        places = np.flatnonzero(~targets.zero)  # row of the index -> target
        itself = points is targets
        best = np.full(len(rows), -np.inf)
        waiting = np.arange(len(rows))
        index = self._unit_index(targets)
        if len(index) - itself < 1:
            raise InputError(f"{targets.what}: a single vector has no other to be compared with")
        for k in (COSINE_CANDIDATES, COSINE_WIDEST):
            k = min(k + itself, len(index))
            found = index.query(units[waiting], k, progress=self.progress)
            candidates, distances = places[found.indices], found.distances
            if itself:
                distances[candidates == rows[waiting, None]] = np.inf
            # What is farther than the nearest by more than the rounding has a smaller cosine.
            limit = distances.min(axis=1, keepdims=True) + 2 * COSINE_ROUNDING
            some, columns = np.nonzero(distances <= limit)
            cosines = sign * exact_cosines(points, targets, rows[waiting[some]], candidates[some, columns])
            np.maximum.at(best, waiting[some], cosines)
            waiting = waiting[found.distances[:, -1] <= limit[:, 0]]
            if k == len(index) or not len(waiting):
                break
        return sign * best


def without_self(found: Neighbors, places: np.ndarray) -> Neighbors:
    """Answers of k + 1 neighbors to points of the same set as answers of k others: without the point itself, or, where
    duplicates come before it, without the last."""
    itself = found.indices == places[:, None]
    itself[~itself.any(axis=1), -1] = True
    kept = np.nonzero(~itself)[1].reshape(len(places), -1)
    return Neighbors(
        np.take_along_axis(found.indices, kept, 1),
        np.take_along_axis(found.squared_distances, kept, 1),
        found.dimension,
    )


def exact_cosines(points: Points, targets: Points, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """float64: the cosine of points[rows[i]] and targets[columns[i]], none of them zeros, from their values."""
    found = np.empty(len(rows))
    step = max(1, BLOCK_VALUES // points.dimension)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        x = points.rows[torch.from_numpy(rows[part])].double()
        y = targets.rows[torch.from_numpy(columns[part])].double()
        if points.rows.dtype != torch.uint8:
            x, y = x / x.abs().amax(dim=1, keepdim=True), y / y.abs().amax(dim=1, keepdim=True)
        products = (x * y).sum(dim=1)
        found[part] = (products / (x.square().sum(dim=1) * y.square().sum(dim=1)).sqrt()).numpy()
    return found


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a criterion measures on.

    Attributes:
        generated: The generated images, or what is played in their place.
        training: The training images.
        holdout: Real images that the model has not seen, or None.
        second: What a second model generated from the same latents, or None.
        second_training: What that was trained on; None where it is the same training set.
        searches: Between them.
        neighbors: How many nearest training images are searched for a generated image at once.
        seed: Of what is drawn.
        settings: What was chosen of a criterion, by its name: {"three_phases": {"delta_m": 10}}.
    """

    generated: Points
    training: Points
    holdout: Points | None = None
    second: Points | None = None
    second_training: Points | None = None
    searches: Searches = field(default_factory=Searches)
    neighbors: int = 2
    seed: int = 0
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for points in (self.generated, self.training, self.holdout, self.second, self.second_training):
            if points is not None:
                check_finite(points.rows, f"{points.what} images")

    @property
    def integer(self) -> bool:
        """Whether squared distances are integers."""
        return self.training.rows.dtype == torch.uint8

    @property
    def images(self) -> bool:
        """Whether the points are images."""
        return self.training.values.ndim == 4

    def nearest(self, k: int = 1) -> Neighbors:
        """The k nearest training images of each generated image, fewer where there are fewer training images."""
        found = self.searches.nearest(self.generated, self.training, max(k, self.neighbors))
        return found.first(min(k, len(self.training)))

    def setting(self, criterion: str, name: str, default: Any) -> Any:
        """What was chosen, or the default."""
        return self.settings.get(criterion, {}).get(name, default)

    def holdout_nearest(self, k: int = 1) -> Neighbors:
        """The same of each holdout image."""
        found = self.searches.nearest(self.holdout, self.training, max(k, self.neighbors))
        return found.first(min(k, len(self.training)))

    def honest(self) -> Comparison | None:
        """The same with holdout images in the generated images' place, as many of them where there are enough."""
        if self.holdout is None:
            return None
        return replace(self, generated=self.holdout.spread(len(self.generated)), holdout=None, second=None)
