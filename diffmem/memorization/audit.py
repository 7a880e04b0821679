"""The audit: which generated images are copies of training images, how many that is, and how sure one can be."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

import diffmem
from diffmem.data import ImageSet, load_images
from diffmem.data.grid import grid_of, looks_tiled
from diffmem.data.grid import split_grid as cut_sheets
from diffmem.data.value_range import extremes
from diffmem.errors import InputError
from diffmem.memorization.criteria import parse_threshold, published_rule, ratio_rule
from diffmem.memorization.gate import Gate, decide_gate
from diffmem.memorization.hidden import NEIGHBORS, hidden_copies
from diffmem.memorization.plausibility import Appearance, check_scale, scale_recipe, suspicions
from diffmem.memorization.statistics import wilson_interval
from diffmem.pages import percent
from diffmem.progress import Progress, silent
from diffmem.search import (
    DistinctNeighbors,
    DuplicateGroups,
    FaissIndex,
    FaissStats,
    Neighbors,
    SearchIndex,
    TrainingIndex,
    check_index,
    faiss_factory,
    find_duplicates,
)

if TYPE_CHECKING:
    import pandas

    from diffmem.data import ImageSource

_PER_IMAGE = ("memorized", "raw_memorized", "published_memorized", "neighbors")
_SHOWN = 10  # entries of a list in a summary


LEAST_RECALL = 0.95  # of an approximate search, below which the verdict is not to be relied on


@dataclass(frozen=True)
class CopiedImage:
    """A training image that generated images are copies of."""

    index: int
    name: str
    count: int


@dataclass(frozen=True)
class SeenImage:
    """An image of the holdout set that is in the training set: its index and name in both."""

    index: int
    name: str
    training_index: int
    training_name: str


@dataclass(frozen=True, repr=False)
class Audit:
    """What `audit` found. Per-image arrays follow the order of the generated images.

    memorized: bool [Q], by the rule of `settings` (duplicates collapsed unless asked otherwise).
    raw_memorized: bool [Q], by the paper's rule, duplicates left in; d1 = 0 counts whatever d2 is.
    published_memorized: bool [Q], the same as the code published with the paper counts: not where d1 = d2 = 0.
    neighbors: the nearest training image, and the nearest of those that are farther than the duplicate radius from it.
    raw_neighbors: the two nearest, duplicates left in.
    duplicates: groups of training images within the duplicate radius.
    interval: the 95 % Wilson interval of the ratio.
    sources: the training images copied most often, most copied first.
    holdout: the same audit of real images that the model never saw; its ratio is the rule's false-alarm rate. None
        without.
    left_out: of a holdout: the images that are in the training set, pixel for pixel, which it therefore leaves out.
    settings: threshold, duplicates, duplicate_radius, flip, device, and what the sets were.
    warnings: why the verdict must not be relied on, one sentence each; empty where nothing speaks against it.
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
    left_out: tuple[SeenImage, ...] = ()
    warnings: tuple[str, ...] = ()
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
    def reliable(self) -> bool:
        """Whether nothing speaks against the verdict: a gate must not pass where this is False."""
        return not self.warnings

    @property
    def raw_count(self) -> int:
        return int(self.raw_memorized.sum())

    @property
    def raw_ratio(self) -> float:
        return self.raw_count / self.total

    @property
    def published_memorized(self) -> np.ndarray:
        return published_rule(self.raw_neighbors.squared_distances, Fraction(self.settings["threshold"]))

    @property
    def published_count(self) -> int:
        return int(self.published_memorized.sum())

    @property
    def published_ratio(self) -> float:
        return self.published_count / self.total

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
        return self.neighbors.distance_ratios

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
            "published_ratio": self.published_ratio,
            "published_count": self.published_count,
            "warnings": list(self.warnings),
            "training_size": self.training_size,
            "mean_rms": self.mean_rms,
            "holdout": None if self.holdout is None else self.holdout.to_dict(),
            "left_out": [asdict(image) for image in self.left_out],
            "sources": [{"index": s.index, "name": s.name, "count": s.count} for s in self.sources],
            "duplicates": [group.tolist() for group in self.duplicates],
            "settings": self.settings,
            "versions": self.versions,
            "memorized": self.memorized.tolist(),
            "raw_memorized": self.raw_memorized.tolist(),
            "published_memorized": self.published_memorized.tolist(),
            "neighbors": {
                "indices": neighbors.indices.tolist(),
                "squared_distances": neighbors.squared_distances.tolist(),
                "distances": neighbors.distances.tolist(),
                "rms": neighbors.rms.tolist(),
                **({} if neighbors.mirrored is None else {"mirrored": neighbors.mirrored.tolist()}),
            },
        }

    def summary(self) -> dict[str, Any]:
        """`to_dict` without what is said of each image; of long lists the first entries, and how many there are."""
        summary = {name: value for name, value in self.to_dict().items() if name not in _PER_IMAGE}
        holdout = None if self.holdout is None else self.holdout.summary()
        duplicates = {"groups": len(self.duplicates), "images": sum(map(len, self.duplicates))}
        return _shortened({**summary, "holdout": holdout, "duplicates": duplicates})

    def to_frame(self) -> pandas.DataFrame:
        """A row per generated image, with the columns of `samples.csv`.

        Returns:
            The table; names are as the images have them, not escaped as in the file.

        Raises:
            MissingExtraError: The package pandas is not installed.
        """
        from diffmem.memorization.report import frame

        return frame(self)

    def gate(
        self, *, fail_above: float | None = None, require_below: float | None = None, max_copies: int | None = None
    ) -> Gate:
        """Whether these images pass the limits given; see `diffmem.memorization.decide_gate`.

        Example:
            >>> gate = result.gate(require_below=0.01)  # doctest: +SKIP
            >>> assert gate.passed, gate  # doctest: +SKIP
        """
        limits = {"fail_above": fail_above, "require_below": require_below, "max_copies": max_copies}
        return decide_gate(self.count, self.interval, **limits, warnings=self.warnings)

    def _repr_html_(self) -> str:
        """What notebooks show: the verdict and the surest copies."""
        from diffmem.memorization.report import render_summary

        return render_summary(self)

    def save(self, folder: str | Path) -> Path:
        """Write `report.html`, `samples.csv` and `report.json` into `folder` and return the path of the report.

        The three appear together, when all are written. In `samples.csv` names that spreadsheets would take for
        formulas begin with an apostrophe, and invisible characters are escaped. Raises InputError where that cannot be
        done.
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
    index: SearchIndex | str | None = None,
    split_grid: bool = False,
    value_range: tuple[float, float] | Mapping[str, tuple[float, float]] | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Which generated images are copies of training images, by the nearest / second-nearest rule.

    generated, training, holdout: anything that `diffmem.load_images` reads: a path, an array [N, C, H, W], a tensor,
        an ImageSet, …. They must agree in size, channels and dtype. `holdout`: real images that the model has not
        seen; their share of "copies" is the rule's false-alarm rate. Those that are in the training set, pixel for
        pixel (or mirrored, with `flip`), are left out and named in the holdout's `left_out`.
    threshold: on d1/d2 (see `diffmem.memorization.criteria`); 1/3 in the paper.
    duplicates: "collapse" takes the second neighbor among the training images that are farther than the duplicate
        radius from the first; "keep" is the paper's rule, to which a copy of a duplicated training image stays unseen.
        `raw_ratio` is always the latter.
    duplicate_radius: training images within this distance (rms per value, grey levels for uint8) are duplicates; 0:
        identical images.
    flip: compare mirrored generated images too (for models trained with horizontal flips).
    device: "cpu", "cuda", or "auto".
    index: an index of the training set made before (`TrainingIndex`, `ShardedIndex`, `FaissIndex`), or a name:
        "exact", the default, a new `TrainingIndex`; "flat", "ivf", "ivf1024", "hnsw" or a factory string of FAISS, a
        new `FaissIndex`, which may miss neighbors: how many is measured on a sample and is in `settings["search"]`.
        An index of other images, or of another order, is refused.
    split_grid: the generated images are sheets of images in a grid, to be cut into images of the training images' size.
    value_range: the values of black and white in sets of floats, such as (-1, 1) or (0, 1), which become gray levels
        (see `load_images`); or one for each, {"generated": (-1, 1), "training": (0, 1)}. Without it floats are compared
        as they are, and refused where they look to be on different scales.
    progress: a callback (`diffmem.progress`), or None.
    Raises InputError (a ValueError) for empty sets, sets that do not fit together, values that are not finite,
    fewer than two distinct training images, and a holdout set without an image that is not in the training set.
    """
    exact_threshold = parse_threshold(threshold)
    if duplicates not in ("collapse", "keep"):
        raise InputError(f'duplicates must be "collapse" or "keep", got {duplicates!r}')
    progress = progress or silent
    ranges = _ranges(value_range)
    training = load_images(training, value_range=ranges.get("training"), progress=progress)
    generated = load_images(generated, value_range=ranges.get("generated"), progress=progress)
    unseen = None if holdout is None else load_images(holdout, value_range=ranges.get("holdout"), progress=progress)
    if split_grid:
        generated = cut_sheets(generated, training.image_shape[1:])
    if any(each is not None and each.images.dtype == np.float64 for each in (training, generated, unseen)):
        # Each float32 value is a float64 value.
        training, generated, unseen = (
            replace(each, images=each.images.astype(np.float64))
            if each is not None and each.images.dtype == np.float32
            else each
            for each in (training, generated, unseen)
        )
    _check_sets(generated, training, "generated")
    if unseen is not None:
        _check_sets(unseen, training, "holdout")

    if index is None or index == "exact":
        index = TrainingIndex(training, device=device)
    elif isinstance(index, str):
        index = FaissIndex(training, faiss_factory(index, len(training)), device=device, progress=progress)
    else:
        check_index(index, training)
    exact = None if duplicate_radius == 0 or isinstance(index, FaissIndex) else index
    groups = find_duplicates(training.images, duplicate_radius, flip=flip, index=exact, progress=progress)
    if groups.distinct < 2:
        raise InputError(
            f"the rule needs at least two distinct training images; {training.source} holds {len(training)} "
            f"image(s), {groups.distinct} distinct"
        )
    search = DistinctNeighbors(index, training.images, groups, radius=duplicate_radius, flip=flip, progress=progress)
    settings = {
        "threshold": str(exact_threshold),
        "duplicates": duplicates,
        "duplicate_radius": float(duplicate_radius),
        "flip": flip,
        "device": str(index.device),
        "training": _describe(training),
    }

    # More than the rule's two: copies of images that the training set holds in several versions show there.
    looked_at = min(NEIGHBORS, len(training)) if duplicates == "collapse" else 2
    about_training = Appearance.of(training.images)

    def judge(images: ImageSet, nearest: Neighbors, what: str, **others: Any) -> Audit:
        raw = nearest.first(2)
        raw_memorized = ratio_rule(raw.squared_distances, exact_threshold)
        check_scale(images, training, what, copies=float(raw_memorized.mean()))
        found = _describe_search(index, search.recall)
        chosen, warnings = raw, (*suspicions(images, training, about_training), *_missed(found))
        if duplicates == "collapse":
            chosen = search.outside_duplicates(images.images, raw)
        memorized = ratio_rule(chosen.squared_distances, exact_threshold)
        if duplicates == "collapse":
            warnings += hidden_copies(search, nearest, memorized, exact_threshold)
        return Audit(
            memorized=memorized,
            raw_memorized=raw_memorized,
            neighbors=chosen,
            raw_neighbors=raw,
            duplicate_groups=groups,
            generated=images,
            training=training,
            settings={**settings, "generated": _describe(images), "search": found},
            warnings=warnings,
            **others,
        )

    holdout_audit = None
    if unseen is not None:
        kept, nearest, left_out = _without_seen(unseen, search.nearest(unseen.images, looked_at), training)
        holdout_audit = judge(kept, nearest, "holdout", left_out=left_out)
    return judge(generated, search.nearest(generated.images, looked_at), "generated", holdout=holdout_audit)


def _ranges(value_range: Any) -> dict[str, Any]:
    """value_range by set."""
    sets = ("generated", "training", "holdout")
    if not isinstance(value_range, Mapping):
        return dict.fromkeys(sets, value_range)
    if unknown := set(value_range) - set(sets):
        raise InputError(f"value_range: {', '.join(map(str, unknown))} is none of the sets {', '.join(sets)}")
    # Without one of its own, the holdout set is taken to be made like the training set.
    return {"holdout": value_range.get("training"), **value_range}


def _without_seen(
    holdout: ImageSet, nearest: Neighbors, training: ImageSet
) -> tuple[ImageSet, Neighbors, tuple[SeenImage, ...]]:
    """The holdout images that are not in the training set, their neighbors, and those that are."""
    seen = nearest.squared_distances[:, 0] == 0
    if seen.all():
        raise InputError(
            f"holdout: all {len(holdout):,} images ({holdout.source}) are images of the training set "
            f"({training.source}): give real images that the model has not seen"
        )
    if not seen.any():
        return holdout, nearest, ()
    left_out = tuple(
        SeenImage(int(row), holdout.name(int(row)), int(column), training.name(int(column)))
        for row, column in zip(np.flatnonzero(seen), nearest.indices[seen, 0], strict=True)
    )
    return holdout.select(np.flatnonzero(~seen)), nearest.select(~seen), left_out


def _check_sets(images: ImageSet, training: ImageSet, what: str) -> None:
    for name, image_set in ((what, images), ("training", training)):
        if len(image_set) == 0:
            raise InputError(f"the {name} set ({image_set.source}) is empty")
    if images.images.dtype != training.images.dtype:
        floats = training if images.images.dtype == np.uint8 else images
        low, high = extremes(floats.images)
        raise InputError(
            f"{what} images ({images.source}) are {images.images.dtype}, training images ({training.source}) are "
            f"{training.images.dtype}: bring the floats, {low:.4g} to {high:.4g}, to gray levels with "
            f"{scale_recipe(floats)}"
        )
    ours, theirs = images.image_shape, training.image_shape
    if ours[0] != theirs[0]:
        kinds = {1: "grey (1 channel)", 3: "colour (3 channels)"}
        our_kind, their_kind = (kinds.get(shape[0], f"{shape[0]}-channel") for shape in (ours, theirs))
        raise InputError(
            f"{what} images ({images.source}) are {our_kind}, training images ({training.source}) are {their_kind}: "
            "bring both to color='gray' or color='rgb'"
        )
    if ours != theirs:
        raise InputError(
            f"{what} images ({images.source}) are {ours[1]}x{ours[2]}, training images ({training.source}) are "
            f"{theirs[1]}x{theirs[2]}: {_size_advice(images, training, what)}"
        )


def _size_advice(images: ImageSet, training: ImageSet, what: str) -> str:
    """How to bring both to one size: the smaller one, since enlarged images have lost what the others still hold."""
    ours, theirs = images.image_shape[1:], training.image_shape[1:]
    smaller = min(ours, theirs, key=lambda size: (size[0] * size[1], size))
    advice = f"bring both to the smaller size with resize={min(smaller)}"
    if ours[0] * theirs[1] != ours[1] * theirs[0]:
        advice += ", and center_crop=True where the training images were prepared by cutting out their central square"
    grid = grid_of(images, theirs) if what == "generated" else None
    if grid is not None:
        seen = "They look like" if looks_tiled(images, grid, theirs) else "Where they are"
        advice += (
            f". {seen} sheets of {grid.rows}x{grid.columns} images in a grid"
            f"{': cut them apart' if seen == 'They look like' else ', cut them apart'} with split_grid=True instead"
        )
    return advice


def _describe_search(index: SearchIndex, recall: tuple[FaissStats, ...]) -> dict[str, Any]:
    """How the neighbors were found, and what share of them where some may have been missed."""
    if not isinstance(index, FaissIndex):
        return {"method": "exact"}
    return {
        "method": "faiss",
        "index": index.factory,
        "recall_nearest": min(stats.recall_nearest for stats in recall),
        "recall_second": min(stats.recall_second for stats in recall),
        "recall_sample": min(stats.sample for stats in recall),
    }


def _missed(search: dict[str, Any]) -> tuple[str, ...]:
    """The warning where so many neighbors were missed that the verdict hangs on it."""
    if search["method"] == "exact" or min(search["recall_nearest"], search["recall_second"]) >= LEAST_RECALL:
        return ()
    return (
        f"FAISS ({search['index']}) found {percent(search['recall_nearest'])} of the nearest and "
        f"{percent(search['recall_second'])} of the second nearest training images ({search['recall_sample']:,} "
        "images searched exactly): a missed nearest image hides a copy, a missed second one makes a false alarm; "
        "search exactly, or with an index that looks farther",
    )


def _shortened(values: dict[str, Any]) -> dict[str, Any]:
    """Plain JSON types with lists of at most `_SHOWN` entries; how many a longer one has is added under `…_total`."""
    short: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            short[name] = _shortened(value)
        elif isinstance(value, list) and len(value) > _SHOWN:
            short |= {name: value[:_SHOWN], f"{name}_total": len(value)}
        else:
            short[name] = value
    return short


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
