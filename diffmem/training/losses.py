"""Denoising losses of VP, VE and EDM: λ(σ)·(D(y + σn; σ) − y)² per pixel, σ drawn as each prescribes.

Table 1 of the EDM paper (Karras et al., arXiv 2206.00364), row "Training". One number per image is drawn first, then
the noise n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from diffmem.errors import InputError
from diffmem.models import EDM, IDDPM, VE, VP
from diffmem.models.preconditioning import Preconditioning

P_MEAN, P_STD = -1.2, 1.2  # of ln σ, EDM


class Draws(NamedTuple):
    """The randomness of one batch: level (B, 1, 1, 1), uniform (normal for EDM), and noise (B, C, H, W), normal."""

    level: torch.Tensor
    noise: torch.Tensor


def draw(
    preconditioning: Preconditioning,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Draws:
    """What a batch of `shape` (B, C, H, W) needs, float32, in the protocol's order: levels, then noise."""
    one_per_image = torch.randn if isinstance(preconditioning, EDM) else torch.rand
    level = one_per_image((shape[0], 1, 1, 1), generator=generator, device=device)
    return Draws(level, torch.randn(*shape, generator=generator, device=device))


def noise_level(preconditioning: Preconditioning, level: torch.Tensor) -> torch.Tensor:
    """σ of the drawn numbers.

    VP: σ(1 + u·(ε_t − 1)); VE: σ_min·(σ_max/σ_min)^u; EDM: ln σ ~ N(−1.2, 1.2²). Raises InputError for iDDPM, which is
    for sampling only.
    """
    if isinstance(preconditioning, VP):
        t = 1 + level * (preconditioning.epsilon_t - 1)
        return (0.5 * preconditioning.beta_d * t.square() + preconditioning.beta_min * t).expm1().sqrt()
    if isinstance(preconditioning, VE):
        return preconditioning.sigma_min * (preconditioning.sigma_max / preconditioning.sigma_min) ** level
    check_trainable(preconditioning)
    return (level * P_STD + P_MEAN).exp()


def weight(preconditioning: Preconditioning, sigma: torch.Tensor) -> torch.Tensor:
    """λ(σ): 1/σ² for VP and VE, (σ² + σ_d²)/(σ·σ_d)² for EDM."""
    if isinstance(preconditioning, EDM):
        data = preconditioning.sigma_data
        return (sigma.square() + data**2) / (sigma * data).square()
    return sigma.square().reciprocal()


def check_trainable(preconditioning: Preconditioning) -> None:
    """Raises InputError for preconditionings without a training loss."""
    if isinstance(preconditioning, IDDPM):
        raise InputError("iDDPM preconditioning is for sampling only: train with VP, VE or EDM")


def denoising_loss(
    denoiser: Any,
    images: torch.Tensor,
    preconditioning: Preconditioning,
    labels: torch.Tensor | None = None,
    augment_labels: torch.Tensor | None = None,
    *,
    draws: Draws | None = None,
    tikhonov: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The loss per pixel (B, C, H, W), λ(σ)·(D(x; σ) − y)² + tikhonov·s², x = y + σn, s = (D(x; σ) − x)/σ².

    The second term is Tikhonov regularization of the score (Baptista et al., arXiv 2501.15785). Where λ = 1/σ² (VP and
    VE) its optimum over a finite set is s = (ȳ − x)/(σ² + c), c = `tikhonov`, ȳ the posterior mean.

    Args:
        denoiser: Called as denoiser(x, sigma, labels, augment_labels), sigma (B, 1, 1, 1).
        images: y, (B, C, H, W) in [-1, 1].
        preconditioning: Decides the distribution of σ and λ.
        labels: Passed on to the denoiser.
        augment_labels: Passed on to the denoiser.
        draws: Noise levels and noise, see `diffmem.training.losses.draw`; by default drawn here.
        tikhonov: c, at least 0.
        generator: Generator of the draws; None: torch's own.

    Raises:
        InputError: The preconditioning is iDDPM's, which has no loss here.
    """
    check_trainable(preconditioning)
    if draws is None:
        draws = draw(preconditioning, images.shape, images.device, generator)
    sigma = noise_level(preconditioning, draws.level)
    x = images + sigma * draws.noise
    denoised = denoiser(x, sigma, labels, augment_labels)
    loss = weight(preconditioning, sigma) * (denoised - images).square()
    if tikhonov:
        loss = loss + tikhonov * ((denoised - x) / sigma.square()).square()
    return loss


def check_tikhonov(value: float) -> None:
    """Raises InputError unless `value` is a finite number ≥ 0."""
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"tikhonov is {value}, but must be a finite number of at least 0")
