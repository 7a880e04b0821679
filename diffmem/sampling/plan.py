"""The plan of a sampling run: a schedule as coefficients, computed once, in float64, on the host.

The sampler of the EDM paper (Karras et al., arXiv 2206.00364, Table 1 and Algorithm 1) in all its variants,
DPM-Solver++(2M) (Lu et al., arXiv 2211.01095) and UniPC (Zhao et al., arXiv 2302.04867) become the same short list of
stages: each evaluates the network once and forms linear combinations. What runs on the device knows nothing of
schedules.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from diffmem.errors import InputError
from diffmem.sampling.sigmas import vp_sigma

SCHEDULES = ("vp", "ve", "linear")
SCALINGS = ("vp", "none")
SOLVERS = ("euler", "heun")


class Stage(NamedTuple):
    """One evaluation of the network: D = D(x·in_scale; sigma), v = p·x + q·D, then x ← keep·base + now·v + before·(the
    last v), base ← keep·base + base_now·v + base_before·(the last v).

    `sets_base` sets `base` to the state before the stage; before that the state becomes carry·x + churn·noise.
    `starts_step`: the first stage of a step of the schedule; Heun's correction is not.
    """

    sigma: float
    in_scale: float
    p: float
    q: float
    keep: float
    now: float
    before: float
    sets_base: bool
    base_now: float = 0.0
    base_before: float = 0.0
    carry: float = 1.0
    churn: float = 0.0
    starts_step: bool = True


@dataclass(frozen=True)
class Plan:
    """A sampling run: the stages in order.

    Attributes:
        sigma: The noise level of the state at the start.
        stages: What is evaluated and combined.
        stochastic: Whether steps draw noise.
        scale: Factor of the state at the start, s(t) of the EDM paper; 1 without scaling.
        end_scale: s(t) at the end, by which the result is divided.
    """

    sigma: float
    stages: tuple[Stage, ...]
    stochastic: bool = False
    scale: float = 1.0
    end_scale: float = 1.0

    @property
    def nfe(self) -> int:
        """Number of function evaluations (of the network) per image."""
        return len(self.stages)

    @property
    def steps(self) -> int:
        """Number of steps of the schedule."""
        return sum(stage.starts_step for stage in self.stages)


@dataclass(frozen=True)
class Churn:
    """Noise added at each step: S_churn spread over the steps with S_min ≤ σ ≤ S_max, its deviation times S_noise."""

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0


NO_CHURN = Churn()


def dpmpp_2m_plan(sigmas: Sequence[float]) -> Plan:
    """DPM-Solver++(2M) in σ: one evaluation per noise level, second order but for the first step and the step to 0.

    With h = ln(σ_i/σ_(i+1)): x ← σ_(i+1)/σ_i·x + (1 − e^(−h))·((1 + 1/(2r))·D_i − 1/(2r)·D_(i−1)), r = h_(i−1)/h.
    """
    stages = []
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        ratio = following / sigma
        before = 0.0
        if i > 0 and following > 0:
            r = math.log(sigmas[i - 1] / sigma) / math.log(sigma / following)
            before = -(1 - ratio) / (2 * r)
        stages.append(Stage(sigma, 1.0, 0.0, 1.0, ratio, 1 - ratio - before, before, True))
    return Plan(sigmas[0], tuple(stages))


def unipc_plan(sigmas: Sequence[float]) -> Plan:
    """UniPC of order 2 with exact weights: one evaluation per noise level, used twice.

    In λ = −ln σ the flow is x(λ + h) = e^(−h)·x(λ) + ∫₀ʰ e^(u − h)·D(λ + u) du. Each step predicts with the line
    through the last two D; the D found at the prediction then corrects the step with the parabola through three, at no
    further evaluation, and the next step starts from there. The step to 0 is x = D.
    """
    stages = []
    correction = 0.0  # weight of D_i in the step that led to level i; the rest of that step is `base` already
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        if following == 0.0:
            stages.append(Stage(sigma, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, i == 0))
            break
        h, ratio = math.log(sigma / following), following / sigma
        earlier = [math.log(sigma / sigmas[i - 1])] if i else []
        predicted = [*_adams_weights(h, [0.0, *earlier]), 0.0]
        corrected = [*_adams_weights(h, [h, 0.0, *earlier]), 0.0]
        stages.append(
            Stage(
                sigma, 1.0, 0.0, 1.0, ratio, ratio * correction + predicted[0], predicted[1], i == 0,
                base_now=ratio * correction + corrected[1], base_before=corrected[2],
            )
        )  # fmt: skip
        correction = corrected[0]
    return Plan(sigmas[0], tuple(stages))


def _adams_weights(h: float, nodes: list[float]) -> list[float]:
    """w with Σ w_j·D(t_j) = ∫₀ʰ e^(u − h)·D(u) du for all polynomials D of degree below the number of nodes t_j."""
    moments = [-math.expm1(-h)]
    for k in range(1, len(nodes)):
        moments.append(h**k - k * moments[-1])
    return np.linalg.solve(np.vander(nodes, increasing=True).T, moments).tolist()


@dataclass(frozen=True)
class _Time:
    """σ(t), its derivative and inverse, and s(t) with its derivative."""

    sigma: Callable[[float], float]
    sigma_derivative: Callable[[float], float]
    sigma_inverse: Callable[[float], float]
    scale: Callable[[float], float] = lambda t: 1.0
    scale_derivative: Callable[[float], float] = lambda t: 0.0


def _time(schedule: str, scaling: str, betas: tuple[float, float]) -> _Time:
    if schedule == "vp":
        beta_d, beta_min = betas

        def sigma_of(t: float) -> float:
            return vp_sigma(t, beta_d, beta_min)

        time = _Time(
            sigma_of,
            lambda t: 0.5 * (beta_min + beta_d * t) * (sigma_of(t) + 1 / sigma_of(t)),
            lambda sigma: (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(sigma**2)) - beta_min) / beta_d,
        )
    elif schedule == "ve":
        time = _Time(math.sqrt, lambda t: 0.5 / math.sqrt(t), lambda sigma: sigma**2)
    else:
        time = _Time(lambda t: t, lambda t: 1.0, lambda sigma: sigma)
    if scaling == "none":
        return time

    def scale(t: float) -> float:
        return 1 / math.sqrt(1 + time.sigma(t) ** 2)

    def scale_derivative(t: float) -> float:
        return -time.sigma(t) * time.sigma_derivative(t) * scale(t) ** 3

    return _Time(time.sigma, time.sigma_derivative, time.sigma_inverse, scale, scale_derivative)


def general_plan(
    sigmas: Sequence[float],
    *,
    solver: str = "heun",
    schedule: str = "linear",
    scaling: str = "none",
    betas: tuple[float, float] = (19.9, 0.1),
    alpha: float = 1.0,
    churn: Churn = NO_CHURN,
    round_sigma: Callable[[float], float] = lambda sigma: sigma,
) -> Plan:
    """The general sampler of Table 1 of the EDM paper (arXiv 2206.00364) over these noise levels.

    Arguments as for `diffmem.sampling.sample_general`. round_sigma: how the network rounds noise levels that churn has
    raised; `sigmas` are rounded already. Raises InputError for unknown names.
    """
    for name, value, choices in (
        ("solver", solver, SOLVERS),
        ("schedule", schedule, SCHEDULES),
        ("scaling", scaling, SCALINGS),
    ):
        if value not in choices:
            raise InputError(f"{name} is {value!r}, but must be one of {', '.join(choices)}")
    time = _time(schedule, scaling, betas)
    times = [time.sigma_inverse(sigma) if sigma > 0 else 0.0 for sigma in sigmas]
    steps = len(times) - 1

    def slope(t: float) -> tuple[float, float]:
        """p and q of dx/dt = p·x + q·D."""
        ratio = time.sigma_derivative(t) / time.sigma(t)
        return ratio + time.scale_derivative(t) / time.scale(t), -ratio * time.scale(t)

    stages: list[Stage] = []
    for t, t_next in itertools.pairwise(times):
        sigma = time.sigma(t)
        gamma = min(churn.S_churn / steps, math.sqrt(2) - 1) if churn.S_min <= sigma <= churn.S_max else 0.0
        t_hat = time.sigma_inverse(round_sigma(sigma * (1 + gamma)))
        sigma_hat, scale_hat = time.sigma(t_hat), time.scale(t_hat)
        h = t_next - t_hat
        heun = solver == "heun" and t_next > 0
        stages.append(
            Stage(
                sigma_hat,
                1 / scale_hat,
                *slope(t_hat),
                keep=1.0,
                now=alpha * h if heun else h,
                before=0.0,
                sets_base=True,
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
                    sets_base=False,
                    starts_step=False,
                )
            )
    return Plan(
        time.sigma(times[0]), tuple(stages), churn.S_churn > 0, time.scale(times[0]), time.scale(times[-1])
    )  # fmt: skip
