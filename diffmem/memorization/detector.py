"""The audit: which generated images are copies of training images, how many that is, and how sure one can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from diffmem.data import ImageSet, load_images
from diffmem.data.grid import split_grid as cut_sheets
from diffmem.errors import InputError
from diffmem.memorization.criteria import parse_threshold, ratio_rule
from diffmem.memorization.hidden import NEIGHBORS, hidden_copies
from diffmem.memorization.inputs import check_sets, value_ranges
from diffmem.memorization.plausibility import Appearance, check_scale, suspicions
from diffmem.memorization.result import Audit, SeenImage
from diffmem.pages import percent
from diffmem.progress import Progress, silent
from diffmem.search import (
    DistinctNeighbors,
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
    from diffmem.data import ImageSource


LEAST_RECALL = 0.95  # of an approximate search, below which the verdict is not to be relied on


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
    ranges = value_ranges(value_range)
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
    check_sets(generated, training, "generated")
    if unseen is not None:
        check_sets(unseen, training, "holdout")

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


def _describe(images: ImageSet) -> dict[str, Any]:
    return {
        "source": images.source,
        "images": len(images),
        "shape": list(images.image_shape),
        "dtype": str(images.images.dtype),
        "skipped": [{"name": s.name, "reason": s.reason} for s in images.skipped],
        "fingerprint": images.fingerprint,
    }
