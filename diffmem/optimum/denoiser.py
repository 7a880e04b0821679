"""`OptimalDenoiser`: what a network trained without end on a finite set would compute, in closed form.

Denoising score matching over images y_1 … y_N has a unique minimizer, the posterior mean
D(x; σ) = Σ_i w_i y_i, w = softmax_i(−‖x − y_i‖² / (2σ²)): attention of x over the whole training set. Sampling with it
reproduces training images and nothing else (Gu et al., arXiv 2310.02664, section 3.1).
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn as nn

from diffmem.data import load_images
from diffmem.data.classes import class_indices
from diffmem.devices import pick_device
from diffmem.errors import InputError
from diffmem.ops.posterior_mean import OP, PosteriorRows, Request
from diffmem.ops.posterior_mean.arguments import BAD_SIGMA, BAD_X
from diffmem.optimum.regularized import Regularization, to_json
from diffmem.progress import Progress, silent
from diffmem.search.basis import principal_components, sample_rows
from diffmem.search.rows import as_rows, check_finite

if TYPE_CHECKING:
    from diffmem.data import ImageSource

MIN_DIM = 512  # values of a row below which principal components do not pay
MIN_ROWS = 4096
COMPONENTS = 5  # twelfths of the values of a row: what JPEG's chroma leaves of three channels, and a little less
COPIED_BYTES = 1 << 32  # of a set that is copied in the order of its classes; a larger one is left where it is
WEIGHT_BLOCK = 1 << 24  # values of the training rows at a time when weights are listed


class Weights(NamedTuple):
    """The training images that hold the mass of each query's weights.

    Attributes:
        indices: Per query int64 [k], the heaviest first.
        weights: Per query float64 [k].
        left_out: [B], a certified bound on the mass of all other images together, rounding included.
    """

    indices: list[torch.Tensor]
    weights: list[torch.Tensor]
    left_out: torch.Tensor


class OptimalDenoiser(nn.Module):
    """D(x; σ) of a training set, with the interface of `diffmem.models.Denoiser`: a drop-in for every sampler.

    D(x; σ) = Σ w_i y_i, w = softmax_i(−‖x − y_i‖² / (2σ²)): what a network trained without end on the set would compute
    (Gu et al., arXiv 2310.02664, section 3.1).

    Args:
        training: uint8 images, or float images in [-1, 1]; anything `diffmem.load_images` reads. A memory-mapped set
            stays on disk. Beyond the images memory is bounded by a constant and what an index of them takes (at most
            half their size); it does not grow with N times the batch.
        tolerance: Relative error against a direct evaluation in float64, ‖D − D_exact‖ / ‖D_exact‖.
        labels: None: the set's own, where it has class indices, and unconditional where it has none; True: the set's
            own, which must be class indices; False: unconditional; or int64 [N]. With labels, the sum of a query of
            class k runs over the images of class k.
        device: "cpu", "cuda" or "auto".
        regularization: A variant of `diffmem.optimum.regularized`; None: the exact optimum.
        subset: Each call uses another random subset of this many images (of each class), drawn again for each noise
            level from `seed`, so that the denoiser stays a function of (x, σ) and images do not depend on the batch
            size.
        seed: Seed of the subsets.
        impl: "reference", "native", "triton", …: which backend of the posterior mean; None: the fastest here.
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: An empty or mixed-up set, labels that do not fit, or values that are not finite.

    Example:
        >>> training = np.stack([np.zeros((1, 8, 8)), np.ones((1, 8, 8))]).astype(np.float32)
        >>> optimum = OptimalDenoiser(training)
        >>> optimum(torch.full((1, 1, 8, 8), 0.9), torch.tensor(0.1)).mean().item()  # nearly the second image
        1.0
    """

    sigma_min = 0.0
    sigma_max = math.inf
    compilable = False  # searches and sums, no graph of operations

    def __init__(
        self,
        training: ImageSource,
        *,
        tolerance: float = 1e-5,
        labels: np.ndarray | torch.Tensor | bool | None = None,
        device: str = "auto",
        regularization: Regularization | None = None,
        subset: int | None = None,
        seed: int = 0,
        impl: str | None = None,
        progress: Progress = silent,
    ):
        super().__init__()
        images = load_images(training, progress=progress)
        if not 0 < tolerance < 1:
            raise InputError(f"tolerance is {tolerance}, but must lie between 0 and 1")
        channels, height, width = images.image_shape
        if height != width:
            raise InputError(
                f"{images.source}: images are {height}x{width}; samplers make square images, so resize them"
            )
        self.images = images
        self.channels, self.resolution = channels, width
        self.image_shape = images.image_shape
        self.tolerance, self.regularization, self.subset, self.seed = tolerance, regularization, subset, seed
        self.integer = images.images.dtype == np.uint8
        rows = as_rows(images, "training images")
        check_finite(rows, "training images")
        # Rows of one class follow each other: a class is then a slice, and the whole set is one too.
        self.order: np.ndarray | None = None
        order = None
        self.starts = np.array([0, len(rows)])
        self.label_dim = 0
        found = self._class_indices(labels)
        if found is not None:
            self.label_dim = int(found.max()) + 1
            self.starts = np.concatenate([[0], np.bincount(found, minlength=self.label_dim).cumsum()])
            if bool((found[1:] < found[:-1]).any()):
                self.order = np.argsort(found, kind="stable")
                if rows.numel() * rows.itemsize <= COPIED_BYTES:
                    rows = rows[torch.from_numpy(self.order)]
                else:
                    order = torch.from_numpy(self.order)
        largest = int(np.diff(self.starts).max())
        if subset is not None and not 1 <= subset <= largest:
            raise InputError(f"subset: {subset} images cannot be drawn from {largest:,} (of the largest class)")
        place = pick_device(device)
        mean = _mean(rows)
        native = OP.select(place.type, impl, rows, mean, order).name == "native"
        basis = self._basis(rows, mean) if native else None
        length = float(self._to_images(mean).norm()) * (127.5 if self.integer else 1)
        self.rows = PosteriorRows(
            rows, mean, place, order=order, basis=basis, length=length, impl=impl, progress=progress
        )
        # The mean image, which D tends to as σ grows; as a parameter, so that samplers find the device.
        average = self._to_images(mean).float().reshape(images.image_shape)
        self.mean = nn.Parameter(average.to(place), requires_grad=False)
        self.eval()

    def _class_indices(self, labels: np.ndarray | torch.Tensor | bool | None) -> np.ndarray | None:
        if labels is False:
            return None
        own = self.images.labels
        if labels is True or (labels is None and own is not None and own.ndim == 1):
            return class_indices(self.images, "the class-conditional optimum")
        if labels is None:
            return None
        found = np.asarray(labels)
        if found.shape != (len(self.images),) or not np.issubdtype(found.dtype, np.integer) or found.min() < 0:
            raise InputError(
                f"labels: one class index (0, 1, …) per training image is needed, got {found.dtype} "
                f"{list(found.shape)} for {len(self.images):,} images; pass labels=False to ignore labels"
            )
        return found.astype(np.int64)

    def _basis(self, rows: torch.Tensor, mean: torch.Tensor) -> torch.Tensor | None:
        """Leading principal components, where they are worth their while."""
        if not self.integer or rows.shape[1] < MIN_DIM or len(rows) < MIN_ROWS:
            return None
        return principal_components(sample_rows(rows).float() - mean.float(), COMPONENTS * rows.shape[1] // 12)

    def summary(self) -> str:
        """One line for a person."""
        size = f"{self.channels}x{self.resolution}x{self.resolution}"
        classes = f"label_dim {self.label_dim}" if self.label_dim else "unconditional"
        variant = "" if self.regularization is None else f", {self.regularization}"
        subset = "" if self.subset is None else f", random subsets of {self.subset}"
        return f"optimum of {len(self.images):,} images {size} ({self.images.source}), {classes}{variant}{subset}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the training set and all that decides what is computed."""
        kind = {
            "training": self.images.fingerprint,
            "label_dim": self.label_dim,
            "starts": self.starts.tolist(),
            "order": None if self.order is None else hashlib.sha256(self.order.tobytes()).hexdigest(),
            "tolerance": self.tolerance,
            "regularization": to_json(self.regularization),
            "subset": self.subset,
            "seed": self.seed if self.subset else None,
        }
        return hashlib.sha256(json.dumps(kind, sort_keys=True).encode()).hexdigest()

    def round_sigma(self, sigma: float) -> float:
        """Every noise level is known: `sigma` itself."""
        return sigma

    def forward(self, x: torch.Tensor, sigma: torch.Tensor | float, labels: torch.Tensor | None = None) -> torch.Tensor:
        """D(x; σ): the denoised images (B, C, H, W), float64 for float64 x and float32 otherwise.

        x (B, C, H, W) noisy images, noise added to [-1, 1]; sigma one noise level, or one per image, positive; labels
        class indices (B,) int64, one-hot vectors (B, label_dim), or None, which counts as every class. Raises
        InputError where these do not fit.
        """
        self._check_shape(x)
        if labels is None and (denoised := self._quick(x, sigma)) is not None:
            return denoised
        checks = self._check(x)
        rows, levels = x.double().flatten(1), self._levels(sigma, len(x), x.device, checks)
        asked = levels if self.regularization is None else self.regularization.level(levels)
        parts = self._parts(labels, levels)
        requests = [
            Request(self._to_rows(_of(rows, chosen)), self._row_units(_of(asked, chosen)), images)
            for chosen, images in parts
        ]
        results = self.rows.means(requests, self.tolerance, checks, wide=x.dtype == torch.float64)
        mean, log_sum = torch.empty_like(rows), torch.empty_like(levels)
        for (chosen, _), result in zip(parts, results, strict=True):
            place = slice(None) if chosen is None else chosen
            # Logits have no unit: their sum is the same in both.
            mean[place], log_sum[place] = self._to_images(result.mean), result.log_sum
        if self.regularization is not None:
            mean = self.regularization.denoised(rows, mean, log_sum, levels)
        denoised = mean.reshape(x.shape)
        return denoised if x.dtype == torch.float64 else denoised.float()

    def score(self, x: torch.Tensor, sigma: torch.Tensor | float, labels: torch.Tensor | None = None) -> torch.Tensor:
        """∇ log p(x; σ) = (D(x; σ) − x) / σ², in x's dtype; arguments as for `forward`."""
        levels = self._levels(sigma, len(x), x.device, {}).reshape(-1, 1, 1, 1)
        return ((self(x.double(), sigma, labels) - x) / levels.square()).to(x.dtype)

    def weights(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        labels: torch.Tensor | None = None,
        *,
        left_out: float = 1e-3,
    ) -> Weights:
        """The fewest training images that hold a share of at least 1 − left_out of each query's weights.

        Computed in float64 from the differences; indices are those of the training set as it was given. A regularized
        variant is asked at its own noise level; the subset of `subset` is not drawn.
        """
        checks = self._check(x)
        rows, levels = self._to_rows(x.double().flatten(1)).cpu(), self._levels(sigma, len(x), x.device, checks).cpu()
        self.rows.means([], self.tolerance, checks)
        levels = self._row_units(levels if self.regularization is None else self.regularization.level(levels))
        indices, weights = [torch.empty(0)] * len(x), [torch.empty(0)] * len(x)
        missing = torch.empty(len(x), dtype=torch.float64)
        for chosen, (start, stop) in self._classes(labels, len(x)):
            for query in range(len(x)) if chosen is None else chosen.tolist():
                logits = self._exact_logits(rows[query], levels[query], start, stop)
                order = logits.argsort(descending=True, stable=True)
                shares = torch.softmax(logits[order], 0)
                behind = shares.flip(0).cumsum(0).flip(0) - shares  # the mass of all that come later
                count = int((behind > left_out).sum()) + 1
                images = order[:count] + start
                indices[query] = images if self.order is None else torch.from_numpy(self.order)[images]
                weights[query] = shares[:count]
                # Logits are off by (d + 3)·2^-53 of themselves at most, shares by twice that, their sum by N·2^-53.
                d, largest = self.rows.dimension, float(logits.max().abs())
                missing[query] = float(behind[count - 1]) + 2**-50 * (d * (1 + largest) + len(logits))
        return Weights(indices, weights, missing)

    def _exact_logits(self, row: torch.Tensor, sigma: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        step = max(1, WEIGHT_BLOCK // self.rows.dimension)
        blocks = (self.rows.slice(first, min(first + step, stop))[:] for first in range(start, stop, step))
        return torch.cat([(block.double() - row).square().sum(dim=1) for block in blocks]) / (-2 * sigma.square())

    def _to_rows(self, images: torch.Tensor) -> torch.Tensor:
        return (images + 1) * 127.5 if self.integer else images

    def _to_images(self, rows: torch.Tensor) -> torch.Tensor:
        return rows / 127.5 - 1 if self.integer else rows

    def _row_units(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma * 127.5 if self.integer else sigma

    def _subset(self, sigma: float, start: int, stop: int) -> torch.Tensor:
        """Sorted rows of the random subset for this noise level (of one class)."""
        digest = hashlib.sha256(f"{self.seed} {sigma.hex()} {start}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:16], "little"))
        assert self.subset is not None
        size = min(self.subset, stop - start)
        return torch.from_numpy(np.sort(generator.choice(stop - start, size, replace=False)) + start)

    def _parts(
        self, labels: torch.Tensor | None, levels: torch.Tensor
    ) -> list[tuple[torch.Tensor | None, tuple[int, int] | torch.Tensor]]:
        """Which queries (None: all) look at which rows: a slice for each class, or a random subset of it for each noise
        level. Where labels or subsets are asked for, the device is waited for: they are drawn on the CPU."""
        classes = self._classes(labels, len(levels))
        if self.subset is None:
            return list(classes)
        parts: list[tuple[torch.Tensor | None, tuple[int, int] | torch.Tensor]] = []
        known = levels.cpu()
        for chosen, (start, stop) in classes:
            queries = torch.arange(len(levels)) if chosen is None else chosen.cpu()
            for level in known[queries].unique():
                some = queries[known[queries] == level]
                parts.append((some.to(levels.device), self._subset(float(level), start, stop)))
        return parts

    def _classes(self, labels: torch.Tensor | None, count: int) -> list[tuple[torch.Tensor | None, tuple[int, int]]]:
        """Which queries (None: all) look at which slice of the rows."""
        everything = (0, int(self.starts[-1]))
        if labels is None:
            return [(None, everything)]
        if not self.label_dim:
            raise InputError("labels: this denoiser is unconditional; pass None")
        labels = labels.cpu()
        if labels.is_floating_point():
            if labels.shape != (count, self.label_dim) or not bool(((labels == 0) | (labels == 1)).all()):
                raise InputError(f"labels: class indices, or one-hot vectors of length {self.label_dim}, are needed")
            if not bool((labels.sum(dim=1) <= 1).all()):
                raise InputError("labels: a vector names several classes; the optimum takes one class or none")
            labels = torch.where(labels.sum(dim=1) > 0, labels.argmax(dim=1), -1)
        elif labels.shape != (count,) or (count and not 0 <= int(labels.min()) <= int(labels.max()) < self.label_dim):
            raise InputError(f"labels: one class of 0 … {self.label_dim - 1} for each of {count} images is needed")
        groups = []
        for label in labels.unique().tolist():
            start, stop = everything if label < 0 else self.starts[label : label + 2].tolist()
            if start == stop:
                raise InputError(f"class {label}: the training set has no image of this class")
            groups.append(((labels == label).nonzero().flatten().to(self.mean.device), (start, stop)))
        return groups

    def _levels(
        self, sigma: torch.Tensor | float, count: int, device: torch.device, checks: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """One noise level per image; that they are positive is added to `checks`."""
        given = _per_image(sigma, count)
        checks[BAD_SIGMA] = ((given > 0) & given.isfinite()).all().to(device)
        return given.to(device)

    def _check(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is to be found true of x before a result counts; raises InputError for what can be seen without waiting
        for its device."""
        self._check_shape(x)
        return {BAD_X: x.isfinite().all()}

    def _check_shape(self, x: torch.Tensor) -> None:
        if x.ndim != 4 or x.shape[1:] != self.image_shape:
            size = f"{self.channels}, {self.resolution}, {self.resolution}"
            raise InputError(f"x: shape {tuple(x.shape)}, but this denoiser takes (B, {size})")

    def _quick(self, x: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor | None:
        """D(x; σ) where it is nothing but the mean of all images, of a set or a batch so small that the dozens of
        PyTorch's operations around it would take longer than itself; None elsewhere."""
        if self.regularization is not None or self.subset is not None or not x.is_cpu:
            return None
        count = x.shape[0]  # len(x) would cost a microsecond
        if not count or not self.rows.is_quick(count, self.tolerance, x.dtype):
            return None
        unit, shift = (127.5, 127.5) if self.integer else (1.0, 0.0)
        one = isinstance(sigma, int | float) or (isinstance(sigma, torch.Tensor) and sigma.numel() == 1)
        levels = float(sigma) * unit if one else _per_image(sigma, count) * unit
        return self.rows.quick(x.detach() if x.requires_grad else x, levels, self.tolerance, unit, shift)


def _per_image(sigma: torch.Tensor | float, count: int) -> torch.Tensor:
    """One noise level per image [count] float64, where it is."""
    given = torch.as_tensor(sigma, dtype=torch.float64).flatten()
    if given.numel() not in (1, count):
        raise InputError(f"sigma: {given.numel()} noise levels for {count} images; give one, or one per image")
    return given.expand(count)


def _of(values: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    return values if chosen is None else values[chosen]


def _mean(rows: torch.Tensor) -> torch.Tensor:
    """The mean row, float64; of uint8 rows rounded to whole gray levels, so that differences from it are integers."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for block in rows.split(max(1, WEIGHT_BLOCK // rows.shape[1])):
        total += block.sum(dim=0, dtype=torch.float64)
    mean = total / len(rows)
    return mean.round() if rows.dtype == torch.uint8 else mean
