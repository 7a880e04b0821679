"""`measure`: every measure of copying of the same images, in one table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmem.data import ImageSet, load_images
from diffmem.data.arrays import is_tensor, to_numpy
from diffmem.errors import InputError
from diffmem.features import FeatureSet, extract, extractor, load_features
from diffmem.memorization.criteria import CRITERIA, Comparison, Criterion, Measured, Points, Searches, Variant
from diffmem.memorization.criteria import find_criterion as find
from diffmem.memorization.criteria.mifid import LARGEST
from diffmem.memorization.indexed import is_index
from diffmem.memorization.inputs import check_sets, in_one_precision, value_ranges
from diffmem.memorization.plausibility import SetFigures, check_scale, suspicions
from diffmem.memorization.result import software_versions
from diffmem.memorization.statistics import wilson_interval
from diffmem.progress import Progress, silent

if TYPE_CHECKING:
    import pandas

BOOTSTRAPS = 1000
BOOTSTRAP_ROWS = 1 << 20  # rows drawn at a time
SET_NAMES = ("generated", "training", "holdout", "second", "second_training")
_NEEDS = {
    "holdout": "real images that the model has not seen: pass holdout=…",
    "images": "images: these are vectors, which have no tiles",
    "second": "images of a second model from the same latents: pass second=…",
}


@dataclass(frozen=True, repr=False)
class Measures:
    """What the measures of copying say of some generated images.

    Attributes:
        values: Each number by its stable name, such as "authenticity", "c_t" or "mifid_distance_generated".
        intervals: 95 % intervals of those values that are shares or means over images: of shares Wilson's, of means
            from 1,000 bootstrap samples of the generated images, of C_T from the ranks. They cover the choice of
            images alone.
        honest: What each value is for honest images: holdout images in the generated images' place, as many of them
            where there are enough. Empty without a holdout set.
        per_image: By name, an array [M] with what each generated image contributes.
        honest_per_image: The same of the holdout images.
        skipped: By name of the measure, why it was left out of "all".
        notes: What else a person should know, one sentence each.
        warnings: Why the values must not be relied on, one sentence each.
        settings: What was compared, and how.
        images: The sets by name ("generated", "training", …), where they are images.
        versions: Versions of the software that decides the numbers.

    Example:
        >>> import diffmem
        >>> digits = diffmem.load_images("builtin:digits").images
        >>> found = diffmem.measure(digits[990:1010], digits[:1000], measures="ratio,authenticity")
        >>> found.values["ratio"], found["authenticity"]
        (0.5, 0.15)
    """

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    honest: dict[str, float]
    per_image: dict[str, np.ndarray]
    honest_per_image: dict[str, np.ndarray]
    skipped: dict[str, str]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    settings: dict[str, Any]
    images: dict[str, ImageSet | None] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=software_versions)

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def columns(self) -> dict[str, list[Any]]:
        """The table of values as columns: name, value, low and high (the interval), honest, better, share, what,
        measure, formula, source and blind (what it cannot see); None where there is nothing."""
        names = list(self.values)
        about = [describe(name) for name in names]
        return {
            "name": names,
            "value": [self.values[name] for name in names],
            "low": [self.intervals.get(name, (None, None))[0] for name in names],
            "high": [self.intervals.get(name, (None, None))[1] for name in names],
            "honest": [self.honest.get(name) for name in names],
            "better": [value.better for _, value, _ in about],
            "share": [value.share for _, value, _ in about],
            "what": [value.what for _, value, _ in about],
            "measure": [criterion.name for criterion, _, _ in about],
            "formula": [criterion.formula for criterion, _, _ in about],
            "source": [source for _, _, source in about],
            "blind": [criterion.blind for criterion, _, _ in about],
        }

    def to_frame(self, *, per_image: bool = False) -> pandas.DataFrame:
        """The table of values, or one row per generated image.

        Args:
            per_image: A row per generated image, a column for each array of `per_image`, instead of a row per value.

        Returns:
            The table, its index the values' names or the images'.

        Raises:
            MissingExtraError: The package pandas is not installed; `columns()` needs none.
        """
        return _report().frame(self, per_image)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays, in plain JSON types; what is not finite becomes None."""
        return {
            "values": {name: _plain(value) for name, value in self.values.items()},
            "intervals": {name: [_plain(end) for end in pair] for name, pair in self.intervals.items()},
            "honest": {name: _plain(value) for name, value in self.honest.items()},
            "skipped": self.skipped,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "settings": self.settings,
            "versions": self.versions,
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    def name(self, row: int) -> str:
        """What to call a generated image."""
        images = self.images.get("generated")
        return f"#{row}" if images is None else images.name(row)

    def save(self, folder: str | Path) -> Path:
        """Writes `measures.html`, `measures.csv` (a row per value), `images.csv` (a row per generated image) and
        `measures.json` into `folder`, together, and returns the path of the page.

        Raises:
            InputError: That cannot be done.
        """
        return _report().write(self, folder)

    def __repr__(self) -> str:
        return f"<Measures: {', '.join(f'{name} {value:.4g}' for name, value in self.values.items())}>"

    def _repr_html_(self) -> str:
        """What notebooks show: the table."""
        return _report().render_table(self)


def measure(
    generated: Any,
    training: Any,
    holdout: Any = None,
    *,
    measures: str | Iterable[str] = "all",
    features: Any = "pixels",
    cells: Any = None,
    second: Any = None,
    second_training: Any = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    device: str = "auto",
    value_range: Any = None,
    progress: Progress | None = None,
) -> Measures:
    """What every measure of copying that the field uses says of the same generated images.

    Each pair of sets is searched once, exactly, for all measures together; memory grows with the sets, not with their
    product. The measures, their formulas and sources are in `diffmem.memorization.criteria`.

    Args:
        generated: The generated images: anything that `diffmem.load_images` reads; vectors, an array or tensor [M, d]
            of uint8 or floats; or a `diffmem.features.FeatureSet`.
        training: The training images, likewise.
        holdout: Real images that the model has not seen, likewise: some measures need them, and they show what each
            value is for honest images.
        measures: "all", or names, as a list or separated by commas: of a criterion or one of its values
            ("authenticity", "c_t_global"), or of somebody's variant ("authenticity:fld"), which "all" leaves out. "all"
            leaves out what cannot be computed from what is given, and says so in `skipped`; a measure that is named and
            cannot be computed is an error.
        features: What images are compared by, as for `diffmem.audit`: "pixels", a network's name, a function;
            "precomputed" where the sources are files of vectors; or vectors beside the images, {"generated": …,
            "training": …}. Vectors are taken as they are: each measure has its own distance, Euclidean or cosine.
        cells: The cells of C_T: labels (training, holdout, generated) as integers [n] each, or "labels", those of the
            sets themselves. None: k-means of the training set.
        second: What a second model generated from the same latents (`disjoint_halves`).
        second_training: What that was trained on; None: the same training set.
        settings: Choices by measure: {"tile_max": {"tile": 8}, "ratio": {"threshold": "1/2"}}; see each module of
            `diffmem.memorization.criteria`.
        seed: Seed of k-means and the bootstrap.
        device: "cpu", "cuda", or "auto".
        value_range: The values of black and white in sets of floats; see `diffmem.audit`.
        progress: A callback (`diffmem.progress`), or None.

    Returns:
        Values, intervals and what honest images give.

    Raises:
        InputError: Sets that do not fit together or are empty, values that are not finite, unknown measures, or a
            measure that is named and lacks what it needs.

    Example:
        >>> import diffmem
        >>> digits = diffmem.load_images("builtin:digits").images
        >>> found = diffmem.measure(digits[900:1100], digits[:1000], digits[1100:], measures=["c_t_global", "m3"])
        >>> found["c_t_global"] < -3, round(found.values["m3"], 2), sorted(found.honest)
        (True, 0.65, ['c_t_global', 'm3', 'm3_median'])
    """
    asked = _asked(measures)
    progress = progress or silent
    given = dict(zip(SET_NAMES, (generated, training, holdout, second, second_training), strict=True))
    for name, each in given.items():
        if is_index(each):
            raise InputError(
                f"{name}: {each} is an index folder, and measures compare all images in memory: give the images or "
                "vectors that it was built from"
            )
    points, images, source = _read(given, features, value_ranges(value_range), device, progress)
    points = _with_cells(points, images, cells)
    for name in settings or {}:
        if name not in CRITERIA:
            raise InputError(f"settings: {name!r} is not one of {', '.join(CRITERIA)}")
    wanted = [each.criterion for each in asked]
    comparison = Comparison(
        *(points[name] for name in SET_NAMES),
        searches=Searches(device, progress),
        neighbors=max(criterion.neighbors for criterion in wanted),
        seed=seed,
        settings=settings or {},
    )
    found, honest, skipped = _run(comparison, asked, cells)
    intervals = _intervals(found, seed)
    return Measures(
        values={name: float(value) for each in found for name, value in each.values.items()},
        intervals=intervals,
        honest={name: float(value) for each in honest for name, value in each.values.items()},
        per_image=_joined(found),
        honest_per_image=_joined(honest),
        skipped=skipped,
        notes=tuple(dict.fromkeys(note for each in found for note in each.notes)),
        warnings=_warnings(comparison, images),
        settings={
            "measures": "all" if not any(each.named for each in asked) else [each.name for each in asked],
            "features": source,
            "cells": "k-means" if cells is None else "labels" if isinstance(cells, str) else "given",
            "settings": {name: dict(chosen) for name, chosen in (settings or {}).items()},
            "seed": seed,
            "honest_images": 0
            if comparison.holdout is None
            else min(len(comparison.holdout), len(comparison.generated)),
            "dimension": comparison.training.dimension,
            "dtype": str(comparison.training.values.dtype),
            **{name: _source(points[name], images[name]) for name in SET_NAMES if points[name] is not None},
        },
        images=images,
    )


def describe(name: str) -> tuple[Criterion, Any, str]:
    """The criterion that gives the value of that name, what the value is, and its source."""
    criterion, variant = find(name)
    if variant is None:
        return criterion, criterion.values[name], criterion.source
    return criterion, variant.value, variant.source


@dataclass(frozen=True)
class _Asked:
    """A criterion, or a variant of it, that is to be measured; named: not just a part of "all"."""

    name: str
    criterion: Criterion
    variant: Variant | None
    named: bool

    @property
    def described(self) -> Criterion | Variant:
        return self.variant or self.criterion


def _asked(measures: str | Iterable[str]) -> list[_Asked]:
    """What is asked for, each once."""
    words = measures.split(",") if isinstance(measures, str) else list(measures)
    words = [word.strip() for word in words if str(word).strip()]
    if not words:
        raise InputError('measures="": no measure is named; give "all" or names')
    asked: dict[str, _Asked] = {}
    if "all" in words:
        asked |= {name: _Asked(name, criterion, None, False) for name, criterion in CRITERIA.items()}
    for word in words:
        if word == "all":
            continue
        criterion, variant = find(word)
        name = criterion.name if variant is None else f"{criterion.name}:{word.partition(':')[2]}"
        asked[name] = _Asked(name, criterion, variant, True)
    return list(asked.values())


def _read(
    given: dict[str, Any], features: Any, ranges: Mapping[str, Any], device: str, progress: Progress
) -> tuple[dict[str, Points | None], dict[str, ImageSet | None], str]:
    """The sets as points that fit together, as images where they are, and what they are compared by."""
    given = {name: source for name, source in given.items() if source is not None}
    if isinstance(features, str) and features == "precomputed":
        sets = {name: load_features(source) for name, source in given.items()}
        return _fitting_vectors(sets), dict.fromkeys(SET_NAMES), sets["training"].features
    are_vectors = {name: isinstance(source, FeatureSet) or _is_matrix(source) for name, source in given.items()}
    if any(are_vectors.values()):
        if not all(are_vectors.values()):
            images, vectors = (next(name for name, are in are_vectors.items() if are == kind) for kind in (False, True))
            raise InputError(f"{vectors} holds vectors, {images} images: give all as images, or all as vectors")
        if not isinstance(features, str) or features != "pixels":
            raise InputError("features= is for images, but these are vectors")
        sets = {name: _as_features(source, name) for name, source in given.items()}
        return _fitting_vectors(sets), dict.fromkeys(SET_NAMES), sets["training"].features
    beside: Mapping[str, Any] = features if isinstance(features, Mapping) else {}
    if beside and (missing := set(given) - set(beside)):
        raise InputError(f"features: the vectors of the {', '.join(sorted(missing))} images are missing")
    maker = None if beside else extractor(features, device=device)
    images = _read_images(given, ranges, progress, maker is not None and not maker.resizes)
    if maker is not None and maker.name == "pixels":
        points = {name: None if each is None else Points(each.images, name) for name, each in images.items()}
        return points, images, "pixels"
    sets = {}
    for name, each in images.items():
        if each is None:
            continue
        sets[name] = load_features(beside[name]) if beside else extract(each, maker, progress=progress)
        if len(sets[name]) != len(each):
            raise InputError(f"features: {len(sets[name]):,} vectors of {len(each):,} {name} images")
    return _fitting_vectors(sets), images, sets["training"].features


def _read_images(
    given: dict[str, Any], ranges: Mapping[str, Any], progress: Progress, one_size: bool
) -> dict[str, ImageSet | None]:
    images: dict[str, ImageSet | None] = {
        name: load_images(source, value_range=ranges.get(name, ranges.get("training")), progress=progress)
        for name, source in given.items()
    }
    images = dict(zip(images, in_one_precision(*images.values()), strict=True))
    training = images["training"]
    for name, each in images.items():
        if name != "training":
            check_sets(each, training, name, sizes=one_size)
            if training.images.dtype != np.uint8:
                figures, theirs = SetFigures.of(each.images), SetFigures.of(training.images)
                check_scale(figures, theirs, name, (each.source, training.source))
    return {name: images.get(name) for name in SET_NAMES}


def _is_matrix(source: Any) -> bool:
    return (isinstance(source, np.ndarray) or is_tensor(source)) and source.ndim == 2


def _as_features(source: Any, name: str) -> FeatureSet:
    if isinstance(source, FeatureSet):
        return source
    rows = to_numpy(source, name)
    return FeatureSet(rows, source=name, features="vectors")


def _fitting_vectors(sets: dict[str, FeatureSet]) -> dict[str, Points | None]:
    """The vectors as they are, whatever they are compared by elsewhere: a measure has its own distance."""
    training = sets["training"]
    for name, each in sets.items():
        if name == "training":
            continue
        if each.dimension != training.dimension:
            raise InputError(f"{name}: vectors of {each.dimension:,} values, training: of {training.dimension:,}")
        if each.fingerprint and training.fingerprint and each.fingerprint != training.fingerprint:
            raise InputError(
                f"{name} and training vectors were computed by different networks or preprocessing: "
                f"{each.fingerprint}; "
                f"{training.fingerprint}: compute both with the same one"
            )
    kinds = {each.vectors.dtype for each in sets.values()}
    if np.dtype(np.uint8) in kinds and len(kinds) > 1:
        raise InputError("some vectors are uint8, others floats: use one dtype")
    dtype = np.result_type(*kinds)
    dtype = np.dtype(np.float32) if dtype == np.float16 else dtype
    points: dict[str, Points | None] = dict.fromkeys(SET_NAMES)
    for name, each in sets.items():
        points[name] = Points(each.vectors.astype(dtype, copy=False), name)
    return points


def _with_cells(
    points: dict[str, Points | None], images: dict[str, ImageSet | None], cells: Any
) -> dict[str, Points | None]:
    """The points with their cells, where these are given."""
    if cells is None:
        return points
    order = ("training", "holdout", "generated")
    if isinstance(cells, str):
        if cells != "labels":
            raise InputError(f'cells: "labels", or the labels (training, holdout, generated), got {cells!r}')
        given = {name: None if images[name] is None else images[name].labels for name in order}
        for name in order:
            if images[name] is not None and (given[name] is None or given[name].ndim != 1):
                raise InputError(f"cells: the {name} images have no class labels")
    else:
        try:
            given = dict(zip(order, cells, strict=True))
        except (TypeError, ValueError):
            raise InputError("cells: must be three arrays of labels: (training, holdout, generated)") from None
    labeled = dict(points)
    for name, labels in given.items():
        if points[name] is None or labels is None:
            continue
        labels = to_numpy(labels, "cells")
        if labels.shape != (len(points[name]),) or labels.dtype.kind not in "iu":
            raise InputError(
                f"cells: {len(points[name]):,} integers are needed for {name}, got {labels.dtype} {labels.shape}"
            )
        labeled[name] = replace(points[name], cells=labels.astype(np.int64))
    return labeled


def _run(
    comparison: Comparison, asked: list[_Asked], cells: Any
) -> tuple[list[Measured], list[Measured], dict[str, str]]:
    """What was found of the generated images and of honest ones, and what was left out."""
    honest_comparison = comparison.honest()
    found, honest, skipped = [], [], {}
    for each in asked:
        name, described = each.name, each.described
        lacking = _lacking(comparison, described.needs)
        if not each.named and lacking is None and name == "mifid" and comparison.training.dimension > LARGEST:
            lacking = f"FID of {comparison.training.dimension:,} values takes long and is not usual: name it for that"
        if lacking is not None:
            if each.named:
                raise InputError(f"measures={name!r} needs {lacking}")
            skipped[name] = lacking
            continue
        try:
            measured = described.measure(comparison)
        except InputError as error:
            if each.named or (cells is not None and str(error).startswith("cells:")):
                raise
            skipped[name] = str(error)
            continue
        found.append(measured)
        if each.variant is None and each.criterion.honest is not None:
            honest.append(Measured(each.criterion.honest(comparison)))
        elif honest_comparison is not None and not {"holdout", "second"} & set(described.needs):
            try:
                honest.append(described.measure(honest_comparison))
            except InputError:  # such as too few of them
                continue
    return found, honest, skipped


def _lacking(comparison: Comparison, needs: tuple[str, ...]) -> str | None:
    """What a measure needs and is not given, or None."""
    there = {
        "holdout": comparison.holdout is not None,
        "images": comparison.images,
        "second": comparison.second is not None,
    }
    return next((_NEEDS[need] for need in needs if not there[need]), None)


def _intervals(found: list[Measured], seed: int) -> dict[str, tuple[float, float]]:
    """Of all values that have one: Wilson's of shares, the bootstrap's of means, and those the criteria gave."""
    intervals: dict[str, tuple[float, float]] = {}
    means: dict[str, np.ndarray] = {}
    for each in found:
        for name, array_name in each.means_of.items():
            values = each.per_image[array_name]
            if values.dtype == bool:
                intervals[name] = wilson_interval(int(values.sum()), len(values))
            else:
                means[name] = values
        intervals |= each.intervals
    intervals |= bootstrap_means(means, seed)
    order = [name for each in found for name in each.values]
    return {name: intervals[name] for name in order if name in intervals}


def bootstrap_means(columns: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, tuple[float, float]]:
    """The 95 % percentile interval of the mean of each column over the same 1,000 samples of its rows.

    Args:
        columns: float64 [M] each; NaN is left out of the mean.
        seed: Seed of the samples.
    """
    if not columns:
        return {}
    table = np.stack([np.asarray(values, np.float64) for values in columns.values()], axis=1)
    there = ~np.isnan(table)
    both = np.concatenate([np.where(there, table, 0), there], axis=1)
    random = np.random.default_rng(seed)
    count, means = len(table), np.empty((BOOTSTRAPS, len(columns)))
    step = max(1, BOOTSTRAP_ROWS // count)
    for start in range(0, BOOTSTRAPS, step):
        draws = min(step, BOOTSTRAPS - start)
        drawn = random.integers(count, size=(draws, count)) + count * np.arange(draws)[:, None]
        times = np.bincount(drawn.reshape(-1), minlength=draws * count).reshape(draws, count).astype(np.float64)
        totals, counts = np.split(times @ both, 2, axis=1)
        means[start : start + draws] = np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)
    ends = [np.nanpercentile(column, [2.5, 97.5]) if np.isfinite(column).any() else (np.nan,) * 2 for column in means.T]
    return {name: (float(low), float(high)) for name, (low, high) in zip(columns, ends, strict=True)}


def _joined(found: list[Measured]) -> dict[str, np.ndarray]:
    return {name: values for each in found for name, values in each.per_image.items()}


def _warnings(comparison: Comparison, images: dict[str, ImageSet | None]) -> tuple[str, ...]:
    found: list[str] = []
    if images["generated"] is not None:
        ours = SetFigures.of(images["generated"].images, count_identical=True)
        found += suspicions(ours, SetFigures.of(images["training"].images))
    if comparison.holdout is not None:
        seen = int((comparison.holdout_nearest(1).squared_distances[:, 0] == 0).sum())
        if seen:
            found.append(
                f"{seen:,} of {len(comparison.holdout):,} holdout images are training images, pixel for pixel: the "
                "values for unseen images include them; remove them."
                if comparison.images
                else f"{seen:,} of {len(comparison.holdout):,} holdout vectors equal training vectors: the values for "
                "unseen images include them; remove them."
            )
    return tuple(found)


def _source(points: Points, images: ImageSet | None) -> dict[str, Any]:
    shape = list(points.values.shape)
    return {"source": "array" if images is None else images.source, "images": shape[0], "shape": shape[1:]}


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _report() -> ModuleType:
    """What writes results for people; it knows them, so that it is loaded when asked for."""
    from diffmem.memorization import measures_report

    return measures_report
