"""`compare`: how close a trained network is to the optimum of its training set, noise level by noise level."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch

from diffmem.data import ImageSet, load_images
from diffmem.devices import pick_device
from diffmem.errors import InputError
from diffmem.evaluation import checked_seeds, evaluate, format_seeds, sample_detector
from diffmem.html_report import percent
from diffmem.memorization import CopyRate
from diffmem.models import Denoiser, WrappedDenoiser, as_denoiser, evaluating, load
from diffmem.optimum import OptimalDenoiser
from diffmem.precision import float32_products
from diffmem.progress import Progress, silent
from diffmem.sampling import SamplerConfig, SeededGenerators, to_uint8
from diffmem.studies.comparison.bootstrap import interval, resampled
from diffmem.training import RunFolder

if TYPE_CHECKING:
    from diffmem.data import ImageSource

LEVELS = 24
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # the range of EDM's sampler
SHOWN_LEVELS = (0.05, 0.15, 0.4, 1.0, 2.5, 6.0)
SHOWN = 2  # images of a set that are shown
LEAST_REFERENCE = 16  # unseen images below which no second optimum is made of them
MEMORIZED = 1 - 1 / 9  # memorization score from which a model has memorized its training set
NOTHING = 1e-4  # share of σ², or of the spread, below which the optimum's error is not a measure of anything


@dataclass(frozen=True, eq=False)
class Gaps:
    """Two denoisers on noisy versions x = y + σ·n of one set of images y, the same x for both.

    Attributes:
        gap: ‖D_model − D_opt‖², float64 [n, S], per noisy image and noise level, squared and per pixel, in the units of
            [-1, 1]; likewise the others.
        model_error: ‖D_model − y‖².
        optimum_error: ‖D_opt − y‖².
        reference: ‖D_ref − D_opt‖² for the optimum D_ref of unseen images, or None.
    """

    gap: np.ndarray
    model_error: np.ndarray
    optimum_error: np.ndarray
    reference: np.ndarray | None


class Example(NamedTuple):
    """What was made of one image: uint8 [C, H, W] the image, and uint8 [levels, C, H, W] its noisy versions and what
    the network and the optimum see in them."""

    kind: str
    name: str
    image: np.ndarray
    noisy: np.ndarray
    model: np.ndarray
    optimum: np.ndarray


class Curve(NamedTuple):
    """A quantity along the noise levels, with 95 % intervals; NaN where it is not defined.

    Attributes:
        value: float64 [S].
        low: float64 [S], the interval's lower ends.
        high: float64 [S], its upper ends.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


class NoiseRange(NamedTuple):
    """Noise levels from `low` to `high`.

    Attributes:
        low: The lower end; None where the range reaches that end of the levels tried.
        high: The upper end, likewise.
        low_interval: A 95 % interval of the lower end; None where some resampled curves have no such end.
        high_interval: Likewise of the upper end.
    """

    low: float | None
    high: float | None
    low_interval: tuple[float, float] | None
    high_interval: tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """How close a network is to its training set's optimum.

    With E the model's mean squared denoising error on training images, E′ that on unseen ones and E_opt the optimum's
    on training images: E = E_opt + gap in expectation over all training images, since D_opt is a conditional mean. So
    the gap on training images is the part of the training loss that training could still remove, and

    - memorization_score(σ) = 1 − E / E′; 0: training images are denoised like any others; 1: learned by heart,
    - optimal_score(σ) = 1 − E_opt / E′, what it would be if the model denoised training images as the optimum does,
    - normalized_score(σ) = memorization_score / optimal_score = 1 − gap / (E′ − E_opt).

    Toward high σ the optimal score falls to 0: every denoiser tends to a mean image, and there is nothing to memorize.
    The model **has memorized its training set** at the noise levels where its score is at least 8/9: where its root
    mean square error on training images is at most a third of that on unseen ones, the factor by which the memorization
    rule asks a copy to be nearer than anything else. Sampling comes down from high σ: σ* is the upper end of that
    range. The score rises before there are copies: a model that denoises training images with half the squared error of
    others may not yet copy one of them. Comparing errors on seen and unseen images by σ follows Kadkhodaie et al.
    (arXiv 2310.02557).

    Intervals: 95 %, percentiles of 1,000 bootstrap samples of the noisy images. They cover a little less than that, and
    much less at levels where a few images make most of a mean (see benchmarks/results/optimum). That of σ* knows
    nothing of the error of interpolating between levels: a few percent of σ* with 24 levels.

    Attributes:
        checkpoint: Where the network came from.
        model: What it is, in words.
        training: The training set.
        levels: The S noise levels, ascending.
        gaps: By "training", "unseen" (with a holdout) and "generated".
        copies: How many of the generated images are copies by the rule.
        reference_images: Number of images of the second optimum; 0: none.
        examples: Pictures.
        example_levels: Their noise levels.
        settings: How it was made, in JSON types.
        notes: What to know about that.
    """

    checkpoint: str
    model: str
    training: ImageSet
    levels: np.ndarray
    gaps: dict[str, Gaps]
    copies: int
    reference_images: int
    examples: tuple[Example, ...]
    example_levels: tuple[float, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()

    def gap(self, kind: str) -> Curve:
        """The mean gap on "training", "unseen" or "generated" images."""
        return self._mean(kind, self.gaps[kind].gap)

    def relative_gap(self, kind: str) -> Curve:
        """The gap over the optimum's own error, E‖D_model − D_opt‖² / E‖D_opt − y‖². On unseen images, at low σ, 0 says
        that they are drawn to training images and 1 that they are kept as they are. NaN where that error is nothing, as
        on training images at low σ."""
        gaps, draws = self.gaps[kind], self._draws(kind)
        error = gaps.optimum_error.mean(axis=0)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            curve = _curve(gaps.gap.mean(axis=0) / error, (draws @ gaps.gap) / (draws @ gaps.optimum_error))
        return Curve(
            *(np.where(error > NOTHING * np.minimum(self.levels**2, self.spread), values, np.nan) for values in curve)
        )

    def error(self, kind: str, of: str = "model") -> Curve:
        """The mean squared denoising error of the "model" or the "optimum"."""
        gaps = self.gaps[kind]
        return self._mean(kind, gaps.model_error if of == "model" else gaps.optimum_error)

    def reference(self, kind: str) -> Curve | None:
        """The mean gap that the optimum of unseen images has: a model that learned another sample by heart."""
        values = self.gaps[kind].reference
        return None if values is None else self._mean(kind, values)

    @cached_property
    def memorization_score(self) -> Curve | None:
        """1 − E/E′; None without unseen images."""
        return None if "unseen" not in self.gaps else self._ratio("model_error")

    @cached_property
    def optimal_score(self) -> Curve | None:
        """1 − E_opt/E′; None without unseen images."""
        return None if "unseen" not in self.gaps else self._ratio("optimum_error")

    @cached_property
    def normalized_score(self) -> Curve | None:
        """memorization_score/optimal_score; NaN where the interval of the latter is not above 0."""
        if self.memorization_score is None:
            return None
        training, unseen = (self.gaps[kind] for kind in ("training", "unseen"))
        drawn = [self._draws("training") @ training.model_error, self._draws("training") @ training.optimum_error]
        errors = [training.model_error.mean(axis=0), training.optimum_error.mean(axis=0)]
        others, other = self._draws("unseen") @ unseen.model_error, unseen.model_error.mean(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            curve = _curve((other - errors[0]) / (other - errors[1]), (others - drawn[0]) / (others - drawn[1]))
        optimal = self.optimal_score
        assert optimal is not None  # there are unseen images
        return Curve(*(np.where(optimal.low > 0, values, np.nan) for values in curve))

    @cached_property
    def memorized_range(self) -> NoiseRange | None:
        """The noise levels at which the model has memorized its training set: those around the highest memorization
        score at which it is at least 8/9, interpolated along ln σ. None where there are none, or no unseen images."""
        if self.memorization_score is None or (found := _range(self.levels, self.memorization_score.value)) is None:
            return None
        ranges = [_range(self.levels, values) for values in self._resampled_ratio("model_error")]
        ends: list[Any] = []
        for end in (0, 1):
            values = [None if one is None else one[end] for one in ranges]
            ends.append(None if None in values else tuple(map(float, interval(np.array(values)))))
        return NoiseRange(*found, *ends)

    @property
    def sigma_star(self) -> float | None:
        """The upper end of `memorized_range`."""
        return None if self.memorized_range is None else self.memorized_range.high

    @property
    def highest_possible(self) -> float | None:
        """What σ* would be if the model denoised training images as the optimum does; None where it reaches an end of
        the levels or is nowhere."""
        found = None if self.optimal_score is None else _range(self.levels, self.optimal_score.value)
        return None if found is None else found[1]

    @cached_property
    def spread(self) -> float:
        """Mean squared deviation of the training images from their mean, per pixel: the optimum's error as σ grows."""
        images, total, squares = self.training.images, 0.0, 0.0
        for start in range(0, len(images), 4096):
            block = images[start : start + 4096].astype(np.float64) / 127.5 - 1
            total, squares = total + block.sum(axis=0), squares + np.square(block).sum(axis=0)
        return float((squares / len(images) - np.square(total / len(images))).mean())

    def verdict(self) -> str:
        """What the curve says, in a sentence for people."""
        score = self.memorization_score
        if score is None:
            return (
                "Whether the model has memorized its training set cannot be told without unseen images (a holdout set)."
            )
        peak = int(score.value.argmax())
        highest = f"its memorization score is highest at σ = {self.levels[peak]:.3g}: {percent(score.value[peak])} "
        highest += f"({percent(score.low[peak])} to {percent(score.high[peak])})"
        if self.memorized_range is None:
            return f"At no noise level has the model memorized its training set: {highest}."
        low, high = self.memorized_range.low, self.memorized_range.high
        upper = f"the highest noise level tested, {self.levels[-1]:.3g}" if high is None else f"σ* = {high:.3g}"
        if self.memorized_range.high_interval is not None:
            upper += " ({:.3g} to {:.3g})".format(*self.memorized_range.high_interval)
        lower = "" if low is None else f"from σ = {low:.3g} "
        most = "" if self.highest_possible is None else f" (the optimum: {self.highest_possible:.3g})"
        return (
            f"The model has memorized its training set at noise levels {lower}up to {upper}{most}: its rms error on "
            f"training images is at most a third of that on unseen ones; {highest}."
        )

    @property
    def rate(self) -> CopyRate:
        """How many of the generated images are copies."""
        return CopyRate(self.copies, self.generated_images)

    @property
    def generated_images(self) -> int:
        return len(self.gaps["generated"].gap)

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain JSON types, without the images; NaN as None."""
        found = self.memorized_range
        return {
            "checkpoint": self.checkpoint,
            "model": self.model,
            "training": {"source": self.training.source, "images": len(self.training), "spread": self.spread},
            "verdict": self.verdict(),
            "levels": self.levels.tolist(),
            "sets": {
                kind: {
                    "images": len(gaps.gap),
                    "gap": _to_json(self.gap(kind)),
                    "relative_gap": _to_json(self.relative_gap(kind)),
                    "model_error": _to_json(self.error(kind)),
                    "optimum_error": _to_json(self.error(kind, "optimum")),
                    "reference_gap": _to_json(self.reference(kind)),
                }
                for kind, gaps in self.gaps.items()
            },
            "memorization_score": _to_json(self.memorization_score),
            "optimal_score": _to_json(self.optimal_score),
            "normalized_score": _to_json(self.normalized_score),
            "memorized_range": None if found is None else found._asdict(),
            "sigma_star": self.sigma_star,
            "highest_possible": self.highest_possible,
            "r_mem": self.rate.to_dict(),
            "reference_images": self.reference_images,
            "settings": self.settings,
            "notes": list(self.notes),
        }

    def save(self, folder: str | Path) -> Path:
        """Writes `compare.html` (one self-contained page), `.svg`, `.csv` and `.json`; returns the page's path."""
        from diffmem.studies.comparison.gaps_report import write_page

        return write_page(self, Path(folder))

    def _draws(self, kind: str) -> np.ndarray:
        return resampled(len(self.gaps[kind].gap), kind)

    def _mean(self, kind: str, values: np.ndarray) -> Curve:
        return _curve(values.mean(axis=0), self._draws(kind) @ values)

    def _resampled_ratio(self, name: str) -> np.ndarray:
        seen = self._draws("training") @ getattr(self.gaps["training"], name)
        return 1 - seen / (self._draws("unseen") @ self.gaps["unseen"].model_error)

    def _ratio(self, name: str) -> Curve:
        value = 1 - getattr(self.gaps["training"], name).mean(axis=0) / self.gaps["unseen"].model_error.mean(axis=0)
        return _curve(value, self._resampled_ratio(name))


@float32_products("ieee")  # gaps are measured of the network as the protocol samples it
def compare(
    checkpoint: str | Path | torch.nn.Module,
    training: ImageSource,
    *,
    holdout: ImageSource | None = None,
    images: int = 256,
    seeds: Sequence[int] | None = None,
    levels: int | Sequence[float] = LEVELS,
    seed: int = 0,
    sampler: SamplerConfig = SamplerConfig(),  # noqa: B008 (frozen)
    tolerance: float = 1e-5,
    device: str = "auto",
    progress: Progress = silent,
) -> Comparison:
    """The squared gap between a network and the optimum of its training set, by noise level, on training, unseen and
    generated images, and the noise levels at which the network has memorized it (see `Comparison`).

    Args:
        checkpoint: A checkpoint folder or EDM snapshot; the folder of a run, for its last snapshot; or a denoiser.
            Where it lies in a run of `diffmem train`, `training` must be that run's set. A network with classes is
            compared with the optimum of the class.
        training: uint8 images, with class indices where the network has classes.
        holdout: Real images that the network has not seen, likewise; those that are training images too are left out.
        images: How many noisy training and unseen images, at most: images drawn at random, one noisy version of each;
            all training images several times, as often as goes into this, where they are fewer.
        seeds: Seeds of the generated images (default: 0 … images − 1), which `sampler` says how to sample.
        levels: Noise levels, or how many, spaced evenly along ln σ between 0.002 and 80 or the network's own bounds.
        seed: Seed of the choice of images and of the noise. Each image has noise of its own, the same at all levels and
            for both denoisers; results depend on the batch size (`sampler.batch`) by rounding only.
        sampler: The sampler and its settings.
        tolerance: The optimum's relative error.
        device: "cpu", "cuda" or "auto".
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: These do not fit together.
    """
    if images < 2:
        raise InputError(f"images is {images}, but must be at least 2")
    denoiser, name, run = _network(checkpoint, device)
    place = next(denoiser.parameters()).device
    trained_on = load_images(training, progress=progress)
    _check_training(denoiser, trained_on)
    notes = []
    if run is not None:
        run.training_images(trained_on)  # raises where they are not the run's
        if run.config.xflip:
            trained_on = _with_mirrored(trained_on)
            notes.append("the run trained on mirrored images too, so the optimum includes them")
    elif isinstance(checkpoint, (str, Path)):
        notes.append(
            f"{name} does not record what it was trained on, so whether it was {trained_on.source} is not checked"
        )
    sigmas = _levels(denoiser, levels)
    seeds = checked_seeds(range(images) if seeds is None else seeds)
    chance = np.random.default_rng(seed)
    sets = {"training": _drawn(trained_on, images, chance)}
    reference = None
    if holdout is not None:
        unseen = _unseen(denoiser, load_images(holdout, progress=progress), trained_on, notes)
        order = chance.permutation(len(unseen))
        # A second optimum needs images that it is not asked about.
        asked = min(images, max(2, len(unseen) // 2))
        sets["unseen"] = unseen.select(np.sort(order[:asked]))
        rest = unseen.select(np.sort(order[asked : asked + len(trained_on)]))
        reference = _reference(denoiser, rest, sets, tolerance, device, notes, progress)
    labels = None if denoiser.label_dim else False
    optimum = OptimalDenoiser(trained_on, labels=labels, tolerance=tolerance, device=str(place), progress=progress)
    detector = sample_detector(trained_on, trained_on.image_shape, place, progress=progress)
    generated = evaluate(denoiser, seeds, sampler, detector, progress=progress)
    assert generated is not None  # on one rank
    names = [f"seed {one}" for one in seeds]
    sets["generated"] = ImageSet(generated.images, names, generated.labels, "generated images")
    pairs = _Pairs(denoiser, optimum, reference, sigmas, sampler.batch, seed)
    total, done = sum(len(each) for each in sets.values()), 0
    gaps = {}
    for kind, each in sets.items():
        parts = []
        for part in pairs.gaps(kind, each):
            parts.append(part)
            done += len(part.gap)
            progress(f"denoising: {kind} images", done, total)
        gaps[kind] = _joined(parts)
    shown = [denoiser.round_sigma(level) for level in SHOWN_LEVELS if sigmas[0] <= level <= sigmas[-1]]
    pairs = replace(pairs, levels=np.array(shown))
    examples = [one for kind, each in sets.items() for one in pairs.examples(kind, each.select(slice(SHOWN)))]
    described = {
        "images": {kind: len(each) for kind, each in sets.items()},
        "seeds": format_seeds(seeds),
        "seed": seed,
        "tolerance": tolerance,
        **({} if run is None else {"EMA weights": run.averaging()}),
        "sampling": sampler.identity,
        "conditional": bool(denoiser.label_dim),
    }
    return Comparison(
        name, denoiser.summary(), trained_on, sigmas, gaps, generated.count, 0 if reference is None else len(rest),
        tuple(examples), tuple(shown), described, tuple(notes),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Pairs:
    """The denoisers to compare, and where: at `levels` [S] on `batch` images at a time, with noise from `seed`."""

    model: Any  # with the interface of `Denoiser`
    optimum: OptimalDenoiser
    reference: OptimalDenoiser | None
    levels: np.ndarray
    batch: int
    seed: int

    @torch.inference_mode()
    def gaps(self, kind: str, images: ImageSet) -> Iterator[Gaps]:
        """Batch by batch."""
        for start in range(0, len(images), self.batch):
            rows = slice(start, start + self.batch)
            y, noise, labels = self._inputs(kind, images, rows)
            columns: list[tuple[torch.Tensor, ...]] = []
            for sigma in self.levels.tolist():
                x = y + sigma * noise
                with evaluating(self.model):
                    model = self.model(x, sigma, labels).double()
                optimum = self.optimum(x, sigma, labels)
                if not bool(model.isfinite().all()):
                    raise InputError(f"the network's output at σ = {sigma:g} is not finite: is the checkpoint damaged?")
                pairs = [(model, optimum), (model, y), (optimum, y)]
                if self.reference is not None:
                    pairs.append((self.reference(x, sigma, labels), optimum))
                columns.append(tuple((a - b).square().flatten(1).mean(dim=1).cpu() for a, b in pairs))
            stacked = [torch.stack(column, dim=1).numpy() for column in zip(*columns, strict=True)]
            yield Gaps(*stacked, *([None] if self.reference is None else []))

    @torch.inference_mode()
    def examples(self, kind: str, images: ImageSet) -> Iterator[Example]:
        y, noise, labels = self._inputs(kind, images, slice(None))
        stacks: list[tuple[torch.Tensor, ...]] = []
        for sigma in self.levels.tolist():
            x = y + sigma * noise
            with evaluating(self.model):
                stacks.append((x, self.model(x, sigma, labels), self.optimum(x, sigma, labels)))
        pictures = [to_uint8(torch.stack(stack, dim=1)).cpu().numpy() for stack in zip(*stacks, strict=True)]
        for row in range(len(images)):
            yield Example(kind, images.name(row), images.images[row], *(each[row] for each in pictures))

    def _inputs(self, kind: str, images: ImageSet, rows: slice) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Images and unit noise, float64, and labels, where the network has classes, on the device. Noise is drawn on
        the CPU: it is then the same everywhere."""
        place = next(self.model.parameters()).device
        numbers = range(len(images))[rows]
        digests = (hashlib.sha256(f"{self.seed} {kind} {number}".encode()).digest() for number in numbers)
        noise = SeededGenerators([int.from_bytes(digest[:4], "little") for digest in digests]).randn(
            images.image_shape, torch.float64
        )
        y = torch.from_numpy(np.ascontiguousarray(images.images[rows])).double() / 127.5 - 1
        labels = (
            torch.from_numpy(np.ascontiguousarray(cast(np.ndarray, images.labels)[rows]))
            if self.model.label_dim
            else None
        )
        return y.to(place), noise.to(place), None if labels is None else labels.to(place)


def _network(
    checkpoint: str | Path | torch.nn.Module, device: str
) -> tuple[Denoiser | WrappedDenoiser, str, RunFolder | None]:
    """The denoiser, its name, and the run that it comes from, where that is known."""
    if not isinstance(checkpoint, (str, Path)):
        denoiser = as_denoiser(checkpoint)
        return denoiser, denoiser.summary(), None
    path = Path(checkpoint)
    run = RunFolder.around(path)
    if run is not None and run.path == path:
        path = run.newest()
    return load(path, pick_device(device)), str(path), run


def _check_training(denoiser: Any, training: ImageSet) -> None:
    _check_images(denoiser, training, "training")
    if len(training) < 2:
        raise InputError(f"{training.source}: at least 2 training images are needed")
    missing = np.setdiff1d(np.arange(denoiser.label_dim), cast(Any, training.labels) if denoiser.label_dim else [])
    if len(missing):
        raise InputError(
            f"{training.source}: no training image of class {missing[0]}, which the network knows: there is no optimum"
        )


def _check_images(denoiser: Any, images: ImageSet, what: str) -> None:
    """Raises InputError where the network cannot have seen such images."""
    wanted = (denoiser.channels, denoiser.resolution, denoiser.resolution)
    if images.image_shape != wanted:
        theirs, ours = ("x".join(map(str, shape)) for shape in (images.image_shape, wanted))
        color = "gray" if denoiser.channels == 1 else "rgb"
        raise InputError(
            f"{images.source}: {what} images are {theirs}, but the network takes {ours}: bring them to that form as "
            f"for its training, with resize={denoiser.resolution} and color='{color}'"
        )
    if images.images.dtype != np.uint8:
        raise InputError(f"{images.source}: {what} images are {images.images.dtype}, but must be uint8")
    if not denoiser.label_dim:
        return
    labels = images.labels
    if labels is None or labels.ndim != 1 or not 0 <= labels.min() <= labels.max() < denoiser.label_dim:
        raise InputError(
            f"{images.source}: the network has {denoiser.label_dim} classes: {what} images need class indices 0 … "
            f"{denoiser.label_dim - 1}"
        )


def _with_mirrored(images: ImageSet) -> ImageSet:
    pixels = np.concatenate([images.images, images.images[..., ::-1]])
    labels = None if images.labels is None else np.concatenate([images.labels, images.labels])
    names = [*(images.name(i) for i in range(len(images))), *(f"{images.name(i)} mirrored" for i in range(len(images)))]
    return replace(images, images=pixels, labels=labels, names=names)


def _levels(denoiser: Any, levels: int | Sequence[float]) -> np.ndarray:
    """Ascending, each one that the network knows, none twice."""
    low, high = denoiser.sigma_min, denoiser.sigma_max
    if isinstance(levels, int):
        if levels < 2:
            raise InputError(f"levels is {levels}, but must be at least 2")
        asked = np.geomspace(max(low, SIGMA_MIN), min(high, SIGMA_MAX), levels)
    else:
        asked = np.array(levels, dtype=np.float64)
        if asked.ndim != 1 or len(asked) < 2 or not (np.isfinite(asked) & (asked > 0)).all():
            raise InputError("levels: at least two positive noise levels are needed")
    outside = asked[(asked < low * (1 - 1e-9)) | (asked > high * (1 + 1e-9))]
    if len(outside):
        raise InputError(f"levels: σ = {outside[0]:g} is outside the network's range, {low:g} to {high:g}")
    return np.unique([denoiser.round_sigma(float(level)) for level in asked])


def _drawn(images: ImageSet, count: int, chance: np.random.Generator) -> ImageSet:
    """`count` of the images at random; fewer images all of them, as often as goes into `count`, for other noise."""
    if len(images) <= count:
        return images.select(np.tile(np.arange(len(images)), count // len(images)))
    return images.select(np.sort(chance.choice(len(images), count, replace=False)))


def _unseen(denoiser: Any, holdout: ImageSet, training: ImageSet, notes: list[str]) -> ImageSet:
    """The images of the holdout that are not training images."""
    _check_images(denoiser, holdout, "unseen")
    seen = {_digest(image) for image in training.images}
    fresh = np.array([_digest(image) not in seen for image in holdout.images])
    left = int(fresh.sum())
    if left < len(holdout):
        notes.append(
            f"{len(holdout) - left:,} of {len(holdout):,} images of {holdout.source} are training images and were "
            "excluded"
        )
    if left < 2:
        raise InputError(f"{holdout.source}: {left} images that are not training images; at least 2 are needed")
    return holdout.select(np.flatnonzero(fresh))


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()


def _reference(
    denoiser: Any,
    rest: ImageSet,
    sets: dict[str, ImageSet],
    tolerance: float,
    device: str,
    notes: list[str],
    progress: Progress,
) -> OptimalDenoiser | None:
    """The optimum of unseen images that are not asked about, where there are enough, of every class."""
    if len(rest) < LEAST_REFERENCE or (
        denoiser.label_dim and len(np.unique(cast(Any, rest.labels))) < denoiser.label_dim
    ):
        notes.append("there are too few unseen images for an optimum of their own")
        return None
    labels = None if denoiser.label_dim else False
    place = next(denoiser.parameters()).device
    return OptimalDenoiser(rest, labels=labels, tolerance=tolerance, device=str(place), progress=progress)


def _joined(parts: list[Gaps]) -> Gaps:
    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    reference = None if parts[0].reference is None else column("reference")
    return Gaps(column("gap"), column("model_error"), column("optimum_error"), reference)


def _curve(value: np.ndarray, draws: np.ndarray) -> Curve:
    return Curve(value, *interval(draws))


def _range(levels: np.ndarray, score: np.ndarray) -> tuple[float | None, float | None] | None:
    """Where the score is at least 8/9, around its highest value; an end is None where that is the last level."""
    peak = int(score.argmax())
    if score[peak] < MEMORIZED:
        return None
    ends: list[float | None] = []
    for step, last in ((-1, 0), (1, len(levels) - 1)):
        at = peak
        while at != last and score[at + step] >= MEMORIZED:
            at += step
        if at == last:
            ends.append(None)
            continue
        share = (score[at] - MEMORIZED) / (score[at] - score[at + step])
        ends.append(math.exp(math.log(levels[at]) + share * math.log(levels[at + step] / levels[at])))
    return ends[0], ends[1]


def _to_json(curve: Curve | None) -> dict[str, list[float | None]] | None:
    if curve is None:
        return None
    return {
        name: [float(value) if math.isfinite(value) else None for value in values]
        for name, values in curve._asdict().items()
    }
