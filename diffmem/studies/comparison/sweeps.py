"""`sweep`: how the copies vanish as the optimum of a training set is regularized, R_mem against c, τ or h."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from diffmem.atomic_io import output_lock
from diffmem.data import ImageSet, load_images
from diffmem.errors import InputError
from diffmem.evaluation import (
    Evaluation,
    SeedStore,
    checked_seeds,
    evaluate,
    format_seeds,
    identity_of,
    sample_detector,
)
from diffmem.memorization import CopyDetector, CopyRate, ReportsRate
from diffmem.optimum import EmpiricalBayes, OptimalDenoiser, Regularization, Smoothed, Tikhonov, parse_regularization
from diffmem.progress import Progress, silent
from diffmem.sampling import SamplerConfig

if TYPE_CHECKING:
    from diffmem.data import ImageSource

KINDS = {"tikhonov": Tikhonov, "bayes": EmpiricalBayes, "smooth": Smoothed}
IMAGES = 8  # images of a point that are kept
NEIGHBORS = 2000  # training images whose distance to their nearest neighbor is measured
POINTS = "points"  # in the sweep's folder


@dataclass(frozen=True, eq=False)
class SweepPoint(ReportsRate):
    """R_mem of one regularized optimum.

    Attributes:
        variant: The regularization.
        evaluation: Evaluation of its images; the first ones are kept.
    """

    variant: Regularization
    evaluation: Evaluation

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
        return self.evaluation.rate

    @property
    def mean_distance(self) -> float:
        """Mean distance to the nearest training image, root mean square in gray levels."""
        return float(self.evaluation.distances.mean())


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
                    "mean_distance": point.mean_distance,
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
    sampler: SamplerConfig = SamplerConfig(),  # noqa: B008 (frozen)
    device: str = "auto",
    progress: Progress = silent,
) -> Sweep:
    """R_mem of the optimum of `training` under each of `variants`, on the images of `seeds`.

    Args:
        training: As for `OptimalDenoiser`.
        variants: Regularizations, or names of kinds ("tikhonov", "bayes", "smooth"), which stand for strengths between
            all copies and none.
        folder: What is known about the images is kept in `folder`/points as they come: a sweep that ended early resumes
            from there, and more seeds or strengths cost only those.
        seeds: Seeds of the images.
        labels: As for `OptimalDenoiser`.
        tolerance: As for `OptimalDenoiser`.
        sampler: The sampler and its settings.
        device: As for `OptimalDenoiser`.
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: Variants that make no sense (found before anything is sampled), or damaged files in `folder`.
    """
    seeds = checked_seeds(seeds)
    images = load_images(training, progress=progress)
    denoiser = OptimalDenoiser(images, labels=labels, tolerance=tolerance, device=device, progress=progress)
    sampler.plan(denoiser)  # raises where its settings do not fit
    place = next(denoiser.parameters()).device
    detector = sample_detector(images, images.image_shape, place, progress=progress)
    spacing = nearest_neighbors(detector)
    chosen: list[Regularization] = []
    for variant in variants:
        chosen += chosen_variants(variant, spacing, images.dimension) if isinstance(variant, str) else [variant]
    if not chosen:
        raise InputError("sweep: no regularization is given")
    order = list(KINDS.values())
    chosen = sorted(set(chosen), key=lambda variant: (order.index(type(variant)), strength(variant)))
    sampler = replace(sampler, compile="off")
    points: list[SweepPoint] = []
    with output_lock(folder):
        for variant in chosen:
            denoiser.regularization = variant
            identity = identity_of(denoiser.fingerprint, sampler, detector, place)
            store = SeedStore.within(Path(folder) / POINTS, _file_name(variant), identity)
            stage = f"sampling: {variant}, {len(points) + 1} of {len(chosen)}"
            found = evaluate(
                denoiser, seeds, sampler, detector, store, images=IMAGES, stage=stage, progress=progress
            )  # fmt: skip
            assert found is not None  # on one rank
            points.append(SweepPoint(variant, found))
    about = {"seeds": format_seeds(seeds), "tolerance": tolerance, "label_dim": denoiser.label_dim}
    return Sweep(images, tuple(points), spacing, {**sampler.identity, **about})


def _file_name(variant: Regularization) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in str(variant))


def strength(variant: Regularization) -> float:
    """c, ln τ or h."""
    if isinstance(variant, Tikhonov):
        return variant.c
    return variant.log_tau if isinstance(variant, EmpiricalBayes) else variant.h


def with_strength(kind: str, value: float) -> Regularization:
    """The variant of a kind with c, ln τ or h."""
    return cast(Regularization, KINDS[kind](value))


def _axis(point: SweepPoint) -> float:
    """Where a point lies along its plot's axis: ln c, ln τ or ln h."""
    if point.kind == "bayes":
        return point.strength
    return math.log(point.strength) if point.strength > 0 else -math.inf


def nearest_neighbors(detector: CopyDetector) -> np.ndarray:
    """Distances (units of [-1, 1]) from training images, at most `NEIGHBORS` of them, to their nearest neighbors."""
    training = cast(ImageSet, detector.training).images
    rows = np.unique(np.linspace(0, len(training) - 1, min(len(training), NEIGHBORS)).astype(int))
    assert detector.index is not None  # of pixels there is one
    squared = detector.index.query(np.ascontiguousarray(training[rows]), 2).squared_distances[:, 1].astype(np.float64)
    return np.sqrt(squared) / (127.5 if training.dtype == np.uint8 else 1)


def expected_ratio(variant: Regularization, spacing: np.ndarray, dimension: int) -> float:
    """The share of copies that a rough calculation expects of a regularized optimum.

    On its way to training image y the sampler's state is x = y + r, and r shrinks by dr/dσ = r·σ/(σ² + c) for Tikhonov
    (c = h² for smoothed data): the √(σ² + c) that solves this leaves √c of white noise per pixel at σ = 0. With D the
    distance from y to its nearest neighbor, d1² = c·d and d2² ≈ c·d + D² in d dimensions: a copy by d1 < d2/3 where
    D² > 8·c·d. The empirical Bayes denoiser follows the exact one while Σ p_i ≈ exp(−‖r/σ‖²/2) is above τ, and r/σ
    keeps the latent's length, χ² with d degrees of freedom: a copy where half of that is below −ln τ. Clipping to gray
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
    return [with_strength(kind, value) for value in rounded]


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
        raise InputError(
            f"{text!r} is not a sweep: give tikhonov, bayes or smooth, or with strengths: tikhonov:0.001,0.1"
        )
    return [parse_regularization(f"{kind}:{value.strip()}") for value in values.split(",")] if colon else [kind]
