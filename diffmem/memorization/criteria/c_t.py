"""C_T (Meehan, Chaudhuri, Dasgupta 2020): are generated images nearer to the training images than unseen ones are?

Formula. In each cell of a partition, U counts the pairs (generated, held-out) in which the generated image is the
farther one from its nearest training image of the cell, ties one half; with m generated and n held-out images there,

    Z = (U − (nm/2 − 1/2)) / √(nm(n + m + 1) / 12),     C_T = Σ π_c Z_c / Σ π_c

over the cells that hold more than a share of 20/M of all M generated images (strictly), π_c the cell's share of the
held-out images. Far below 0: copying; above 0: underfitting. `c_t` takes the cells that are given (`cells`), and else
those of k-means (k = 3, n_init = 10) of the training set, in the space that is compared; where the training set holds
more than 8 million values, of evenly spaced images that hold so many. `c_t_global` is one Z without cells. A cell
without held-out or training images is an error; one without generated images counts as Z = 0.

Source: Meehan et al., A Non-Parametric Test to Detect Data-Copying in Generative Models (AISTATS 2020) and its code.
The variance has no correction for ties, and the mean is shifted by 1/2, as there. Variants: `c_t:dgm-eval` and
`c_t:fld` first project on the 64 leading principal components of the training set where d > 64, distances included,
with cells from k-means; numbers drawn by scikit-learn from the seed, in the published order.

The interval treats images as drawn independently (DeLong et al. 1988), the cells as given.

What it cannot see: copies that make up a small share (it is a test of the median image, not of the nearest), copying
that underfitting elsewhere in the cell makes up for, and a holdout set that is not like the training set.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from math import sqrt
from types import ModuleType

import numpy as np

from diffmem.errors import InputError, MissingExtraError
from diffmem.memorization.criteria.comparison import Comparison, Points, Searches
from diffmem.memorization.criteria.criterion import Criterion, Measured, Value, Variant

CELLS = 3
STARTS = 10
LEAST = 20  # generated images of a cell that counts: more than a share of LEAST / M
COMPONENTS = 64
FITTED_VALUES = 1 << 23  # of the training images that k-means is fitted to
LEAST_FITTED = 1000

Cells = tuple[np.ndarray, np.ndarray, np.ndarray]


def z_score(generated: np.ndarray, holdout: np.ndarray) -> tuple[float, float]:
    """Z and its standard error.

    Args:
        generated: [m], the distances of generated images to the nearest training image; squared ones do as well.
        holdout: [n], likewise.

    Returns:
        Z of the module's formula, and its standard deviation under resampling (1 where distances come of one law).
    """
    m, n = len(generated), len(holdout)
    ours, theirs = np.sort(generated), np.sort(holdout)
    # Share of held-out images that a generated one is farther than, ties one half, and the reverse.
    placed = (np.searchsorted(theirs, ours, "left") + np.searchsorted(theirs, ours, "right")) / (2 * n)
    reverse = (np.searchsorted(ours, theirs, "left") + np.searchsorted(ours, theirs, "right")) / (2 * m)
    u = float(placed.sum()) * n
    deviation = sqrt(n * m * (n + m + 1) / 12)
    spread = sum(float(np.var(part, ddof=1)) / len(part) for part in (placed, reverse) if len(part) > 1)
    return (u - (n * m / 2 - 0.5)) / deviation, n * m * sqrt(spread) / deviation


def combine(scores: np.ndarray, generated_counts: np.ndarray, holdout_counts: np.ndarray) -> tuple[float, np.ndarray]:
    """C_T from the Z of each cell [k], and the weight of each cell in it [k]."""
    counts = generated_counts / generated_counts.sum() > LEAST / generated_counts.sum()
    weights = np.where(counts, holdout_counts / holdout_counts.sum(), 0)
    if not weights.sum():
        raise InputError(
            f"cells: no cell holds more than {LEAST} of the generated images (C_T ignores smaller cells): give more "
            "generated images, or fewer cells"
        )
    weights = weights / weights.sum()
    return float(weights @ scores), weights


def c_t(
    sets: tuple[Points, Points, Points], cells: Cells, searches: Searches, neighbors: int = 1
) -> tuple[float, float, np.ndarray]:
    """C_T, its standard error, and the Z of each cell in the order of the cells' labels.

    Args:
        sets: Generated, training and holdout images.
        cells: The cell of each image of these sets, int64 [n] each.
        searches: Between the sets.
        neighbors: How many nearest training images are searched for at once, in the hope that one is of the same cell.
    """
    (generated, training, holdout), (ours, labels, theirs) = sets, cells
    found = np.unique(labels)
    for name, given in (("generated", ours), ("holdout", theirs)):
        if len(strange := np.setdiff1d(given, found)):
            raise InputError(f"cells: {name} images are in cell {strange[0]}, which holds no training image")
    distances = _within_cells(generated, ours, training, labels, searches, neighbors)
    unseen = _within_cells(holdout, theirs, training, labels, searches, neighbors)
    scores, errors, counts = np.zeros(len(found)), np.zeros(len(found)), np.zeros((2, len(found)))
    for place, label in enumerate(found):
        some, others = distances[ours == label], unseen[theirs == label]
        counts[:, place] = len(some), len(others)
        if not len(others):
            raise InputError(f"cells: cell {label} holds no holdout image: give fewer cells, or more holdout images")
        if len(some):
            scores[place], errors[place] = z_score(some, others)
    value, weights = combine(scores, *counts)
    return value, float(np.sqrt(np.square(weights * errors).sum())), scores


def _within_cells(
    points: Points, cells: np.ndarray, training: Points, labels: np.ndarray, searches: Searches, neighbors: int
) -> np.ndarray:
    """[n]: the squared distance of each point to the nearest training image of its cell."""
    found = searches.nearest(points, training, neighbors)
    same = labels[found.indices] == cells[:, None]
    squared = found.squared_distances[np.arange(len(points)), same.argmax(axis=1)]
    # Few images have none of their nearest neighbors in their own cell: the cell is searched for them.
    missing = ~same.any(axis=1)
    for label in np.unique(cells[missing]):
        rows = np.flatnonzero(missing & (cells == label))
        cell = training.select(np.flatnonzero(labels == label))
        squared[rows] = Searches(searches.device).nearest(points.select(rows), cell, 1).squared_distances[:, 0]
    return squared


def make_cells(
    sets: tuple[Points, Points, Points], count: int, random: int | np.random.RandomState, values: int | None = None
) -> Cells:
    """The cells of generated, training and holdout images by k-means of the training images: of evenly spaced ones that
    hold so many values together, or of all."""
    if len(sets[1]) < count:
        raise InputError(f"training: {count} cells of k-means need as many training images")
    means = _sklearn("cluster").KMeans(count, n_init=STARTS, random_state=random)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", _sklearn("exceptions").ConvergenceWarning)  # fewer distinct images than cells
        fitted = sets[1] if values is None else sets[1].spread(max(values // sets[1].dimension, LEAST_FITTED))
        means.fit(_floats(fitted))
    return tuple(
        np.concatenate([means.predict(_floats(block)).astype(np.int64) for block in points.blocks()]) for points in sets
    )


def measure(comparison: Comparison) -> Measured:
    """`c_t`."""
    sets = comparison.generated, comparison.training, comparison.holdout
    cells = tuple(points.cells for points in sets)
    if any(each is None for each in cells):
        cells = make_cells(sets, comparison.setting("c_t", "cells", CELLS), comparison.seed, FITTED_VALUES)
    value, error, scores = c_t(sets, cells, comparison.searches, comparison.neighbors)
    by_cell = ", ".join(f"{score:.2f}" for score in scores)
    return Measured(
        {"c_t": value}, intervals={"c_t": _interval(value, error)}, notes=(f"c_t, cell by cell: {by_cell}",)
    )


def measure_global(comparison: Comparison) -> Measured:
    """`c_t_global`."""
    squared = comparison.nearest(1).squared_distances[:, 0], comparison.holdout_nearest(1).squared_distances[:, 0]
    value, error = z_score(*squared)
    return Measured({"c_t_global": value}, intervals={"c_t_global": _interval(value, error)})


def projected(name: str) -> Callable[[Comparison], Measured]:
    """The measure of `c_t:dgm-eval` and `c_t:fld`, which differ in nothing but the name."""

    def measure_projected(comparison: Comparison) -> Measured:
        random = np.random.RandomState(comparison.seed)
        sets = tuple(
            Points(_floats(points), points.what)
            for points in (comparison.generated, comparison.training, comparison.holdout)
        )
        if sets[1].dimension > COMPONENTS:
            if len(sets[1]) < COMPONENTS:
                raise InputError(f"training: {name} needs at least {COMPONENTS} images, for its principal components")
            components = _sklearn("decomposition").PCA(COMPONENTS, random_state=random).fit(sets[1].values)
            sets = tuple(Points(components.transform(points.values), points.what) for points in sets)
        cells = make_cells(sets, CELLS, random)
        value, error, _ = c_t(sets, cells, Searches(comparison.searches.device))
        return Measured({name: value}, intervals={name: _interval(value, error)})

    return measure_projected


def honest(comparison: Comparison) -> Mapping[str, float]:
    """Where generated images are drawn as held-out ones are, Z is 0 on average."""
    return {"c_t": 0.0}


def honest_global(comparison: Comparison) -> Mapping[str, float]:
    """The same without cells."""
    return {"c_t_global": 0.0}


def _interval(value: float, error: float) -> tuple[float, float]:
    return value - 1.96 * error, value + 1.96 * error


def _floats(points: Points) -> np.ndarray:
    rows = points.rows.numpy()
    return rows.astype(np.float32) if rows.dtype == np.uint8 else rows


def _sklearn(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo", "C_T with cells of k-means") from error


C_T = Criterion(
    name="c_t",
    formula="Mann–Whitney Z of distances to the nearest training image, generated against held-out, mean over cells",
    source="Meehan et al. 2020, arXiv 2004.05675",
    values={"c_t": Value("within the cells given, or those of k-means", "zero")},
    measure=measure,
    blind="a small share of copies among images that are farther away than unseen ones",
    needs=("holdout",),
    neighbors=50,
    variants={
        name: Variant(
            Value("on 64 principal components, cells of k-means there", "zero"),
            projected(f"c_t:{name}"),
            source,
            ("holdout",),
        )
        for name, source in (
            ("dgm-eval", "dgm-eval (Stein et al. 2023)"),
            ("fld", "fld (Jiralerspong et al. 2023)"),
        )
    },
    honest=honest,
)

C_T_GLOBAL = Criterion(
    name="c_t_global",
    formula="Mann–Whitney Z of distances to the nearest training image, generated against held-out, without cells",
    source="Meehan et al. 2020, arXiv 2004.05675",
    values={"c_t_global": Value("Z", "zero")},
    measure=measure_global,
    blind="a small share of copies, and copies in one region that distant images in another make up for",
    needs=("holdout",),
    honest=honest_global,
)
