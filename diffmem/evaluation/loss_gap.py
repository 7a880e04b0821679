"""The gap between the denoising errors on unseen and on training images, by noise level: it opens before copies appear.

A denoiser that has not memorized denoises unseen images as well as those that it was trained on. At a noise level σ the
error of an image y is ‖D(y + σn; σ) − y‖² per pixel, the mean over a few n, and the gap is the mean error on unseen
images minus that on training images. The weight λ(σ) of the training loss is one number per level: it changes neither
the relative gap, 1 − training / unseen, nor the test. (The relative gap is the memorization score of
`diffmem.studies.comparison.compare`, measured more cheaply.) Both sets see the same noise, and every snapshot of a run
sees it again.

Images differ in how hard they are, so that two sets have different errors without any memorization, and small training
sets more so. Without memorization, though, a training image is an image like any other: the two sets' errors are
exchangeable, and the one-sided rank test of Mann and Whitney, which the gap is held against, needs no more than that
(a t-test would: a small training set of easy images has a small variance too, and seems certain). `first_warning` looks
at all levels and snapshots with an error that holds for all of them together (Bonferroni).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from diffmem.data import ImageSet
from diffmem.errors import InputError
from diffmem.models import evaluating
from diffmem.precision import float32_products

LEVELS = tuple(np.geomspace(0.05, 5.0, 8).tolist())  # σ, in the units of images in [-1, 1]
IMAGES = 128  # of each set at most
LEAST_DRAWS, PAIRS = 2, 256  # noisy versions of an image, and of a set together, at least
ALPHA = 0.05
_BATCH = 256
_SEED = 20_505  # of the noise


class LevelGap(NamedTuple):
    """The gap at one noise level.

    Attributes:
        sigma: σ.
        training: Mean squared error per pixel on training images.
        unseen: The same on unseen images.
        error: Standard error of their difference, of the choice of images.
        p: Probability of errors on training images that rank so low, were these unseen too; one-sided.
    """

    sigma: float
    training: float
    unseen: float
    error: float
    p: float

    @property
    def gap(self) -> float:
        """unseen − training."""
        return self.unseen - self.training

    @property
    def relative(self) -> float:
        """1 − training / unseen: 0 without memorization, 1 where training images are known by heart."""
        return 1 - self.training / self.unseen if self.unseen else 0.0


@dataclass(frozen=True)
class LossGap:
    """The gap of one denoiser.

    Attributes:
        levels: At noise levels, ascending.

    Example:
        >>> gap = LossGap((LevelGap(0.5, training=0.01, unseen=0.04, error=0.002, p=1e-5),))
        >>> gap.relative, gap.p
        (0.75, 1e-05)
    """

    levels: tuple[LevelGap, ...]

    @property
    def relative(self) -> float:
        """The relative gap, averaged over the levels."""
        return sum(level.relative for level in self.levels) / len(self.levels)

    @property
    def p(self) -> float:
        """Of no gap at any level: the smallest p-value times the number of levels."""
        return min(1.0, len(self.levels) * min(level.p for level in self.levels))

    def to_json(self) -> list[list[float]]:
        """Per level sigma, training, unseen, error, p."""
        return [list(level) for level in self.levels]

    @staticmethod
    def from_json(values: Sequence[Sequence[float]]) -> LossGap:
        """The gap that `to_json` gave.

        Args:
            values: Five numbers per level.
        """
        return LossGap(tuple(LevelGap(*map(float, each)) for each in values))


class LossGapMeter:
    """Measures the gap of any number of denoisers with the same images and the same noise.

    Args:
        training: The training images, uint8; with labels where the denoiser has classes.
        unseen: Images of the same distribution that the denoiser was not trained on, likewise; those that are training
            images too are left out.
        levels: Noise levels; those outside a denoiser's range are left out.
        images: At most so many of each set, evenly spaced. Fewer images are seen with more noise.

    Raises:
        InputError: The sets differ in shape, or have fewer than two images.
    """

    def __init__(
        self, training: ImageSet, unseen: ImageSet, levels: Sequence[float] = LEVELS, images: int = IMAGES
    ) -> None:
        if training.image_shape != unseen.image_shape:
            raise InputError(
                f"{unseen.source}: unseen images are {unseen.image_shape}, the training images {training.image_shape}"
            )
        if not len(levels) or min(levels) <= 0:
            raise InputError("levels: at least one noise level above 0 is needed")
        seen = {hashlib.sha256(image.tobytes()).digest() for image in training.images}
        fresh = [row for row, image in enumerate(unseen.images) if hashlib.sha256(image.tobytes()).digest() not in seen]
        self.left_out = len(unseen) - len(fresh)
        for source, count in ((training.source, len(training)), (unseen.source, len(fresh))):
            if min(count, images) < 2:
                raise InputError(
                    f"{source}: {min(count, images)} images to compare losses on"
                    + (f" ({self.left_out:,} are training images)" if self.left_out and count == len(fresh) else "")
                    + ", but at least 2 are needed"
                )
        self.levels = sorted(levels)
        self._sets = [_spread(training, images), _spread(unseen.select(np.array(fresh)), images)]
        draws = [max(LEAST_DRAWS, -(-min(PAIRS, 2 * images) // len(each))) for each in self._sets]
        self._draws = draws
        self.unseen_images = len(self._sets[1])
        count = max(len(each) * times for each, times in zip(self._sets, draws, strict=True))
        generator = torch.Generator().manual_seed(_SEED)
        self._noise = torch.randn(count, *training.image_shape, generator=generator)

    @float32_products("ieee")
    @torch.inference_mode()
    def measure(self, denoiser: Any) -> LossGap:
        """The gap of a denoiser.

        Args:
            denoiser: With the interface of `diffmem.models.Denoiser`.

        Raises:
            InputError: It has classes and the images have none, no level lies in its range, or what it says is not
                finite.
        """
        low, high = float(denoiser.sigma_min), float(denoiser.sigma_max)
        levels = [float(denoiser.round_sigma(each)) for each in self.levels if low <= each <= high]
        if not levels:
            raise InputError(f"levels: none lies in the network's range, σ = {low:g} to {high:g}")
        with evaluating(denoiser):
            training, unseen = (
                self._errors(denoiser, each, draws, levels) for each, draws in zip(self._sets, self._draws, strict=True)
            )
        return LossGap(tuple(map(_level, levels, training, unseen)))

    def _errors(self, denoiser: Any, images: ImageSet, draws: int, levels: Sequence[float]) -> np.ndarray:
        """float64 [S, n]: the error of each image at each level, averaged over its noisy versions."""
        place = next(denoiser.parameters()).device
        rows = np.tile(np.arange(len(images)), draws)
        labels = None
        if denoiser.label_dim:
            if images.labels is None:
                raise InputError(f"{images.source}: the network has {denoiser.label_dim} classes: images need labels")
            labels = torch.from_numpy(np.ascontiguousarray(images.labels))
        found = []
        for sigma in levels:
            parts = []
            for start in range(0, len(rows), _BATCH):
                part = rows[start : start + _BATCH]
                y = torch.from_numpy(images.images[part]).to(place).float() / 127.5 - 1
                noise = self._noise[start : start + len(part)].to(place)
                label = None if labels is None else labels[torch.from_numpy(part)].to(place)
                error = (denoiser(y + sigma * noise, sigma, label) - y).double().square().flatten(1).mean(dim=1)
                parts.append(error.cpu())
            found.append(torch.cat(parts).view(draws, -1).mean(dim=0))
        errors = torch.stack(found).numpy()
        if not np.isfinite(errors).all():
            raise InputError("the network's output is not finite: is the checkpoint damaged?")
        return errors


class GapWarning(NamedTuple):
    """The first snapshot that shows a gap.

    Attributes:
        place: In the sequence.
        sigma: The noise level with the smallest p-value there.
    """

    place: int
    sigma: float


def first_warning(gaps: Iterable[LossGap], looks: int, alpha: float = ALPHA) -> GapWarning | None:
    """The first of some snapshots at which the gap is more than images differ without memorization.

    Args:
        gaps: Of the snapshots of a run, in order.
        looks: How many snapshots there may be; each is tested at alpha / looks, over all of its levels together.
        alpha: The probability that a run without memorization warns at all is at most this.
    """
    for place, gap in enumerate(gaps):
        if gap.p < alpha / looks:
            return GapWarning(place, min(gap.levels, key=lambda level: level.p).sigma)
    return None


def first_warnings(gaps: Sequence[LossGap], looks: int, alpha: float = ALPHA) -> dict[float, int | None]:
    """By noise level, the place of the first snapshot at which that level alone shows a gap.

    Args:
        gaps: Of the snapshots of a run, in order.
        looks: How many snapshots there may be.
        alpha: Each level is tested at alpha / looks.
    """
    found: dict[float, int | None] = {}
    for column in zip(*(gap.levels for gap in gaps), strict=True):
        places = [place for place, level in enumerate(column) if level.p < alpha / looks]
        found[column[0].sigma] = places[0] if places else None
    return found


def _spread(images: ImageSet, most: int) -> ImageSet:
    """At most so many of the images, evenly spaced."""
    if len(images) <= most:
        return images
    return images.select(np.linspace(0, len(images) - 1, most).astype(np.int64))


def _level(sigma: float, training: np.ndarray, unseen: np.ndarray) -> LevelGap:
    from scipy.stats import mannwhitneyu  # scikit-learn brings it

    error = sum(each.var(ddof=1) / len(each) for each in (training, unseen)) ** 0.5
    p = mannwhitneyu(training, unseen, alternative="less").pvalue
    return LevelGap(sigma, float(training.mean()), float(unseen.mean()), float(error), float(p))
