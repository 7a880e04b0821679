"""Samplers: short functions that carry a state along a schedule of noise levels, by the flow of a denoiser.

A denoiser is called as `model(x, sigma, labels)` and returns the denoised images. `x` is the state at the first noise
level, standard normal latents times `sigmas[0]`; `sigmas` any schedule, see `diffmem.sampling.sigmas`. A schedule that
does not end at 0 gives the state at its last level.

All of them run the same step, compiled once per model where `compiled` is set. Arguments that all share:

    labels      as the model takes them, or None
    churn       noise added at each step (`sample_euler`, `sample_heun`, `sample_general`), none by default
    noise       draws that noise, float64 (B, C, H, W), once per step; default: torch's own generator
    callback    called after each step with a `StepInfo`: step, steps, sigma, x, denoised
    compiled    run the step through torch.compile

They return float64 (B, C, H, W) and raise InputError for a schedule that makes no sense.

Example:
    >>> import torch
    >>> from diffmem.sampling import sample_heun, sigmas_karras
    >>> sigmas = sigmas_karras(18)
    >>> x = torch.randn(4, 3, 8, 8, dtype=torch.float64) * sigmas[0]
    >>> images = sample_heun(lambda x, sigma, labels: x * 0.25 / (0.25 + sigma**2), x, sigmas)
    >>> images.shape
    torch.Size([4, 3, 8, 8])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from diffmem.sampling.plan import NO_CHURN, Churn, dpmpp_2m_plan, general_plan, unipc_plan
from diffmem.sampling.sigmas import checked_sigmas
from diffmem.sampling.step import Callback, Noise, run_plan


def sample_euler(
    model: Any,
    x: torch.Tensor,
    sigmas: Sequence[float],
    *,
    labels: torch.Tensor | None = None,
    churn: Churn = NO_CHURN,
    noise: Noise | None = None,
    callback: Callback | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """Images by Euler's method: first order, one evaluation per step. Arguments: see the module."""
    plan = general_plan(checked_sigmas(sigmas), solver="euler", churn=churn, round_sigma=rounding_of(model))
    return run_plan(plan, model, x, labels=labels, noise=noise, callback=callback, compiled=compiled)


def sample_heun(
    model: Any,
    x: torch.Tensor,
    sigmas: Sequence[float],
    *,
    labels: torch.Tensor | None = None,
    churn: Churn = NO_CHURN,
    noise: Noise | None = None,
    callback: Callback | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """Images by the EDM sampler: Heun's second order, two evaluations per step, one in the step to 0.

    Algorithm 2 of Karras et al. (arXiv 2206.00364), deterministic (Algorithm 1) without churn; n noise levels cost
    2n − 1 evaluations. Arguments: see the module.
    """
    plan = general_plan(checked_sigmas(sigmas), churn=churn, round_sigma=rounding_of(model))
    return run_plan(plan, model, x, labels=labels, noise=noise, callback=callback, compiled=compiled)


def sample_general(
    model: Any,
    x: torch.Tensor,
    sigmas: Sequence[float],
    *,
    solver: str = "heun",
    schedule: str = "linear",
    scaling: str = "none",
    betas: tuple[float, float] = (19.9, 0.1),
    alpha: float = 1.0,
    labels: torch.Tensor | None = None,
    churn: Churn = NO_CHURN,
    noise: Noise | None = None,
    callback: Callback | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """Images by the general sampler of Table 1 of the EDM paper (arXiv 2206.00364), over any noise levels.

    Args:
        model: See the module, as for all arguments that are not listed here.
        x: The state at `sigmas[0]`, not scaled.
        sigmas: Noise levels; the paper's discretizations are `sigmas_vp`, `sigmas_ve`, `sigmas_iddpm`, `sigmas_karras`.
        solver: "euler" or "heun".
        schedule: The time in which the flow is integrated, σ(t): "vp", "ve" (√t) or "linear" (t).
        scaling: s(t): "vp" (1/√(1 + σ²)) or "none" (1).
        betas: (β_d, β_min) of the schedule "vp", see `vp_betas`.
        alpha: Where in the step Heun's second slope is taken, 1 at its end.
        labels: As the model takes them, or None.
        churn: Noise added at each step.
        noise: Draws that noise.
        callback: Called after each step.
        compiled: Run the step through torch.compile.

    Raises:
        InputError: For unknown names, and noise levels out of order.
    """
    plan = general_plan(
        checked_sigmas(sigmas), solver=solver, schedule=schedule, scaling=scaling, betas=betas, alpha=alpha,
        churn=churn, round_sigma=rounding_of(model),
    )  # fmt: skip
    return run_plan(plan, model, x, labels=labels, noise=noise, callback=callback, compiled=compiled)


def sample_dpmpp_2m(
    model: Any,
    x: torch.Tensor,
    sigmas: Sequence[float],
    *,
    labels: torch.Tensor | None = None,
    callback: Callback | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """Images by DPM-Solver++(2M) (Lu et al., arXiv 2211.01095): second order, one evaluation per step.

    Arguments: see the module. No two noise levels may be equal.
    """
    plan = dpmpp_2m_plan(checked_sigmas(sigmas, distinct=True))
    return run_plan(plan, model, x, labels=labels, callback=callback, compiled=compiled)


def sample_unipc(
    model: Any,
    x: torch.Tensor,
    sigmas: Sequence[float],
    *,
    labels: torch.Tensor | None = None,
    callback: Callback | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """Images by UniPC (Zhao et al., arXiv 2302.04867) of order 2: one evaluation per step.

    With 14 levels of `sigmas_logistic` the memorization rule decides as after the protocol's 35 evaluations as often as
    it does after an all but exact 143 (99.6 % and 97.4 % of the seeds of two models, benchmarks/bench_solvers.py).
    Arguments: see the module. No two noise levels may be equal.
    """
    plan = unipc_plan(checked_sigmas(sigmas, distinct=True))
    return run_plan(plan, model, x, labels=labels, callback=callback, compiled=compiled)


def rounding_of(model: Any) -> Callable[[float], float]:
    """How the model rounds noise levels; the identity where it does not."""
    return getattr(model, "round_sigma", None) or (lambda sigma: sigma)
