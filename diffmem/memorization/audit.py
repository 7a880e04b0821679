"""The audit: which generated images are copies of training images, how many that is, and how sure one can be."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

import diffmem
from diffmem.data import ImageSet, load_images
from diffmem.errors import InputError
from diffmem.memorization.criteria import parse_threshold, ratio_rule
from diffmem.memorization.statistics import wilson_interval
from diffmem.progress import Progress, silent
from diffmem.search import DuplicateGroups, Neighbors, TrainingIndex, find_duplicates
from diffmem.search.rows import mirror

if TYPE_CHECKING:
    from diffmem.data import ImageSource

WIDEST_QUERY = 64  # neighbours asked for at once before duplicates are excluded instead


@dataclass(frozen=True)
class CopiedImage:
    """A training image that generated images are copies of."""

    index: int
    name: str
    count: int


@dataclass(frozen=True, repr=False)
class Audit:
    """What `audit` found. Per-image arrays follow the order of the generated images.

    memorized: bool [Q], by the rule of `settings` (duplicates collapsed unless asked otherwise).
    raw_memorized: bool [Q], by the paper's rule, duplicates left in.
    neighbors: the nearest training image and the second nearest that is not a duplicate of it.
    raw_neighbors: the two nearest, duplicates left in.
    duplicates: groups of training images within the duplicate radius.
    interval: the 95 % Wilson interval of the ratio.
    sources: the training images copied most often, most copied first.
    holdout: the same audit of real images that the model never saw; its ratio is the rule's false-alarm rate. None
        without.
    settings: threshold, duplicates, duplicate_radius, flip, device, and what the sets were.
    """

    memorized: np.ndarray
    raw_memorized: np.ndarray
    neighbors: Neighbors
    raw_neighbors: Neighbors
    duplicate_groups: DuplicateGroups
    generated: ImageSet
    training: ImageSet
    settings: dict[str, Any]
    holdout: Audit | None = None
    versions: dict[str, str] = field(default_factory=lambda: software_versions())

    @property
    def total(self) -> int:
        """Number of generated images audited."""
        return len(self.memorized)

    @property
    def count(self) -> int:
        """Number of generated images that are copies."""
        return int(self.memorized.sum())

    @property
    def ratio(self) -> float:
        """The memorization ratio, count / total (the paper's R_mem)."""
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.count, self.total)

    @property
    def raw_count(self) -> int:
        return int(self.raw_memorized.sum())

    @property
    def raw_ratio(self) -> float:
        return self.raw_count / self.total

    @property
    def training_size(self) -> int:
        return len(self.training)

    @property
    def mean_rms(self) -> float:
        """Mean over the generated images of the rms distance to the nearest training image."""
        return float(self.neighbors.rms[:, 0].mean())

    @property
    def distance_ratios(self) -> np.ndarray:
        """d1 / d2 per image, float64 [Q], for display: 0 for exact copies. The rule itself is decided in integers."""
        first, second = self.neighbors.squared_distances.astype(np.float64).T
        return np.sqrt(np.divide(first, second, out=np.zeros_like(first), where=first > 0))

    @property
    def duplicates(self) -> list[np.ndarray]:
        """Groups of duplicate training images, each a sorted array of indices, largest first."""
        return self.duplicate_groups.groups

    @property
    def sources(self) -> list[CopiedImage]:
        copied, counts = np.unique(self.neighbors.indices[self.memorized, 0], return_counts=True)
        order = np.lexsort((copied, -counts))
        return [CopiedImage(int(copied[i]), self.training.name(int(copied[i])), int(counts[i])) for i in order]

    def to_dict(self) -> dict[str, Any]:
        """Everything above under the same names, in plain JSON types."""
        neighbors = self.neighbors
        return {
            "ratio": self.ratio,
            "count": self.count,
            "total": self.total,
            "interval": list(self.interval),
            "raw_ratio": self.raw_ratio,
            "raw_count": self.raw_count,
            "training_size": self.training_size,
            "mean_rms": self.mean_rms,
            "holdout": None if self.holdout is None else self.holdout.to_dict(),
            "sources": [{"index": s.index, "name": s.name, "count": s.count} for s in self.sources],
            "duplicates": [group.tolist() for group in self.duplicates],
            "settings": self.settings,
            "versions": self.versions,
            "memorized": self.memorized.tolist(),
            "raw_memorized": self.raw_memorized.tolist(),
            "neighbors": {
                "indices": neighbors.indices.tolist(),
                "squared_distances": neighbors.squared_distances.tolist(),
                "distances": neighbors.distances.tolist(),
                "rms": neighbors.rms.tolist(),
                **({} if neighbors.mirrored is None else {"mirrored": neighbors.mirrored.tolist()}),
            },
        }

    def save(self, folder: str | Path) -> Path:
        """Write `report.html`, `samples.csv` and `report.json` into `folder` and return the path of the report.

        Each file is written beside its final name and renamed when whole. Raises InputError where that cannot be done.
        """
        from diffmem.memorization.report import write_report

        return write_report(self, folder)

    def __repr__(self) -> str:
        return f"<Audit: {self.verdict()}>"

    def verdict(self) -> str:
        """One sentence for a person."""
        low, high = self.interval
        return (
            f"{self.count:,} of {self.total:,} images are copies of one of {self.training_size:,} training images: "
            f"{percent(self.ratio)} (95 % interval {percent(low)} to {percent(high)})"
        )


def percent(share: float) -> str:
    """A share as a percentage with as many digits as tell something: 93.4 %, 0.06 %, 0 %."""
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f} %"
    return f"{value:.2f} %" if value < 10 or value > 99 else f"{value:.1f} %"


def audit(
    generated: ImageSource,
    training: ImageSource,
    *,
    threshold: float | str | Fraction = 1 / 3,
    duplicates: Literal["collapse", "keep"] = "collapse",
    duplicate_radius: float = 0,
    holdout: ImageSource | None = None,
    flip: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> Audit:
    """Which generated images are copies of training images, by the nearest / second-nearest rule.

    generated, training, holdout: anything that `diffmem.load_images` reads: a path, an array [N, C, H, W], a tensor,
        an ImageSet, …. They must agree in size, channels and dtype. `holdout`: real images that the model has not
        seen; their share of "copies" is the rule's false-alarm rate.
    threshold: on d1/d2 (see `diffmem.memorization.criteria`); 1/3 in the paper.
    duplicates: "collapse" takes the second neighbour among the training images that are not duplicates of the first;
        "keep" is the paper's rule, to which a copy of a duplicated training image stays unseen. `raw_ratio` is
        always the latter.
    duplicate_radius: training images within this distance (rms per value, grey levels for uint8) are duplicates; 0:
        identical images.
    flip: compare mirrored generated images too (for models trained with horizontal flips).
    device: "cpu", "cuda", or "auto".
    progress: a callback (`diffmem.progress`), or None.
    Raises InputError (a ValueError) for empty sets, sets that do not fit together, values that are not finite, and
    fewer than two distinct training images.
    """
    exact_threshold = parse_threshold(threshold)
    if duplicates not in ("collapse", "keep"):
        raise InputError(f'duplicates must be "collapse" or "keep", got {duplicates!r}')
    progress = progress or silent
    training = load_images(training, progress=progress)
    generated = load_images(generated, progress=progress)
    unseen = None if holdout is None else load_images(holdout, progress=progress)
    _check_sets(generated, training, "generated")
    if unseen is not None:
        _check_sets(unseen, training, "holdout")

    groups = find_duplicates(training.images, duplicate_radius, flip=flip, progress=progress)
    if groups.distinct < 2:
        raise InputError(
            f"the rule needs at least two distinct training images; {training.source} holds {len(training)} "
            f"image(s), {groups.distinct} distinct"
        )
    if duplicates == "collapse" and groups.number_of_groups < 2:
        raise InputError(
            f"all {len(training)} training images are duplicates of each other within radius {duplicate_radius}: "
            "choose a smaller duplicate radius"
        )
    search = _Search(TrainingIndex(training, device=device), training, groups, flip, progress)
    settings = {
        "threshold": str(exact_threshold),
        "duplicates": duplicates,
        "duplicate_radius": float(duplicate_radius),
        "flip": flip,
        "device": str(search.index.device),
        "training": _describe(training),
    }

    def judge(images: ImageSet, unseen_audit: Audit | None = None) -> Audit:
        raw = search.nearest(images)
        chosen = search.collapse(images, raw) if duplicates == "collapse" else raw
        return Audit(
            memorized=ratio_rule(chosen.squared_distances, exact_threshold),
            raw_memorized=ratio_rule(raw.squared_distances, exact_threshold),
            neighbors=chosen,
            raw_neighbors=raw,
            duplicate_groups=groups,
            generated=images,
            training=training,
            settings={**settings, "generated": _describe(images)},
            holdout=unseen_audit,
        )

    return judge(generated, None if unseen is None else judge(unseen))


class _Search:
    """Nearest training images with mirrored queries and duplicate groups taken into account."""

    def __init__(
        self, index: TrainingIndex, training: ImageSet, groups: DuplicateGroups, flip: bool, progress: Progress
    ):
        self.index, self.training, self.groups, self.flip, self.progress = index, training, groups, flip, progress

    def nearest(self, images: ImageSet, k: int = 2) -> Neighbors:
        """The k nearest training images, each at the smaller of its distances to the image and to the mirrored
        image."""
        return self._nearest(self.index, images.images, k)

    def _nearest(self, index: TrainingIndex, images: np.ndarray, k: int) -> Neighbors:
        straight = index.query(images, k, progress=self.progress)
        if not self.flip:
            return straight
        # The k nearest by the smaller distance are among the k nearest of the two orientations: an image of that
        # answer has fewer than k images before it in its own orientation's order, as each of those comes before it
        # in the joint order too.
        return _merge_orientations(straight, index.query(mirror(images), k, progress=self.progress))

    def collapse(self, images: ImageSet, raw: Neighbors) -> Neighbors:
        """`raw` with each second neighbour replaced by the nearest image outside the group of the first."""
        group_of = self.groups.group_of
        result = _copy(raw)
        open_rows = np.flatnonzero(group_of[raw.indices[:, 0]] == group_of[raw.indices[:, 1]])
        for k in (8, WIDEST_QUERY):
            if len(open_rows) == 0 or k > len(self.index):
                break
            wider = self._nearest(self.index, images.images[open_rows], k)
            outside = group_of[wider.indices] != group_of[wider.indices[:, :1]]
            found = outside.any(axis=1)
            _set_second(result, open_rows[found], wider, np.flatnonzero(found), outside.argmax(axis=1)[found])
            open_rows = open_rows[~found]
        # Groups so large that they fill the widest query: leave each out of the training set in turn.
        for group in np.unique(group_of[raw.indices[open_rows, 0]]):
            rows = open_rows[group_of[raw.indices[open_rows, 0]] == group]
            others = np.flatnonzero(group_of != group)
            nearest = self._nearest(TrainingIndex(self.training.images[others], device=str(self.index.device)),
                                    images.images[rows], 1)  # fmt: skip
            nearest = Neighbors(others[nearest.indices], nearest.squared_distances, nearest.dimension, nearest.mirrored)
            _set_second(result, rows, nearest, np.arange(len(rows)), np.zeros(len(rows), np.int64))
        return result


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


def _check_sets(images: ImageSet, training: ImageSet, what: str) -> None:
    for name, image_set in ((what, images), ("training", training)):
        if len(image_set) == 0:
            raise InputError(f"the {name} set ({image_set.source}) is empty")
    if images.images.dtype != training.images.dtype:
        raise InputError(
            f"{what} images ({images.source}) are {images.images.dtype}, training images ({training.source}) are "
            f"{training.images.dtype}: convert one of them so that both mean the same grey levels"
        )
    ours, theirs = images.image_shape, training.image_shape
    if ours[0] != theirs[0]:
        kinds = {1: "grey (1 channel)", 3: "colour (3 channels)"}
        our_kind, their_kind = (kinds.get(shape[0], f"{shape[0]}-channel") for shape in (ours, theirs))
        raise InputError(
            f"{what} images ({images.source}) are {our_kind}, training images ({training.source}) are {their_kind}: "
            "convert with --color grey or --color rgb"
        )
    if ours != theirs:
        raise InputError(
            f"{what} images ({images.source}) are {ours[1]}x{ours[2]}, training images ({training.source}) are "
            f"{theirs[1]}x{theirs[2]}: bring them to one size with --resize {theirs[1]}"
        )


def _describe(images: ImageSet) -> dict[str, Any]:
    return {
        "source": images.source,
        "images": len(images),
        "shape": list(images.image_shape),
        "dtype": str(images.images.dtype),
        "skipped": [{"name": s.name, "reason": s.reason} for s in images.skipped],
        "fingerprint": images.fingerprint,
    }


def software_versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {
        "diffmem": diffmem.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
