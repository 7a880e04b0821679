"""A training set that lies in an index folder (`diffmem.indexes`), as an audit compares images with it."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from diffmem.data import ImageSet
from diffmem.data.containers import is_index_folder
from diffmem.errors import InputError
from diffmem.indexes import IndexFolder, open_index
from diffmem.indexes.originals import Originals
from diffmem.indexes.search import FolderSearch
from diffmem.memorization.compared import ALIGNED, PRECOMPUTED, Compared, Features
from diffmem.memorization.matching import TUNED_ON, Matches, check_distinct, evenly_spaced, match_rows
from diffmem.memorization.plausibility import SetFigures
from diffmem.memorization.result import UnkeptImages
from diffmem.progress import Progress, silent
from diffmem.search import DistinctNeighbors, Views
from diffmem.search.rows import as_rows

if TYPE_CHECKING:
    from diffmem.indexes.duplicates import StoredDuplicates

_MANY = 1 << 22  # training images beyond which their figures are those of evenly spaced ones


def is_index(source: Any) -> bool:
    """Whether a source of training images is an index folder.

    Args:
        source: What stands for training images: a path, an opened index, or anything else.
    """
    if isinstance(source, (str, os.PathLike)):
        return is_index_folder(Path(source).expanduser())
    return isinstance(source, IndexFolder)


def folder_of(index: Any, training: Any) -> IndexFolder | None:
    """The index folder that `index` names or is, or `training` in its place; None where they are something else.

    Raises:
        InputError: There is none, though there is no training set either, or there are both.
    """
    found: IndexFolder | None = None
    if index is None and is_index(training):
        index, training = training, None
    if isinstance(index, IndexFolder):
        found = index
    elif isinstance(index, (str, os.PathLike)):
        path = Path(index).expanduser()
        if training is None or isinstance(index, os.PathLike) or path.is_dir() or len(path.parts) > 1:
            found = open_index(path)
    if training is None and found is None:
        raise InputError("training: none is given: give the training images, or index=… with the folder of their index")
    if training is not None and found is not None:
        raise InputError(f"training: the index {found.path} holds the training set already: give one of the two")
    return found


def compared_of_folder(folder: IndexFolder, features: Features | Compared, device: str) -> Compared:
    """What is compared: the features of the index.

    Raises:
        InputError: Others are asked for.
    """
    name = folder.features.name
    maker: Any = None
    if isinstance(features, Compared):
        asked, maker = features.name, features.maker
    elif isinstance(features, str):
        asked = features
    else:
        asked = type(features).__name__
        maker = features if hasattr(features, "fingerprint") else None
    fits = maker is not None and maker.fingerprint and maker.fingerprint == folder.features.fingerprint
    if asked not in ("pixels", name) and not fits:
        more = ""
        if asked == ALIGNED:
            more = "; aligned images are searched in training images that are in memory"
        raise InputError(
            f"features is {asked!r}, but must be those of the index {folder.path}, {name!r}: remove features=…, or "
            f"build an index of others{more}"
        )
    if name == "pixels":
        return Compared("pixels", "euclidean")
    if name == PRECOMPUTED:
        return Compared(PRECOMPUTED, folder.metric)
    made = folder.features.extractor(device)
    if made.fingerprint != folder.features.fingerprint:
        raise InputError(
            f"index {folder.path}: its {name} features were made by another network or preprocessing "
            f"({folder.features.fingerprint}) than there is here ({made.fingerprint}): use the same weights, or build "
            "it again"
        )
    return Compared(made.name, made.metric, made)


class FolderImages:
    """The pixels of an index folder as an array [N, C, H, W] of which rows are read as they are asked for."""

    ndim = 4
    dtype = np.dtype(np.uint8)

    def __init__(self, folder: IndexFolder) -> None:
        assert folder.image_shape is not None
        self.folder = folder
        self.shape = (len(folder), *folder.image_shape)

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, key: Any) -> np.ndarray:
        rows, others = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        one = isinstance(rows, (int, np.integer))
        numbers = np.arange(len(self))[rows] if isinstance(rows, slice) else np.atleast_1d(rows)
        if numbers.dtype == bool:
            numbers = np.flatnonzero(numbers)
        found = self.folder.take(numbers).reshape(len(numbers), *self.shape[1:])
        return found[0][others] if one else found[(slice(None), *others)]


class StoredGroups:
    """The duplicates that an index folder knows, as `DuplicateGroups` has them."""

    def __init__(self, stored: StoredDuplicates) -> None:
        self.stored = stored
        self.distinct = stored.distinct

    @cached_property
    def groups(self) -> list[np.ndarray]:
        return self.stored.groups

    def sizes_of(self, rows: np.ndarray) -> np.ndarray:
        roots, sizes = np.unique(self.stored.roots, return_counts=True)
        mine = self.stored.group_of(rows)
        place = np.minimum(np.searchsorted(roots, mine), max(0, len(roots) - 1))
        return np.where(roots[place] == mine, sizes[place], 1) if len(roots) else np.ones(len(mine), np.int64)


class FolderRows:
    """The rows of an index folder, for `DistinctNeighbors`."""

    def __init__(self, search: FolderSearch, groups_hold: bool) -> None:
        self._search, self.groups_hold = search, groups_hold
        folder = search.folder
        self.dimension = folder.dimension
        self.dtype = np.dtype(np.uint8 if folder.dtype == np.uint8 else np.float32)
        self._shape = folder.image_shape if folder.features.name == "pixels" else None

    def __len__(self) -> int:
        return len(self._search)

    def take(self, rows: np.ndarray) -> np.ndarray:
        found = self._search.folder.take(rows)
        return found if self._shape is None else found.reshape(len(found), *self._shape)

    def within(self, view: np.ndarray, limit: int | float) -> np.ndarray:
        return self._search.within(view, limit)


class FolderMatching:
    """By the distance of the rows of an index folder.

    Args:
        folder: The index.
        exactly: Whether it is searched exactly, though it has codes.
        device: Where exact search computes.
        duplicates: "collapse" or "keep".
        duplicate_radius: Root mean square per value within which two training images are duplicates.
        flip: Whether mirrored images are compared too.
        progress: A callback.
        recall: The share of the nearest and second nearest that codes are to find.

    Raises:
        InputError: Fewer than two distinct training images.
    """

    def __init__(
        self, folder: IndexFolder, exactly: bool, device: str, duplicates: str, duplicate_radius: float, flip: bool,
        progress: Progress, recall: float,
    ) -> None:  # fmt: skip
        self.folder, self.recall, self.progress = folder, recall, progress
        self.metric: str = folder.metric
        self.collapse, self.radius, self.flip = duplicates == "collapse", duplicate_radius, flip
        self.index: Any = FolderSearch(folder, exactly=exactly, device=device)
        self.device = "cpu"
        self.groups: Any = StoredGroups(folder.duplicates)
        check_distinct(self.groups, cast(Any, training_of(folder)))
        self.search = self._new_search()

    def _new_search(self) -> DistinctNeighbors:
        mirrored = self.flip and self.folder.features.name == "pixels"
        hold = self.radius == self.folder.duplicates.radius and not mirrored
        rows = FolderRows(self.index, hold)
        return DistinctNeighbors(
            self.index, rows, self.groups, radius=self.radius, flip=self.flip, progress=self.progress
        )

    @property
    def approximate(self) -> bool:
        return bool(self.index.approximate)

    def describe(self) -> dict[str, Any]:
        if not self.approximate:
            return {"method": "exact"}
        index = self.index
        return {
            "method": "index", "index": index.factory, "lists": index.lists, "nprobe": index.nprobe,
            "candidates": index.candidates,
        }  # fmt: skip

    def match(self, queries: np.ndarray | Views, *, exactly: bool = False) -> Matches:
        if self.approximate and not exactly:
            images = queries.straight if isinstance(queries, Views) else queries
            some = images[evenly_spaced(len(images), TUNED_ON)]
            self.index.tune(as_rows(some), self.recall, progress=self.progress)
        search = self.search.exactly() if exactly else self.search
        return match_rows(search, queries, len(self.folder), self.collapse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "progress": silent, "search": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.search = self._new_search()


def training_of(folder: IndexFolder) -> ImageSet | UnkeptImages:
    """The training set: its images where the index holds pixels, else their names, and what reads some of them."""
    if folder.features.name != "pixels":
        originals = Originals(folder)
        reads = originals if originals.available else None
        return UnkeptImages(len(folder), folder.names, str(folder.path), originals=reads)
    images = ImageSet(cast(Any, FolderImages(folder)), names=folder.names, source=str(folder.path))
    images.__dict__["fingerprint"] = images.__dict__["pixel_fingerprint"] = folder.fingerprint  # without reading all
    return images


def figures_of(folder: IndexFolder) -> SetFigures | None:
    """What is looked at of the training images; None where there are none."""
    if folder.features.name != "pixels":
        return None
    images = FolderImages(folder)
    if len(images) <= _MANY:
        return SetFigures.of(cast(Any, images))
    figures = SetFigures.of(images[evenly_spaced(len(images), 4096)])
    figures.total = len(images)
    return figures


def in_folder(folder: IndexFolder, images: np.ndarray) -> np.ndarray:
    """int64 [n]: the first row of an index of features whose image is the same, pixel for pixel; −1: none."""
    ours = np.ascontiguousarray(folder.digests_of(images)).view("V16").ravel()
    found = np.full(len(ours), -1)
    for shard in folder.shards:
        theirs = shard.image_digests
        if theirs is None:
            continue
        theirs = np.ascontiguousarray(theirs).view("V16").ravel()
        order = np.argsort(theirs, kind="stable")
        place = np.minimum(np.searchsorted(theirs, ours, sorter=order), len(theirs) - 1)
        hit = (theirs[order[place]] == ours) & (found < 0)
        found[hit] = order[place[hit]] + shard.start
    return found
