"""Which training images are nearest to an image, and how near: in pixels, in vectors, or after alignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from diffmem.data import ImageSet
from diffmem.data.cache import beside_copy
from diffmem.errors import InputError
from diffmem.features import FeatureSet
from diffmem.progress import Progress, silent
from diffmem.search import (
    DistinctNeighbors,
    DuplicateGroups,
    FaissIndex,
    Neighbors,
    SearchIndex,
    ShardedIndex,
    TrainingIndex,
    Views,
    check_index,
    faiss_factory,
    find_duplicates,
)

NEIGHBORS = 8  # training images looked at: copies of images that the set holds in up to seven versions are seen
SHARDED = "sharded"
CODE_SUFFIX = ".index.npz"  # of the file beside the cached copy of training images that keeps their code
RECALL = 0.99  # share of the neighbors that an index which may miss some is to find, where nothing else is asked for
TUNED_ON = 128  # images by which it chooses how widely it searches


@dataclass(frozen=True)
class Matches:
    """The nearest training images of n images.

    Attributes:
        neighbors: The nearest, and the nearest of those that are not duplicates of it (duplicates counted as neighbors,
        where they
            are kept).
        raw: The two nearest, duplicates counted as neighbors.
        nearest: Up to `NEIGHBORS` nearest, duplicates counted as neighbors.
        scores: float64 [n], the matching's own score where it is none of distances; else None.
    """

    neighbors: Neighbors
    raw: Neighbors
    nearest: Neighbors
    scores: np.ndarray | None = None


class Matching(Protocol):
    """A training set, ready to be compared with images.

    Attributes:
        groups: Its duplicates.
        index: Its search index, or None.
        search: Its neighbors outside duplicates, or None.
        metric: "euclidean", "cosine", "hamming" or "aligned".
        device: Where it is searched.
        approximate: Whether the index may miss neighbors.
    """

    groups: DuplicateGroups
    index: SearchIndex | None
    search: DistinctNeighbors | None
    metric: str
    device: str

    @property
    def approximate(self) -> bool: ...

    def match(self, queries: np.ndarray | Views, *, exactly: bool = False) -> Matches:
        """The nearest training images of images [n, C, H, W], or of their vectors.

        exactly: Also where the index may miss neighbors.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """How neighbors are searched, in JSON types: "method", and of an index that may miss some which it is."""
        ...


class RowMatching:
    """By the distance of rows: pixels, or vectors.

    Args:
        training: The training images, or their vectors.
        index: An index of these rows made before; "exact", "sharded" (over the ranks of `torch.distributed`), a name
            or factory string of FAISS, or None for an exact one.
        device: "cpu", "cuda", or "auto".
        duplicates: "collapse" or "keep".
        duplicate_radius: Root mean square per value within which two training images are duplicates.
        flip: Whether mirrored images are compared too; of vectors, queries then hold both.
        progress: A callback.
        recall: Of an index that may miss neighbors and chooses itself how widely it searches: the share of the nearest
            and second nearest that it is to find.

    Raises:
        InputError: An index of other rows, or fewer than two distinct training images.
    """

    def __init__(
        self,
        training: ImageSet | FeatureSet,
        index: SearchIndex | str | None,
        device: str,
        duplicates: Literal["collapse", "keep"],
        duplicate_radius: float,
        flip: bool,
        progress: Progress,
        recall: float = RECALL,
    ):
        self.recall = recall
        self.rows = training.images if isinstance(training, ImageSet) else training.rows
        self.metric = "euclidean" if isinstance(training, ImageSet) else training.metric
        self.collapse, self.radius, self.flip, self.progress = (
            duplicates == "collapse",
            duplicate_radius,
            flip,
            progress,
        )
        given = training if isinstance(training, ImageSet) else self.rows
        if index is None or index == "exact":
            kept = beside_copy(training, CODE_SUFFIX) if isinstance(training, ImageSet) else None
            self.index: SearchIndex = TrainingIndex(given, device=device, code_file=kept)
        elif index == SHARDED:
            self.index = ShardedIndex(given, device=device)
        elif isinstance(index, str):
            factory = faiss_factory(index, len(training))
            self.index = FaissIndex(given, factory, device=device, progress=progress)
        else:
            check_index(index, given)
            self.index = index
        exact = None if duplicate_radius == 0 or isinstance(self.index, FaissIndex) else self.index
        self.groups = find_duplicates(
            self.rows, duplicate_radius, flip=flip and self.rows.ndim == 4, index=exact, progress=progress
        )
        check_distinct(self.groups, training)
        self.search = self._new_search()
        self.device = getattr(self.index, "device_name", None) or str(self.index.device)

    def _new_search(self) -> DistinctNeighbors:
        return DistinctNeighbors(
            self.index, self.rows, self.groups, radius=self.radius, flip=self.flip, progress=self.progress
        )

    def match(self, queries: np.ndarray | Views, *, exactly: bool = False) -> Matches:
        if self._faiss is not None and not exactly:
            images = queries.straight if isinstance(queries, Views) else queries
            self._faiss.tune(images[evenly_spaced(len(images), TUNED_ON)], self.recall, progress=self.progress)
        return match_rows(self.search.exactly() if exactly else self.search, queries, len(self.rows), self.collapse)

    @property
    def _faiss(self) -> FaissIndex | None:
        found = self.index if isinstance(self.index, FaissIndex) else getattr(self.index, "_faiss", None)
        return found if isinstance(found, FaissIndex) else None

    @property
    def approximate(self) -> bool:
        return self._faiss is not None

    def describe(self) -> dict[str, Any]:
        faiss = self._faiss
        if faiss is None:
            return {"method": "exact"}
        candidates = None if faiss.stats is None else faiss.stats.candidates
        return {
            "method": "faiss", "index": faiss.factory, "lists": faiss.lists, "nprobe": faiss.nprobe,
            "candidates": candidates,
        }  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        # The search holds the rows once more.
        return {**self.__dict__, "progress": silent, "search": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.search = self._new_search()


def match_rows(search: DistinctNeighbors, queries: np.ndarray | Views, rows: int, collapse: bool) -> Matches:
    """What a search over so many rows finds."""
    # More than the rule's two: copies of images that the training set holds in several versions show there.
    nearest = search.nearest(queries, min(NEIGHBORS, rows))
    raw = nearest.first(2)
    chosen = search.outside_duplicates(queries, raw) if collapse else raw
    return Matches(chosen, raw.copy(), nearest)


def evenly_spaced(total: int, count: int) -> np.ndarray:
    """`count` of `total` row numbers, all of them where there are fewer."""
    count = min(count, total)
    return np.arange(count) * total // max(count, 1)


class AlignedMatching:
    """By what remains after alignment (`diffmem.features.aligned`); "distances" are residuals, √(1 − correlation).

    Args:
        training: The training images.
        progress: A callback.

    Raises:
        InputError: Fewer than two distinct training images.
    """

    index, search, metric, approximate = None, None, "aligned", False

    def __init__(self, training: ImageSet, progress: Progress) -> None:
        self.groups = find_duplicates(training.images, 0, progress=progress)
        check_distinct(self.groups, training)
        from diffmem.features.aligned import AlignedMatcher

        self.matcher = AlignedMatcher(training, progress=progress)
        self.device = "cpu"

    def describe(self) -> dict[str, Any]:
        return {"method": "aligned"}

    def match(self, queries: np.ndarray | Views, *, exactly: bool = False) -> Matches:
        found = self.matcher.match(queries)
        squared = np.square(found.residuals.astype(np.float64))
        mirrored = np.repeat(found.mirrored[:, None], squared.shape[1], axis=1)
        mirrored[:, 1:] = False  # of the nearest alone it is known
        nearest = Neighbors(found.indices, squared, 1, mirrored)
        # The second neighbor: the nearest that is not a duplicate of the first.
        other = self.groups.group_of[found.indices] != self.groups.group_of[found.indices[:, :1]]
        second = np.where(other.any(axis=1), other.argmax(axis=1), 1)
        rows = np.arange(len(squared))[:, None]
        columns = np.stack([np.zeros_like(second), second], axis=1)
        chosen = Neighbors(found.indices[rows, columns], squared[rows, columns], 1, mirrored[rows, columns])
        return Matches(chosen, nearest.first(2).copy(), nearest.first(NEIGHBORS), found.scores)


def check_distinct(groups: Any, training: ImageSet | FeatureSet) -> None:
    """Raises InputError where there is no second training image."""
    if groups.distinct < 2:
        raise InputError(
            f"the rule needs at least two distinct training images; {training.source} holds {len(training)} "
            f"image(s), {groups.distinct} distinct"
        )
