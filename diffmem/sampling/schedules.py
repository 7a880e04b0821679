"""Noise levels and the plan of a sampling run, computed once, in float64, on the host.

The sampler of the EDM paper (Karras et al., arXiv 2206.00364, Table 1 and Algorithm 1) in all its variants, and
DPM-Solver++(2M) (Lu et al., arXiv 2211.01095), become the same short list of stages: each asks the network once and
forms linear combinations. What runs on the device knows nothing of schedules.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from diffmem.errors import InputError
from diffmem.models.preconditioning import IDDPM

DISCRETIZATIONS = ("vp", "ve", "iddpm", "edm")
SCHEDULES = ("vp", "ve", "linear")
SCALINGS = ("vp", "none")
SOLVERS = ("euler", "heun")


class Stage(NamedTuple):
    """One call of the network: D = D(x·in_scale; sigma), v = p·x + q·D, then x ← keep·base + now·v + before·(the last
    v).

    `base` is the state at the start of the step, to which `starts_step` sets it; before that the state becomes
    carry·x + churn·noise.
    """

    sigma: float
    in_scale: float
    p: float
    q: float
    keep: float
    now: float
    before: float
    starts_step: bool
    carry: float = 1.0
    churn: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A sampling run: latents times `start`, then the stages in order. `stochastic`: steps draw noise."""

    start: float
    stages: tuple[Stage, ...]
    stochastic: bool


@dataclass(frozen=True)
class Churn:
    """Noise added at each step: S_churn spread over the steps with S_min ≤ σ ≤ S_max, its deviation times S_noise."""

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0


def noise_range(denoiser: Any, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """The range clipped to what the denoiser knows (its `sigma_min` and `sigma_max`, where it has them)."""
    low = max(sigma_min, getattr(denoiser, "sigma_min", 0.0))
    high = min(sigma_max, getattr(denoiser, "sigma_max", math.inf))
    if not 0 < low < high < math.inf:
        raise InputError(f"sigma_min {low:g} and sigma_max {high:g} must be finite and 0 < sigma_min < sigma_max")
    return low, high


def check_steps(steps: int, least: int = 2) -> None:
    if not isinstance(steps, int) or steps < least:
        raise InputError(f"steps is {steps!r}, but must be a whole number of at least {least}")


def edm_levels(steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """σ_i = (σ_max^(1/ρ) + i/(n−1)·(σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ for i = 0 … n−1 (equation 5)."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(high + i / (steps - 1) * (low - high)) ** rho for i in range(steps)]


def multistep_plan(
    steps: int, sigma_min: float, sigma_max: float, rho: float, round_sigma: Callable[[float], float]
) -> Plan:
    """DPM-Solver++(2M) in σ: `steps` network calls, second order but for the first and the last step.

    With h = ln(σ_i/σ_(i+1)): x ← σ_(i+1)/σ_i·x + (1 − e^(−h))·((1 + 1/(2r))·D_i − 1/(2r)·D_(i−1)), r = h_(i−1)/h.
    """
    sigmas = [round_sigma(sigma) for sigma in edm_levels(steps, sigma_min, sigma_max, rho)] + [0.0]
    stages = []
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        ratio = following / sigma
        before = 0.0
        if 0 < i < steps - 1:
            r = math.log(sigmas[i - 1] / sigma) / math.log(sigma / following)
            before = -(1 - ratio) / (2 * r)
        stages.append(Stage(sigma, 1.0, 0.0, 1.0, ratio, 1 - ratio - before, before, True))
    return Plan(sigmas[0], tuple(stages), stochastic=False)


@dataclass(frozen=True)
class _Time:
    """σ(t), its derivative and inverse, and s(t) with its derivative."""

    sigma: Callable[[float], float]
    sigma_derivative: Callable[[float], float]
    sigma_inverse: Callable[[float], float]
    scale: Callable[[float], float]
    scale_derivative: Callable[[float], float]


def table_1_plan(
    steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    solver: str,
    discretization: str,
    schedule: str,
    scaling: str,
    epsilon_s: float,
    C_1: float,
    C_2: float,
    M: int,
    alpha: float,
    churn: Churn,
    round_sigma: Callable[[float], float],
) -> Plan:
    """The general sampler's plan; `sigma_min` and `sigma_max` as `noise_range` gives them."""
    for name, value, choices in (
        ("solver", solver, SOLVERS),
        ("discretization", discretization, DISCRETIZATIONS),
        ("schedule", schedule, SCHEDULES),
        ("scaling", scaling, SCALINGS),
    ):
        if value not in choices:
            raise InputError(f"{name} is {value!r}, but must be one of {', '.join(choices)}")
    log_low, log_high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (log_low / epsilon_s - log_high) / (epsilon_s - 1)
    beta_min = log_high - 0.5 * beta_d
    vp = _Time(
        lambda t: math.sqrt(math.expm1(0.5 * beta_d * t**2 + beta_min * t)),
        lambda t: 0.5 * (beta_min + beta_d * t) * (vp.sigma(t) + 1 / vp.sigma(t)),
        lambda sigma: (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(sigma**2)) - beta_min) / beta_d,
        lambda t: 1.0,
        lambda t: 0.0,
    )
    if schedule == "vp":
        time = vp
    elif schedule == "ve":
        time = _Time(math.sqrt, lambda t: 0.5 / math.sqrt(t), lambda sigma: sigma**2, vp.scale, vp.scale_derivative)
    else:
        time = _Time(lambda t: t, lambda t: 1.0, lambda sigma: sigma, vp.scale, vp.scale_derivative)
    if scaling == "vp":

        def scale(t: float) -> float:
            return 1 / math.sqrt(1 + time.sigma(t) ** 2)

        def scale_derivative(t: float) -> float:
            return -time.sigma(t) * time.sigma_derivative(t) * scale(t) ** 3

        time = _Time(time.sigma, time.sigma_derivative, time.sigma_inverse, scale, scale_derivative)

    fractions = [i / (steps - 1) for i in range(steps)]
    if discretization == "vp":
        sigmas = [vp.sigma(1 + fraction * (epsilon_s - 1)) for fraction in fractions]
    elif discretization == "ve":
        sigmas = [sigma_max * (sigma_min / sigma_max) ** fraction for fraction in fractions]
    elif discretization == "iddpm":
        levels = [level for level in IDDPM(C_1, C_2, M).levels if sigma_min <= level <= sigma_max]
        if len(levels) < 2:
            raise InputError(f"fewer than two of iDDPM's noise levels lie in {sigma_min:g} … {sigma_max:g}")
        sigmas = [levels[round((len(levels) - 1) * fraction)] for fraction in fractions]
    else:
        sigmas = edm_levels(steps, sigma_min, sigma_max, rho)

    times = [time.sigma_inverse(round_sigma(sigma)) for sigma in sigmas] + [0.0]

    def slope(t: float) -> tuple[float, float]:
        """p and q of dx/dt = p·x + q·D."""
        ratio = time.sigma_derivative(t) / time.sigma(t)
        return ratio + time.scale_derivative(t) / time.scale(t), -ratio * time.scale(t)

    stages: list[Stage] = []
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        sigma = time.sigma(t)
        gamma = min(churn.S_churn / steps, math.sqrt(2) - 1) if churn.S_min <= sigma <= churn.S_max else 0.0
        t_hat = time.sigma_inverse(round_sigma(sigma * (1 + gamma)))
        sigma_hat, scale_hat = time.sigma(t_hat), time.scale(t_hat)
        h = t_next - t_hat
        heun = solver == "heun" and i < steps - 1
        stages.append(
            Stage(
                sigma_hat,
                1 / scale_hat,
                *slope(t_hat),
                keep=1.0,
                now=alpha * h if heun else h,
                before=0.0,
                starts_step=True,
                carry=scale_hat / time.scale(t),
                churn=math.sqrt(max(sigma_hat**2 - sigma**2, 0.0)) * scale_hat * churn.S_noise,
            )
        )
        if heun:
            t_prime = t_hat + alpha * h
            stages.append(
                Stage(
                    time.sigma(t_prime),
                    1 / time.scale(t_prime),
                    *slope(t_prime),
                    keep=1.0,
                    now=h / (2 * alpha),
                    before=h * (1 - 1 / (2 * alpha)),
                    starts_step=False,
                )
            )
    return Plan(time.sigma(times[0]) * time.scale(times[0]), tuple(stages), stochastic=churn.S_churn > 0)
