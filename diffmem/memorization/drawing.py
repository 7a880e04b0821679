"""Which images are searched exactly: strata by what may be wrong about an image, and a random sample of each.

The sample is the images with the lowest priorities of their stratum, a fixed pseudorandom function of an image's
number: it does not depend on the batches in which images come, and of a stream few images have to be kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmem.data import ImageSet
from diffmem.errors import InputError
from diffmem.features import FeatureSet
from diffmem.html_report import level, percent
from diffmem.memorization.verification import LEAST_RECALL, Key, Stratum, Verification, allocate
from diffmem.search import Views

if TYPE_CHECKING:
    from diffmem.memorization.detector import Detection

NEAR_THRESHOLD = 1.5  # the factor on the threshold within which a score is near it
SAME = 1e-9  # relative difference of distances that are the same but for rounding


def check_verifying(verify: Any, recall: Any) -> tuple[int, float]:
    """Raises InputError unless these are a number of images and a share."""
    if not (isinstance(verify, Integral) and int(verify) >= 1):
        raise InputError(f"verify is {verify!r}, but must be a number of images, from 1")
    if not (isinstance(recall, Real) and 0 < float(recall) <= 1):
        raise InputError(f"recall is {recall!r}, but must be a share above 0, at most 1")
    return int(verify), float(recall)


def strata_of(detection: Detection, threshold: float) -> np.ndarray:
    """int64 [n]: the stratum of each image, as the bits of its key."""
    scores = detection.scores
    near = (scores * NEAR_THRESHOLD > threshold) & (scores < threshold * NEAR_THRESHOLD)
    near &= ~detection.settled
    certified = detection.certified & detection.settled
    bits = (detection.memorized, detection.settled, certified, near)
    return sum(each.astype(np.int64) << place for place, each in enumerate(bits))


def key_of(stratum: int) -> Key:
    return bool(stratum & 1), bool(stratum & 2), bool(stratum & 4), bool(stratum & 8)


def priorities(numbers: np.ndarray) -> np.ndarray:
    """uint64 [n]: pseudorandom, a function of each number (SplitMix64)."""
    with np.errstate(over="ignore"):
        mixed = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


class Drawn:
    """Images that may be searched exactly, at most `budget` of each stratum.

    Args:
        budget: How many are to be searched exactly in all.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._rows = np.empty(0, np.int64)
        self._strata = np.empty(0, np.int64)
        self._images: ImageSet | FeatureSet | None = None
        self._straight: np.ndarray | None = None
        self._mirrored: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, start: int, strata: np.ndarray, images: ImageSet | FeatureSet, rows: np.ndarray | Views) -> None:
        """Takes images into account.

        Args:
            start: The number of the first.
            strata: Of each (`strata_of`).
            images: The images, or their vectors.
            rows: What of them is compared.
        """
        numbers = np.concatenate([self._rows, np.arange(start, start + len(strata))])
        among = np.concatenate([self._strata, strata])
        kept = []
        for stratum in np.unique(among):
            called, settled, certified, near = key_of(int(stratum))
            mine = np.flatnonzero(among == stratum)
            most = 0 if certified else self.budget
            if near or called or settled:
                most = min(most, self.budget // 2)
            kept.append(mine[np.argsort(priorities(numbers[mine]), kind="stable")[:most]])
        chosen = np.sort(np.concatenate(kept)) if kept else np.empty(0, np.int64)
        old, new = chosen[chosen < len(self._rows)], chosen[chosen >= len(self._rows)] - len(self._rows)
        views = rows if isinstance(rows, Views) else None
        parts = replace(images, names=None).select(new)
        if isinstance(parts, ImageSet):
            parts = replace(parts, images=np.array(parts.images), labels=None)
        if self._images is None:
            self._images = parts
        elif isinstance(parts, ImageSet) and isinstance(self._images, ImageSet):
            pixels = np.concatenate([self._images.images[old], parts.images])
            self._images = replace(self._images, images=pixels)
        elif isinstance(parts, FeatureSet) and isinstance(self._images, FeatureSet):
            vectors = np.concatenate([self._images.vectors[old], parts.vectors])
            self._images = replace(self._images, vectors=vectors)
        if views is not None:
            self._straight = _appended(self._straight, old, views.straight[new])
            if views.mirrored is not None:
                self._mirrored = _appended(self._mirrored, old, views.mirrored[new])
        self._rows, self._strata = numbers[chosen], among[chosen]

    def chosen(self, strata: np.ndarray) -> np.ndarray:
        """int64 [m], ascending: the numbers of the images that are searched exactly, of all images so far, whose strata
        these are."""
        present, counts = np.unique(strata, return_counts=True)
        sizes = {key_of(int(each)): int(count) for each, count in zip(present, counts, strict=True)}
        wanted = allocate(sizes, self.budget)
        rows = []
        for stratum in present.tolist():
            mine = self._rows[self._strata == stratum]
            rows.append(mine[np.argsort(priorities(mine), kind="stable")[: wanted[key_of(stratum)]]])
        return np.sort(np.concatenate(rows)) if rows else np.empty(0, np.int64)

    def take(self, rows: np.ndarray) -> tuple[ImageSet | FeatureSet, np.ndarray | Views]:
        """Some of the images, and what of them is compared."""
        assert self._images is not None
        places = np.searchsorted(self._rows, rows)
        images = self._images.select(places)
        if self._straight is None:
            assert isinstance(images, ImageSet)
            return images, images.images
        mirrored = None if self._mirrored is None else self._mirrored[places]
        return images, Views(self._straight[places], mirrored)


def _appended(before: np.ndarray | None, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    return np.array(new) if before is None else np.concatenate([before[old], new])


def verification_of(found: Detection, strata: np.ndarray, rows: np.ndarray, truth: Detection) -> Verification:
    """What exact search of some images says of all.

    Args:
        found: What was decided without it.
        strata: Of each image.
        rows: The numbers of those that were searched exactly.
        truth: What was decided about these then.
    """
    ours, theirs = found.neighbors.squared_distances[rows, :2], truth.neighbors.squared_distances[:, :2]
    same = np.abs(ours - theirs) <= SAME * np.maximum(theirs, 1e-300)
    gathered: list[Stratum] = []
    for stratum in np.unique(strata).tolist():
        mine = strata[rows] == stratum
        called, settled, certified, near = key_of(stratum)
        gathered.append(
            Stratum(
                called, settled, certified, near,
                images=int((strata == stratum).sum()),
                verified=int(mine.sum()),
                copies=int(truth.memorized[mine].sum()),
                nearest=int(same[mine, 0].sum()),
                second=int(same[mine].all(axis=1).sum()),
            )
        )  # fmt: skip
    return Verification(tuple(gathered))


def missed(search: Mapping[str, Any]) -> tuple[str, ...]:
    """The warning where so many neighbors were missed that single verdicts and names are not to be relied on."""
    nearest, second = search["recall_nearest"], search["recall_second"]
    if min(nearest, second) >= LEAST_RECALL:
        return ()
    return (
        f"the index ({search['index']}) found {percent(nearest)} of the nearest and {percent(second)} of the second "
        f"nearest training images ({search['verified']:,} images searched exactly), less than {level(LEAST_RECALL)}: "
        "the interval covers copies that it missed, but names and verdicts of single images may be wrong; search more "
        "widely (recall=…), or search exactly",
    )
