"""How a network F becomes a denoiser D, D(x; σ) = c_skip·x + c_out·F(c_in·x; c_noise): VP, VE, iDDPM and EDM.

Table 1 of the EDM paper (Karras et al., arXiv 2206.00364). Each is a frozen dataclass of its constants with
`sigma_min` and `sigma_max`, the noise levels (standard deviations, images in [-1, 1]) between which it may be asked,
and `coefficients`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch


class Coefficients(NamedTuple):
    """c_skip, c_out, c_in and c_noise, in the shape of sigma (or numbers where they do not depend on it)."""

    skip: torch.Tensor | float
    out: torch.Tensor
    in_: torch.Tensor | float
    noise: torch.Tensor


@dataclass(frozen=True)
class VP:
    """Variance preserving: σ(t)² = exp(½·β_d·t² + β_min·t) − 1, c_noise = (M − 1)·σ⁻¹(σ).

    Attributes:
        beta_d: β_d, the slope of the noise schedule.
        beta_min: β_min, its start.
        M: Steps of the discrete process.
        epsilon_t: The smallest t of training.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    M: int = 1000
    epsilon_t: float = 1e-5

    def sigma(self, t: float) -> float:
        """The noise level at time t."""
        return math.sqrt(math.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t))

    @property
    def sigma_min(self) -> float:
        return self.sigma(self.epsilon_t)

    @property
    def sigma_max(self) -> float:
        return self.sigma(1.0)

    def coefficients(self, sigma: torch.Tensor) -> Coefficients:
        variance = sigma.square()
        t = ((self.beta_min**2 + 2 * self.beta_d * variance.log1p()).sqrt() - self.beta_min) / self.beta_d
        return Coefficients(1.0, -sigma, (variance + 1).rsqrt(), (self.M - 1) * t)


@dataclass(frozen=True)
class VE:
    """Variance exploding: the input unscaled, c_noise = ln(σ/2).

    Attributes:
        sigma_min: The lowest noise level that the network knows.
        sigma_max: The highest.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def coefficients(self, sigma: torch.Tensor) -> Coefficients:
        return Coefficients(1.0, sigma, 1.0, (0.5 * sigma).log())


@dataclass(frozen=True)
class IDDPM:
    """Improved DDPM (Nichol and Dhariwal, arXiv 2102.09672): M discrete noise levels u_0 > … > u_(M−1) > u_M = 0.

    u_(j−1) = √((u_j² + 1)/max(ᾱ_(j−1)/ᾱ_j, C_1) − 1), ᾱ_j = sin²(½π·j/(M·(C_2 + 1))); c_noise counts from u_(M−1)
    upwards. The network has twice the images' channels (the second half, its variances, is not used).

    Attributes:
        C_1: The lower bound of ᾱ_(j−1)/ᾱ_j.
        C_2: The offset of the schedule.
        M: Noise levels.
    """

    C_1: float = 0.001
    C_2: float = 0.008
    M: int = 1000

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """u_0 … u_M."""

        def alpha_bar(j: int) -> float:
            return math.sin(0.5 * math.pi * j / (self.M * (self.C_2 + 1))) ** 2

        u = [0.0]
        for j in range(self.M, 0, -1):
            u.append(math.sqrt((u[-1] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), self.C_1) - 1))
        return tuple(reversed(u))

    @property
    def sigma_min(self) -> float:
        return self.levels[self.M - 1]

    @property
    def sigma_max(self) -> float:
        return self.levels[0]

    def nearest(self, sigma: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """The index of the level nearest to each sigma; `levels` as a tensor beside it."""
        return (sigma[..., None] - levels).abs().argmin(dim=-1)

    def coefficients(self, sigma: torch.Tensor, levels: torch.Tensor) -> Coefficients:
        c_noise = (self.M - 1 - self.nearest(sigma, levels)).to(sigma.dtype)
        return Coefficients(1.0, -sigma, (sigma.square() + 1).rsqrt(), c_noise)


@dataclass(frozen=True)
class EDM:
    """Unit variance at input and target for data of deviation σ_d, c_noise = ln(σ)/4 (Karras et al., arXiv 2206.00364).

    Attributes:
        sigma_data: σ_d, in units of [-1, 1].
        sigma_min: The lowest noise level that the network knows.
        sigma_max: The highest.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def coefficients(self, sigma: torch.Tensor) -> Coefficients:
        variance = sigma.square() + self.sigma_data**2
        scale = variance.rsqrt()
        return Coefficients(self.sigma_data**2 / variance, sigma * self.sigma_data * scale, scale, sigma.log() / 4)


Preconditioning = VP | VE | IDDPM | EDM
