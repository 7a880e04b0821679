"""The sets that a criterion compares, and the searches between them, each made once and shared by all criteria."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from diffmem.errors import InputError
from diffmem.lazy import torch
from diffmem.progress import Progress, silent
from diffmem.search import Neighbors, TrainingIndex
from diffmem.search.cosines import largest_cosines
from diffmem.search.rows import as_rows, check_finite

BLOCK_VALUES = 1 << 24
GUESSES = 8  # nearest targets by Euclidean distance that begin the search of the largest cosine


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

    def blocks(self) -> Iterator[Points]:
        """The points in blocks."""
        step = max(1, BLOCK_VALUES // self.dimension)
        for start in range(0, len(self), step):
            yield Points(self.values[start : start + step], self.what)

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
    _cosines: dict[tuple[int, int, bool], np.ndarray] = field(default_factory=dict)
    _kept: list[Points] = field(default_factory=list)

    def index(self, points: Points) -> TrainingIndex:
        """The exact index of some points."""
        if id(points) not in self._indices:
            self._kept.append(points)  # its id stays its own
            self._indices[id(points)] = TrainingIndex(points.values, device=self.device, progress=self.progress)
        return self._indices[id(points)]

    def give_index(self, points: Points, index: TrainingIndex) -> None:
        """Takes an index that was made before."""
        self._kept.append(points)
        self._indices[id(points)] = index

    def beside(self, points: Points) -> Searches:
        """Searches that share what is known about these points alone, and keep what they find to themselves."""
        self.index(points)
        return Searches(self.device, self.progress, {id(points): self._indices[id(points)]}, _others=self._others)

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

    def largest_cosine(
        self, points: Points, targets: Points, *, absolute: bool = False, places: np.ndarray | None = None
    ) -> np.ndarray:
        """float64 [n]: the cosine of each point with the target that has the largest, NaN for points of zeros; of a
        point among the same points with another one.

        Args:
            points: The points whose cosines are wanted.
            targets: With which.
            absolute: Whether the largest |cosine| is wanted: MiFID takes opposite vectors for equal ones.
            places: Only of these points.
        """
        if targets.zero.all():
            raise InputError(f"{targets.what}: all vectors are zero and have no direction")
        if points is targets and (~points.zero).sum() < 2:
            raise InputError(f"{targets.what}: needs at least two vectors")
        absolute = absolute and not (points.nonnegative and targets.nonnegative)
        key = id(points), id(targets), absolute
        if places is None and key in self._cosines:
            return self._cosines[key]
        queries = points.rows if places is None else points.rows[torch.from_numpy(places)]
        near = self._found.get((id(points), id(targets))) if places is None else None
        found = largest_cosines(
            self.index(targets),
            queries,
            targets.rows,
            own=None if points is not targets else np.arange(len(points)) if places is None else places,
            guesses=None if near is None else near.indices[:, :GUESSES],
            of_rows=points is not targets,
            absolute=absolute,
            progress=self.progress,
        )
        cosines, reverse = (np.where(each < -1.5, np.nan, each) for each in (found.of_queries, found.of_rows))
        if places is None:
            self._kept += [points, targets]
            self._cosines[key] = cosines
            if points is not targets:
                self._cosines[key[1], key[0], absolute] = reverse
        return cosines


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
        seed: Seed of what is drawn.
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
