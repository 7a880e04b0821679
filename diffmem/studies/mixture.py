"""A laboratory without images: denoisers that are mixtures, trained on samples of a mixture (Buchanan et al. 2025, "On
the Edge of Memorization in Diffusion Models", arXiv 2508.17689).

Data: N samples of K equally likely Gaussians of variance 1 in d dimensions, with random centers on the sphere of radius
√d. Model: the posterior mean of M equally likely Gaussians at noise level σ,

    D(y; σ) = Σ_j w_j (σ² μ_j + s² y) / (s² + σ²),   w = softmax_j(−‖y − μ_j‖² / (2 (s² + σ²))),

whose centers μ_j and one common standard deviation s are trained. With M = K it can be the data's own posterior mean,
with M = N and s → 0 that of the training set. Loss: E ‖D(y; σ) − x‖² / σ² (the error of the predicted noise), averaged
over the 26 levels σ = t / √(1 − t²), t from 0.001 to 0.999; sampling: deterministic, along the same levels. That, the
start of the centers at M of the training samples, and d from 30 to 60, K from 3 to 12 and N from 50 to 200 are the
paper's (its code: github.com/DruvPai/diffusion_mem_gen).

What differs is the optimizer, for minutes instead of hours: Adam on ln s, with every level in every batch, from
s = 0.1. The paper starts at s = 0.001, where gradients are so large that Adam's averages forget them only after some
20,000 of its 50,000 steps; from there, with averages as short as here, the same s and R_mem are reached.

Closed forms of the loss, for high dimension, where the posterior is sure of its component:

- the data's own posterior mean: d / (1 + σ²) (`generalizing_loss`);
- a partially memorizing denoiser, centers on M of the samples, the others at a mean squared distance δ² from the
  nearest center: (d s⁴ + (1 − M/N) δ² σ²) / (s² + σ²)² (`memorizing_loss`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from diffmem.errors import InputError
from diffmem.studies.parts import part_of

TIMES = torch.linspace(0.001, 0.999, 26, dtype=torch.float64)
LEVELS = (TIMES / (1 - TIMES**2).sqrt()).to(torch.float32)
_START = 0.1  # s
_PER_LEVEL = 10  # noisy samples of a batch at every level
BATCH = _PER_LEVEL * len(LEVELS)
_TAIL = 0.2  # of the steps, over which the loss is averaged


@dataclass(frozen=True)
class Mixture:
    """What is trained.

    Attributes:
        share: M / N.
        dimension: d.
        clusters: K, components of the data.
        lr: Adam's, of the centers; ln s has three times as much.
    """

    share: float
    dimension: int = 30
    clusters: int = 4
    lr: float = 0.02

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and self.dimension >= 1 and self.clusters >= 1 and self.lr > 0):
            raise InputError(
                f"mixture: share is {self.share}, dimension {self.dimension}, clusters {self.clusters} and lr "
                f"{self.lr}, but share must be above 0 and at most 1, the others above 0"
            )

    @staticmethod
    def of(values: Mapping[str, Any]) -> Mixture:
        """From the values that a setting holds; raises InputError where they are none."""
        return part_of(Mixture, values)

    def components(self, size: int) -> int:
        """M."""
        return max(1, round(self.share * size))


@dataclass(frozen=True)
class MixtureResult:
    """What was found of a trained mixture beside its copies.

    Attributes:
        components: M.
        std: s.
        on_one: Share of the centers that lie on one training sample, by the same rule as copies.
        loss: At the end of training.
        memorizing: That of the partially memorizing denoiser with the best s, in closed form.
        generalizing: That of the data's own posterior mean, in closed form.
    """

    components: int
    std: float
    on_one: float
    loss: float
    memorizing: float
    generalizing: float


@dataclass(frozen=True)
class Trained:
    """A trained mixture, its samples judged. count: copies among `total` samples."""

    result: MixtureResult
    count: int
    total: int
    training_seconds: float
    sampling_seconds: float


def data(mixture: Mixture, size: int, repetition: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The centers [K, d] and N samples [N, d] of a repetition, float32; smaller sizes are the first ones of larger."""
    random = np.random.default_rng([repetition, 2508])
    centers = random.standard_normal((mixture.clusters, mixture.dimension))
    centers *= math.sqrt(mixture.dimension) / np.linalg.norm(centers, axis=1, keepdims=True)
    rows = [centers[random.integers(mixture.clusters)] + random.standard_normal(mixture.dimension) for _ in range(size)]
    return torch.from_numpy(centers).float(), torch.from_numpy(np.array(rows)).float()


def posterior_mean(y: torch.Tensor, sigma: torch.Tensor, centers: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """D(y; σ) [B, d] of noisy samples y [B, d] at levels [B, 1], for centers [M, d] and one standard deviation."""
    noise, own = sigma**2, std**2
    products = 2 * y @ centers.T - centers.square().sum(1)  # of −‖y − μ‖² what differs between the components
    weights = (products / (2 * (own + noise))).softmax(1)
    return (weights @ centers * noise + y * own) / (own + noise)


def generalizing_loss(dimension: int) -> float:
    """Of the data's own posterior mean, averaged over the levels."""
    return float((dimension / (1 + LEVELS.double() ** 2)).mean())


def memorizing_loss(samples: torch.Tensor, memorized: torch.Tensor) -> float:
    """Of the denoiser with centers on some of the samples [N, d], those at these rows, and the best s, averaged over
    the levels."""
    distances = torch.cdist(samples.double(), samples[memorized].double()).min(1).values.square()
    others = float(distances.mean())  # (1 − M/N) δ²
    own = torch.logspace(-5, 0.5, 300, dtype=torch.float64)[:, None] ** 2
    noise = LEVELS.double() ** 2
    losses = (samples.shape[1] * own**2 + others * noise) / (own + noise) ** 2
    return float(losses.mean(1).min())


def copies(generated: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    """Which rows are copies by the ratio rule, bool [B]: the nearest training sample is less than a third as far as the
    second nearest."""
    nearest = torch.cdist(generated.double(), training.double()).topk(2, largest=False).values
    return 3 * nearest[:, 0] < nearest[:, 1]


def train_mixture(mixture: Mixture, size: int, repetition: int, images: int, count: int) -> Trained:
    """Trains a mixture, samples it and judges its samples.

    Args:
        mixture: What is trained.
        size: N.
        repetition: Decides the data, the start and the noise.
        images: Noisy samples to train on.
        count: Samples to generate.
    """
    since = time.perf_counter()
    training = data(mixture, size, repetition)[1]
    components = mixture.components(size)
    random = torch.Generator().manual_seed((repetition * 1_000_003 + size) * 1_000_003 + components)
    memorized = torch.randperm(size, generator=random)[:components]
    centers, std, loss = _train(mixture, training, memorized, max(1, math.ceil(images / BATCH)), random)
    trained = time.perf_counter()
    found = copies(sample(centers, std, count, random), training)
    result = MixtureResult(
        components,
        float(std),
        float(copies(centers, training).double().mean()),
        loss,
        memorizing_loss(training, memorized),
        generalizing_loss(mixture.dimension),
    )
    return Trained(result, int(found.sum()), count, trained - since, time.perf_counter() - trained)


def _train(
    mixture: Mixture, training: torch.Tensor, start: torch.Tensor, steps: int, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Trained centers, s, and the loss at the end."""
    centers = training[start].clone().requires_grad_()
    log_std = torch.tensor(math.log(_START), requires_grad=True)
    groups = [{"params": [centers], "lr": mixture.lr}, {"params": [log_std], "lr": 3 * mixture.lr}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
    sigma = LEVELS.repeat_interleave(_PER_LEVEL)[:, None]
    losses = []
    for _ in range(steps):
        clean = training[torch.randint(len(training), (BATCH,), generator=random)]
        noisy = clean + sigma * torch.randn(clean.shape, generator=random)
        errors = (posterior_mean(noisy, sigma, centers, log_std.exp()) - clean) / sigma
        loss = errors.square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        losses.append(float(loss.detach()))
    tail = losses[-max(1, int(_TAIL * steps)) :]
    return centers.detach(), log_std.detach().exp(), sum(tail) / len(tail)


def _rate(part: float) -> float:
    """Of the learning rate: a short rise, then level, then down along a cosine."""
    return min(1.0, part / 0.05 + 1e-3) * (1.0 if part < 0.3 else 0.5 * (1 + math.cos(math.pi * (part - 0.3) / 0.7)))


def sample(centers: torch.Tensor, std: torch.Tensor, count: int, random: torch.Generator) -> torch.Tensor:
    """Samples [count, d] along the levels, each step at the slope of its beginning (DDIM, without noise of its own)."""
    levels = LEVELS.flip(0)
    y = torch.randn((count, centers.shape[1]), generator=random) * (1 + levels[0] ** 2).sqrt()
    for here, there in pairwise(levels):
        y = y + (there - here) / here * (y - posterior_mean(y, here, centers, std))
    return y
