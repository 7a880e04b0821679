"""Noise schedules: functions that return the noise levels of a sampling run, and how they are fitted to a network.

A schedule is a list of floats, computed in float64: the noise levels at which the denoiser is asked, from high to low,
and a last 0, the image. Samplers (`diffmem.sampling.samplers`) take any such list, these or your own. The schedules of
the EDM paper are those of Table 1 of Karras et al. (arXiv 2206.00364).

A network knows a range of noise levels, and some networks only certain levels in it. Both are applied in the open:

    low, high = clip_range(model, 0.002, 80.0)
    sigmas = round_sigmas(sigmas_karras(18, low, high), model)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from diffmem.errors import InputError
from diffmem.models.preconditioning import IDDPM


def sigmas_karras(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> list[float]:
    """EDM's schedule: σ_i = (σ_max^(1/ρ) + i/(n−1)·(σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ (equation 5).

    Args:
        n: Number of noise levels, at least 2.
        sigma_min: The lowest, above 0.
        sigma_max: The highest.
        rho: How much denser the levels lie at low noise; 1 spaces them evenly.

    Returns:
        n noise levels from high to low, and 0.

    Raises:
        InputError: For a number of levels, a range or a rho that makes no sense.

    Example:
        >>> from diffmem.sampling import sigmas_karras
        >>> [round(sigma, 3) for sigma in sigmas_karras(4)]
        [80.0, 9.723, 0.47, 0.002, 0.0]
    """
    _check(n, sigma_min, sigma_max)
    if not 0 < rho < math.inf:
        raise InputError(f"rho is {rho:g}, but must be positive and finite")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [*((high + i / (n - 1) * (low - high)) ** rho for i in range(n)), 0.0]


def sigmas_vp(n: int, beta_d: float = 19.9, beta_min: float = 0.1, epsilon_s: float = 1e-3) -> list[float]:
    """The variance-preserving schedule: σ(t) at n even steps of t from 1 to `epsilon_s`, and 0.

    Args:
        n: Number of noise levels, at least 2.
        beta_d: The slope of β(t), see `vp_sigma`.
        beta_min: β(0).
        epsilon_s: The last time, between 0 and 1.

    Returns:
        n noise levels from high to low, and 0.
    """
    sigmas = [vp_sigma(1 + i / (n - 1) * (epsilon_s - 1), beta_d, beta_min) for i in range(_checked_count(n))]
    return [*sigmas, 0.0]


def sigmas_ve(n: int, sigma_min: float = 0.02, sigma_max: float = 100.0) -> list[float]:
    """The variance-exploding schedule: n noise levels whose logarithms are evenly spaced, and 0.

    Args:
        n: Number of noise levels, at least 2.
        sigma_min: The lowest, above 0.
        sigma_max: The highest.

    Returns:
        n noise levels from high to low, and 0.
    """
    _check(n, sigma_min, sigma_max)
    return [*(sigma_max * (sigma_min / sigma_max) ** (i / (n - 1)) for i in range(n)), 0.0]


def sigmas_iddpm(
    n: int, sigma_min: float = 0.002, sigma_max: float = 81.0, C_1: float = 0.001, C_2: float = 0.008, M: int = 1000
) -> list[float]:
    """iDDPM's schedule (Nichol & Dhariwal, arXiv 2102.09672): n of its M discrete levels, evenly picked, and 0.

    Args:
        n: Number of noise levels, at least 2; where fewer lie in the range, some are picked twice.
        sigma_min: No level below this is picked.
        sigma_max: No level above this is picked.
        C_1: The least ratio of two successive ᾱ.
        C_2: The offset of the cosine.
        M: Number of discrete levels.

    Returns:
        n noise levels from high to low, and 0.
    """
    _check(n, sigma_min, sigma_max)
    levels = [level for level in IDDPM(C_1, C_2, M).levels if sigma_min <= level <= sigma_max]
    if len(levels) < 2:
        raise InputError(f"fewer than two of iDDPM's noise levels are within {sigma_min:g} … {sigma_max:g}")
    return [*(levels[round((len(levels) - 1) * (i / (n - 1)))] for i in range(n)), 0.0]


def sigmas_logistic(
    n: int, sigma_min: float = 0.02, sigma_max: float = 80.0, center: float = 1.0, width: float = 1.5
) -> list[float]:
    """n noise levels at even steps of the logistic function of (ln σ − ln center)/width, densest around `center`.

    Images of pixel deviation about ½ take shape at σ around 1, where the samples choose between the modes of the data;
    far above and below, few levels are enough. The schedule of the solver "unipc".

    Args:
        n: Number of noise levels, at least 2.
        sigma_min: The lowest, above 0.
        sigma_max: The highest.
        center: Where the levels are densest.
        width: How far they spread, in units of ln σ.

    Returns:
        n noise levels from high to low, and 0.
    """
    _check(n, sigma_min, sigma_max)
    high, low = (1 / (1 + (center / sigma) ** (1 / width)) for sigma in (sigma_max, sigma_min))
    shares = [high + i / (n - 1) * (low - high) for i in range(n)]
    return [*(center * (share / (1 - share)) ** width for share in shares), 0.0]


def vp_sigma(t: float, beta_d: float = 19.9, beta_min: float = 0.1) -> float:
    """σ(t) = √(exp(½·β_d·t² + β_min·t) − 1) of the variance-preserving process."""
    return math.sqrt(math.expm1(0.5 * beta_d * t**2 + beta_min * t))


def vp_betas(sigma_min: float, sigma_max: float, epsilon_s: float = 1e-3) -> tuple[float, float]:
    """(β_d, β_min) of the variance-preserving process with σ(epsilon_s) = sigma_min and σ(1) = sigma_max."""
    log_low, log_high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (log_low / epsilon_s - log_high) / (epsilon_s - 1)
    return beta_d, log_high - 0.5 * beta_d


def clip_range(model: Any, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """The range of noise levels, clipped to what the model knows.

    Args:
        model: A denoiser; its `sigma_min` and `sigma_max` count where it has them.
        sigma_min: The lowest level that is wanted.
        sigma_max: The highest.

    Returns:
        (sigma_min, sigma_max) for a schedule.

    Raises:
        InputError: Where nothing is left of the range, or it is not positive and finite.
    """
    low = max(sigma_min, getattr(model, "sigma_min", 0.0))
    high = min(sigma_max, getattr(model, "sigma_max", math.inf))
    _check_range(low, high)
    return low, high


def round_sigmas(sigmas: Sequence[float], model: Any) -> list[float]:
    """The noise levels as the model rounds them, by its `round_sigma` where it has one; a last 0 stays 0."""
    rounding = getattr(model, "round_sigma", None)
    return [rounding(sigma) if rounding is not None and sigma > 0 else sigma for sigma in sigmas]


def checked_sigmas(sigmas: Sequence[float] | torch.Tensor, distinct: bool = False) -> list[float]:
    """A schedule as floats.

    Args:
        sigmas: Noise levels from high to low, the last one may be 0: a sequence, or a tensor of one dimension.
        distinct: Whether no two may be equal, as multistep samplers need it.

    Raises:
        InputError: Where they are none, or out of order.
    """
    values = sigmas.tolist() if isinstance(sigmas, torch.Tensor) else [float(sigma) for sigma in sigmas]
    if len(values) < 2:
        raise InputError(f"sigmas: {len(values)} noise level(s), but a sampler needs at least two (the last may be 0)")
    if not all(math.isfinite(sigma) for sigma in values):
        raise InputError("sigmas: noise levels must be finite")
    steps = list(itertools.pairwise(values))
    if not all(high >= low and high > 0 for high, low in steps) or values[-1] < 0:
        raise InputError("sigmas: noise levels must be positive and decreasing; only the last may be 0")
    if distinct and any(high == low for high, low in steps):
        raise InputError(f"sigmas: two of {len(values)} noise levels are equal; use fewer steps")
    return values


def _check(n: int, sigma_min: float, sigma_max: float) -> None:
    _checked_count(n)
    _check_range(sigma_min, sigma_max)


def _checked_count(n: int) -> int:
    if not isinstance(n, int) or n < 2:
        raise InputError(f"steps is {n!r}, but must be a whole number of at least 2")
    return n


def _check_range(low: float, high: float) -> None:
    if not 0 < low < high < math.inf:
        raise InputError(f"sigma_min {low:g} and sigma_max {high:g} must be finite and 0 < sigma_min < sigma_max")
