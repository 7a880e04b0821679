"""Samplers: latents become images by integrating the probability flow of a denoiser.

A denoiser is called as `denoiser(x, sigma, labels)`; its attributes `sigma_min`, `sigma_max` and `round_sigma` count
where it has them. The state is float64, all noise levels come from the host in one transfer, and no step waits for the
device.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch

from diffmem.errors import InputError
from diffmem.sampling.schedules import (
    Churn,
    Plan,
    check_steps,
    edm_levels,
    logistic_levels,
    multistep_plan,
    noise_range,
    predictor_corrector_plan,
    rounded_levels,
    table_1_plan,
)

# Steps of the protocol's sampler (35 network calls), and of the fast ones (as many calls).
HEUN_STEPS, FAST_STEPS = 18, 14

# draw() → (B, C, H, W) float64 standard normal numbers
Noise = Callable[[], torch.Tensor]


def _identity(sigma: float) -> float:
    return sigma


def heun_plan(
    denoiser: Any,
    steps: int = HEUN_STEPS,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    churn: Churn = Churn(),  # noqa: B008 (frozen)
) -> Plan:
    """What heun_sample does with these arguments; one stage is one network call."""
    check_steps(steps)
    low, high = noise_range(denoiser, sigma_min, sigma_max)
    round_sigma = getattr(denoiser, "round_sigma", _identity)
    return table_1_plan(
        steps, low, high, rho, "heun", "edm", "linear", "none", 1e-3, 0.001, 0.008, 1000, 1.0, churn, round_sigma
    )


def heun_sample(
    denoiser: Any,
    latents: torch.Tensor,
    *,
    steps: int = HEUN_STEPS,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    noise: Noise | None = None,
    labels: torch.Tensor | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """Images (B, C, H, W) float64 in [-1, 1] by the EDM sampler: Heun's second order, 2·steps − 1 network calls.

    Algorithm 2 of Karras et al. (arXiv 2206.00364), deterministic (Algorithm 1) unless S_churn > 0.

    latents (B, C, H, W) standard normal; steps of noise levels from sigma_max down to sigma_min, spaced by rho and
    clipped to the denoiser's range; S_churn, S_min, S_max, S_noise the added noise, which `noise` draws once per step
    (default: torch's own generator); labels as the denoiser takes them; compiled: run the network through
    torch.compile, once per shape. Raises InputError for steps or ranges that make no sense.
    """
    plan = heun_plan(denoiser, steps, sigma_min, sigma_max, rho, Churn(S_churn, S_min, S_max, S_noise))
    return run_plan(plan, denoiser, latents, labels, noise, compiled)


def general_sample(
    denoiser: Any,
    latents: torch.Tensor,
    *,
    solver: str = "heun",
    discretization: str = "edm",
    schedule: str = "linear",
    scaling: str = "none",
    steps: int = HEUN_STEPS,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    epsilon_s: float = 1e-3,
    C_1: float = 0.001,
    C_2: float = 0.008,
    M: int = 1000,
    alpha: float = 1.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    noise: Noise | None = None,
    labels: torch.Tensor | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """Images (B, C, H, W) float64 by the general sampler of Table 1 of the EDM paper (arXiv 2206.00364).

    solver "euler" or "heun" (alpha: where Heun's second slope is taken); discretization "vp", "ve", "iddpm" or "edm",
    with its own default range of noise levels; schedule σ(t) "vp", "ve" or "linear"; scaling s(t) "vp" or "none";
    noise and labels as for heun_sample (a seed's generator draws latent, class index, also where a class is given, and
    noise, in this order);
    epsilon_s the end of VP's time; C_1, C_2, M iDDPM's levels. The rest as for heun_sample. Raises InputError for
    unknown names.
    """
    check_steps(steps)
    vp_low, vp_high = (math.sqrt(math.expm1(0.5 * 19.9 * t**2 + 0.1 * t)) for t in (epsilon_s, 1.0))
    defaults = {"vp": (vp_low, vp_high), "ve": (0.02, 100.0), "iddpm": (0.002, 81.0)}
    low, high = defaults.get(discretization, (0.002, 80.0))
    low, high = noise_range(denoiser, low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max)
    plan = table_1_plan(
        steps, low, high, rho, solver, discretization, schedule, scaling, epsilon_s, C_1, C_2, M, alpha,
        Churn(S_churn, S_min, S_max, S_noise), getattr(denoiser, "round_sigma", _identity),
    )  # fmt: skip
    return run_plan(plan, denoiser, latents, labels, noise, compiled)


def dpmpp_plan(
    denoiser: Any, steps: int = FAST_STEPS, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Plan:
    """What dpmpp_sample does with these arguments; one stage is one network call."""
    check_steps(steps)
    low, high = noise_range(denoiser, sigma_min, sigma_max)
    levels = edm_levels(steps, low, high, rho)
    return multistep_plan(rounded_levels(levels, getattr(denoiser, "round_sigma", _identity)))


def dpmpp_sample(
    denoiser: Any,
    latents: torch.Tensor,
    *,
    steps: int = FAST_STEPS,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    labels: torch.Tensor | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """Images (B, C, H, W) float64 by DPM-Solver++(2M) (Lu et al., arXiv 2211.01095): one network call per step.

    Arguments as for heun_sample.
    """
    return run_plan(dpmpp_plan(denoiser, steps, sigma_min, sigma_max, rho), denoiser, latents, labels, None, compiled)


def unipc_plan(
    denoiser: Any,
    steps: int = FAST_STEPS,
    sigma_min: float = 0.02,
    sigma_max: float = 80.0,
    center: float = 1.0,
    width: float = 1.5,
) -> Plan:
    """What unipc_sample does with these arguments; one stage is one network call."""
    check_steps(steps)
    low, high = noise_range(denoiser, sigma_min, sigma_max)
    levels = logistic_levels(steps, low, high, center, width)
    return predictor_corrector_plan(rounded_levels(levels, getattr(denoiser, "round_sigma", _identity)))


def unipc_sample(
    denoiser: Any,
    latents: torch.Tensor,
    *,
    steps: int = FAST_STEPS,
    sigma_min: float = 0.02,
    sigma_max: float = 80.0,
    center: float = 1.0,
    width: float = 1.5,
    labels: torch.Tensor | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """Images (B, C, H, W) float64 by UniPC (Zhao et al., arXiv 2302.04867) of order 2: one network call per step.

    center, width: where the noise levels are densest and how far they spread, see `schedules.logistic_levels`. With the
    defaults' 14 calls the memorization rule decides as after the protocol's 35 as often as it does after an all but
    exact 143 (99.6 % and 97.4 % of the seeds of two models, benchmarks/bench_solvers.py). The other arguments as for
    heun_sample.
    """
    plan = unipc_plan(denoiser, steps, sigma_min, sigma_max, center, width)
    return run_plan(plan, denoiser, latents, labels, None, compiled)


def run_plan(
    plan: Plan,
    denoiser: Any,
    latents: torch.Tensor,
    labels: torch.Tensor | None = None,
    noise: Noise | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """The images of a plan, see `diffmem.sampling.schedules`."""
    stage_of = _compiled_stage(denoiser) if compiled else _stage
    with torch.inference_mode() if not compiled else torch.no_grad():
        x = latents.to(torch.float64) * plan.start
        coefficients = torch.tensor(
            # Rows of sixteen, so that each begins at an aligned address, as compiled code assumes.
            [[*s[:7], s.base_now, s.base_before, *[0.0] * 7] for s in plan.stages],
            dtype=torch.float64,
        ).to(x.device, non_blocking=True)
        base, slope = x, torch.zeros_like(x)
        for stage, row in zip(plan.stages, coefficients, strict=True):
            if stage.starts_step:
                if plan.stochastic:
                    # Drawn in every step, used or not, so that later draws do not depend on the range of churn.
                    drawn = torch.randn_like(x) if noise is None else noise()
                    x = stage.carry * x + stage.churn * drawn
                elif stage.carry != 1.0:
                    x = stage.carry * x
                # Two tensors for a compiled stage: one passed twice would make another graph.
                base = x.clone() if compiled else x
            x, base, slope = stage_of(denoiser, x, base, slope, row, labels)
        return x


def _stage(
    denoiser: Any,
    x: torch.Tensor,
    base: torch.Tensor,
    slope: torch.Tensor,
    row: torch.Tensor,
    labels: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One network call and its linear combinations, see Stage; the same graph for every stage of every solver."""
    sigma, in_scale, p, q, keep, now, before, base_now, base_before = row.unbind()[:9]
    denoised = denoiser(x * in_scale, sigma, labels).to(torch.float64)
    new_slope = p * x + q * denoised
    kept = keep * base
    return kept + now * new_slope + before * slope, kept + base_now * new_slope + base_before * slope, new_slope


_COMPILED: weakref.WeakKeyDictionary[Any, Callable] = weakref.WeakKeyDictionary()


def is_compiled(denoiser: Any) -> bool:
    """Whether a compiled step of this denoiser is at hand."""
    return denoiser in _COMPILED


def is_compilable(denoiser: Any) -> bool:
    """Whether this denoiser is one that torch.compile can take: networks are; what says `compilable = False` is not."""
    return getattr(denoiser, "compilable", True)


def _compiled_stage(denoiser: Any) -> Callable:
    """The compiled stage of this denoiser, made once."""
    if not is_compilable(denoiser):
        raise InputError(
            "compile: nothing to compile in this denoiser; give a module of your own to torch.compile yourself"
        )
    if denoiser not in _COMPILED:
        device = next((parameter.device.type for parameter in denoiser.parameters()), "cpu")
        # CUDA graphs where there is CUDA: the step is dozens of small kernels.
        compiled = torch.compile(_stage, fullgraph=True, mode="reduce-overhead" if device == "cuda" else None)
        if device != "cuda":
            _COMPILED[denoiser] = compiled
            return compiled

        def cloned(*arguments: Any) -> tuple[torch.Tensor, ...]:
            # A CUDA graph writes every run's results to the same memory.
            torch.compiler.cudagraph_mark_step_begin()
            return tuple(tensor.clone() for tensor in compiled(*arguments))

        _COMPILED[denoiser] = cloned
    return _COMPILED[denoiser]
