"""`sweep`: how the copies vanish as the optimum of a training set is regularized, R_mem against c, τ or h."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffmem.atomic_io import atomic_file, output_lock
from diffmem.data import ImageSet, load_images
from diffmem.errors import InputError
from diffmem.evaluation import checked_seeds, format_seeds, sample_detector
from diffmem.inert.boundary import parsing
from diffmem.integrity import NoChecksumError, load_arrays, save_arrays
from diffmem.memorization import CopyDetector, CopyRate, ReportsRate
from diffmem.optimum import EmpiricalBayes, OptimalDenoiser, Regularization, Smoothed, Tikhonov, parse_regularization
from diffmem.progress import Progress, silent
from diffmem.sampling import SamplerConfig, sample_batches

if TYPE_CHECKING:
    from diffmem.data import ImageSource

KINDS = {"tikhonov": Tikhonov, "bayes": EmpiricalBayes, "smooth": Smoothed}
PICTURES = 8  # images of a point that are kept
NEIGHBOURS = 2000  # training images whose distance to their nearest neighbour is measured
POINTS = "points"  # in the sweep's folder


@dataclass(frozen=True, eq=False)
class SweepPoint(ReportsRate):
    """The audited images of one regularized optimum, in the order in which they were sampled.

    Attributes:
        variant: The regularization.
        seeds: int64 [n].
        memorized: bool [n], by the rule, duplicates collapsed.
        ratios: float32 [n], d1/d2.
        distances: float32 [n], rms to the nearest training image, in gray levels.
        pictures: uint8 [m, C, H, W], the first images, those of `seeds[:m]`.
    """

    variant: Regularization
    seeds: np.ndarray
    memorized: np.ndarray
    ratios: np.ndarray
    distances: np.ndarray
    pictures: np.ndarray

    @property
    def kind(self) -> str:
        """ "tikhonov", "bayes" or "smooth"."""
        return next(name for name, kind in KINDS.items() if isinstance(self.variant, kind))

    @property
    def strength(self) -> float:
        """c, ln τ or h."""
        return strength(self.variant)

    @property
    def rate(self) -> CopyRate:
        return CopyRate.of(self.memorized)

    def and_then(
        self, seeds: np.ndarray, images: np.ndarray, memorized: np.ndarray, ratios: np.ndarray, distances: np.ndarray
    ) -> SweepPoint:
        """This and the images of further seeds."""
        room = max(0, PICTURES - len(self.pictures))
        return SweepPoint(
            self.variant,
            np.concatenate([self.seeds, seeds]),
            np.concatenate([self.memorized, memorized]),
            np.concatenate([self.ratios, ratios.astype(np.float32)]),
            np.concatenate([self.distances, distances.astype(np.float32)]),
            np.concatenate([self.pictures, images[:room]]),
        )

    def of(self, seeds: Sequence[int]) -> SweepPoint:
        """The part that belongs to `seeds`."""
        rows = np.isin(self.seeds, seeds)
        per_image = (values[rows] for values in (self.seeds, self.memorized, self.ratios, self.distances))
        return SweepPoint(self.variant, *per_image, self.pictures[rows[: len(self.pictures)]])


@dataclass(frozen=True, eq=False)
class Sweep:
    """R_mem of the regularized optima of a training set.

    Attributes:
        training: The set.
        points: Kind by kind, the weakest regularization first.
        spacing: float64 [m], Euclidean distances of training images to their nearest neighbors, in the units of [-1,
            1].
        settings: What decides the images, in JSON types.
    """

    training: ImageSet
    points: tuple[SweepPoint, ...]
    spacing: np.ndarray
    settings: dict[str, Any]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(point.kind for point in self.points))

    def of(self, kind: str) -> tuple[SweepPoint, ...]:
        return tuple(point for point in self.points if point.kind == kind)

    def half(self, kind: str) -> float | None:
        """The strength (c, ln τ or h) at which half of the images are copies: where the line between the points last
        passes one half, along ln c, ln τ or ln h; None where it does not."""
        along = [(_axis(point), point.ratio) for point in self.of(kind)]
        for (x, here), (following, there) in reversed(list(itertools.pairwise(along))):
            if here >= 0.5 > there and math.isfinite(x):
                at = x + (here - 0.5) / (here - there) * (following - x)
                return at if kind == "bayes" else math.exp(at)
        return None

    def expected(self, variant: Regularization) -> float:
        """The share of copies to expect: see `expected_ratio`."""
        return expected_ratio(variant, self.spacing, self.training.dimension)

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain JSON types, without the images."""
        return {
            "training": {"source": self.training.source, "images": len(self.training)},
            "settings": self.settings,
            "half": {kind: self.half(kind) for kind in self.kinds},
            "points": [
                {
                    "variant": str(point.variant),
                    "kind": point.kind,
                    "strength": point.strength,
                    **point.rate.to_dict(),
                    "mean_distance": float(point.distances.mean()),
                    "expected": self.expected(point.variant),
                }
                for point in self.points
            ],
        }

    def save(self, folder: str | Path) -> Path:
        """Writes `sweep.html` (one self-contained page), `.svg`, `.csv` and `.json`, and a grid of images per kind;
        returns the page's path."""
        from diffmem.studies.comparison.sweeps_report import write_page

        return write_page(self, Path(folder))


def sweep(
    training: ImageSource,
    variants: Sequence[Regularization | str],
    folder: str | Path,
    *,
    seeds: Sequence[int] = range(1000),
    labels: bool | None = None,
    tolerance: float = 1e-5,
    settings: SamplerConfig = SamplerConfig(),  # noqa: B008 (frozen)
    device: str = "auto",
    progress: Progress = silent,
) -> Sweep:
    """R_mem of the optimum of `training` under each of `variants`, on the images of `seeds`.

    Args:
        training: As for `OptimalDenoiser`.
        variants: Regularizations, or names of kinds ("tikhonov", "bayes", "smooth"), which stand for strengths between
            all copies and none.
        folder: Verdicts are kept in `folder`/points as they come: a sweep that ended early resumes from there, and more
            seeds or strengths cost only those.
        seeds: Of the images.
        labels: As for `OptimalDenoiser`.
        tolerance: As for `OptimalDenoiser`.
        settings: Of the sampler.
        device: As for `OptimalDenoiser`.
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: Variants that make no sense (found before anything is sampled), or damaged files in `folder`.
    """
    seeds = checked_seeds(seeds)
    images = load_images(training, progress=progress)
    denoiser = OptimalDenoiser(images, labels=labels, tolerance=tolerance, device=device, progress=progress)
    settings.plan(denoiser)  # raises where the settings do not fit
    place = next(denoiser.parameters()).device
    detector = sample_detector(images, images.image_shape, place, progress=progress)
    spacing = nearest_neighbours(detector)
    chosen: list[Regularization] = []
    for variant in variants:
        chosen += chosen_variants(variant, spacing, images.dimension) if isinstance(variant, str) else [variant]
    if not chosen:
        raise InputError("sweep: no regularization is given")
    order = list(KINDS.values())
    chosen = sorted(set(chosen), key=lambda variant: (order.index(type(variant)), strength(variant)))
    sampler = {name: value for name, value in settings.to_json().items() if name not in ("batch", "compile")}
    files = _PointFiles(Path(folder) / POINTS, {**sampler, "device": place.type}, images.image_shape)
    points = []
    with output_lock(folder):
        for variant in chosen:
            denoiser.regularization = variant
            stage = f"sampling: {variant}, {len(points) + 1} of {len(chosen)}"
            points.append(_point(denoiser, detector, seeds, settings, files, stage, progress))
    described = {**sampler, "seeds": format_seeds(seeds), "tolerance": tolerance, "label_dim": denoiser.label_dim}
    return Sweep(images, tuple(points), spacing, described)


def _point(
    denoiser: OptimalDenoiser,
    detector: CopyDetector,
    seeds: list[int],
    settings: SamplerConfig,
    files: _PointFiles,
    stage: str,
    progress: Progress,
) -> SweepPoint:
    """The point of `denoiser.regularization`: what is kept of it, and what is left to sample."""
    point = files.read(denoiser)
    known = set(point.seeds.tolist())
    left = [seed for seed in seeds if seed not in known]
    progress(stage, len(seeds) - len(left), len(seeds))
    for made in sample_batches(denoiser, left, config=replace(settings, compile="off")):
        pictures = made.images.numpy()
        found = detector.judge(pictures)
        nearest = found.neighbors
        point = point.and_then(
            made.seeds.numpy(), pictures, found.memorized, nearest.distance_ratios, nearest.rms[:, 0]
        )  # fmt: skip
        files.write(denoiser, point)
        asked = point.of(seeds)
        progress(f"{stage}, {asked.ratio:.1%} copies", asked.total, len(seeds))
    return point.of(seeds)


class _PointFiles:
    """The points of a sweep: a file for each denoiser and way to sample from it."""

    def __init__(self, folder: Path, way: dict[str, Any], image_shape: tuple[int, int, int]):
        self.folder, self.image_shape = folder, image_shape
        self.way = json.dumps(way, sort_keys=True)

    def path(self, denoiser: OptimalDenoiser) -> Path:
        name = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in str(denoiser.regularization))
        return self.folder / f"{name}-{self._key(denoiser)[:8]}.npz"

    def _key(self, denoiser: OptimalDenoiser) -> str:
        return hashlib.sha256((self.way + denoiser.fingerprint).encode()).hexdigest()

    def read(self, denoiser: OptimalDenoiser) -> SweepPoint:
        path = self.path(denoiser)
        numbers = np.zeros(0, np.float32)
        pictures = np.zeros((0, *self.image_shape), np.uint8)
        nothing = SweepPoint(
            denoiser.regularization, np.zeros(0, np.int64), np.zeros(0, bool), numbers, numbers, pictures
        )
        if not path.exists():
            return nothing
        advice = "delete it, and its images are sampled again"
        try:
            stored = load_arrays(path, advice)
        except NoChecksumError:
            return nothing
        with parsing(path, "a point of a sweep", advice):
            if str(stored["key"]) != self._key(denoiser):
                raise ValueError("it belongs to another sweep")
            arrays = {name: stored[name] for name in ("seeds", "memorized", "ratios", "distances", "pictures")}
            return SweepPoint(denoiser.regularization, **arrays)

    def write(self, denoiser: OptimalDenoiser, point: SweepPoint) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written: {error.strerror}") from None
        names = ("seeds", "memorized", "ratios", "distances", "pictures")
        with atomic_file(self.path(denoiser)) as partial, partial.open("wb") as stream:
            arrays = {name: getattr(point, name) for name in names}
            save_arrays(stream, {"key": np.array(self._key(denoiser)), **arrays}, compress=True)


def strength(variant: Regularization) -> float:
    """c, ln τ or h."""
    if isinstance(variant, Tikhonov):
        return variant.c
    return variant.log_tau if isinstance(variant, EmpiricalBayes) else variant.h


def with_strength(kind: str, value: float) -> Regularization:
    """The variant of a kind with c, ln τ or h."""
    return KINDS[kind](value)


def _axis(point: SweepPoint) -> float:
    """Where a point lies along its plot's axis: ln c, ln τ or ln h."""
    if point.kind == "bayes":
        return point.strength
    return math.log(point.strength) if point.strength > 0 else -math.inf


def nearest_neighbours(detector: CopyDetector) -> np.ndarray:
    """Distances (units of [-1, 1]) from training images, at most `NEIGHBOURS` of them, to their nearest neighbours."""
    training = detector.training.images
    rows = np.unique(np.linspace(0, len(training) - 1, min(len(training), NEIGHBOURS)).astype(int))
    squared = detector.index.query(np.ascontiguousarray(training[rows]), 2).squared_distances[:, 1].astype(np.float64)
    return np.sqrt(squared) / (127.5 if training.dtype == np.uint8 else 1)


def expected_ratio(variant: Regularization, spacing: np.ndarray, dimension: int) -> float:
    """The share of copies that a rough calculation expects of a regularized optimum.

    On its way to training image y the sampler's state is x = y + r, and r shrinks by dr/dσ = r·σ/(σ² + c) for Tikhonov
    (c = h² for smoothed data): the √(σ² + c) that solves this leaves √c of white noise per pixel at σ = 0. With D the
    distance from y to its nearest neighbour, d1² = c·d and d2² ≈ c·d + D² in d dimensions: a copy by d1 < d2/3 where
    D² > 8·c·d. The empirical Bayes denoiser follows the exact one while Σ p_i ≈ exp(−‖r/σ‖²/2) is above τ, and r/σ
    keeps the latent's length, χ² with d degrees of freedom: a copy where half of that is below −ln τ. Clipping to grey
    levels, the choice among images on the way, and the solver's steps are left out.

    spacing: such distances D, units of [-1, 1].
    """
    if isinstance(variant, EmpiricalBayes):
        half = torch.tensor(dimension / 2, dtype=torch.float64)
        return float(torch.special.gammainc(half, torch.tensor(max(0.0, -variant.log_tau), dtype=torch.float64)))
    c = variant.c if isinstance(variant, Tikhonov) else variant.h**2
    return float((spacing**2 > 8 * c * dimension).mean())


def chosen_variants(kind: str, spacing: np.ndarray, dimension: int) -> list[Regularization]:
    """Nine strengths of a kind, densest where `expected_ratio` sees half of the copies vanish: h from 1/8 to 8 times
    that, c = h²; ln τ within six deviations (√(d/2)) of the mean −d/2 of half a χ² of d degrees of freedom."""
    if kind not in KINDS:
        raise InputError(f"sweep: {kind!r} is none of {', '.join(KINDS)}")
    if kind == "bayes":
        half, deviation = dimension / 2, math.sqrt(dimension / 2)
        return [EmpiricalBayes(round(-half + steps * deviation, 1)) for steps in (-6, -4, -2, -1, 0, 1, 2, 4, 6)]
    middle = float(np.median(spacing)) / math.sqrt(8 * dimension)
    if middle == 0:
        raise InputError(f"sweep: half of the training images have duplicates; give the strengths, as in {kind}:0.1,1")
    bandwidths = [middle * 2.0**step for step in (-3, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 3)]
    rounded = [float(f"{value**2 if kind == 'tikhonov' else value:.2g}") for value in bandwidths]
    return [KINDS[kind](value) for value in rounded]


def parse_sweep(text: str) -> list[Regularization | str]:
    """The variants that a text lists.

    Args:
        text: "tikhonov:0.001,0.01", "bayes:exp(-40),exp(-30)" or "smooth:0.1"; a kind alone ("tikhonov") stands for
            strengths that `sweep` chooses.

    Raises:
        InputError: Anything else.

    Example:
        >>> parse_sweep("smooth:0.1,0.2")
        [Smoothed(h=0.1), Smoothed(h=0.2)]
    """
    kind, colon, values = text.partition(":")
    if kind not in KINDS:
        raise InputError(f"{text!r} is no sweep: give tikhonov, bayes or smooth, or with strengths: tikhonov:0.001,0.1")
    return [parse_regularization(f"{kind}:{value.strip()}") for value in values.split(",")] if colon else [kind]
