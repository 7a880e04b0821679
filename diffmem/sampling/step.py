"""The compiled step behind all samplers: a plan carried out on the device, one evaluation of the network per stage.

The state is float64, all noise levels come from the host in one transfer, and no step waits for the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from diffmem.errors import InputError
from diffmem.sampling.plan import Plan

# draw() → (B, C, H, W) float64 standard normal numbers
Noise = Callable[[], torch.Tensor]


@dataclass(frozen=True, eq=False)
class StepInfo:
    """What a callback is told after each step.

    Attributes:
        step: Index of the step, from 0.
        steps: Number of steps of the run.
        sigma: Noise level of `x`: that of the schedule, raised by churn.
        x: The state at that noise level, float64 (B, C, H, W); not to be changed.
        denoised: D(x; sigma), float64 (B, C, H, W); not to be changed.
    """

    step: int
    steps: int
    sigma: float
    x: torch.Tensor
    denoised: torch.Tensor


Callback = Callable[[StepInfo], None]


def run_plan(
    plan: Plan,
    model: Any,
    x: torch.Tensor,
    *,
    labels: torch.Tensor | None = None,
    noise: Noise | None = None,
    callback: Callback | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """The images of a plan.

    Args:
        plan: See `diffmem.sampling.plan`.
        model: A denoiser, called as `model(x, sigma, labels)`.
        x: (B, C, H, W), the state at the noise level `plan.sigma`, standard normal noise times that level.
        labels: As the model takes them.
        noise: What draws the noise of a stochastic plan, once per step. Default: torch's own generator.
        callback: Called after each step with a `StepInfo`.
        compiled: Run the step through torch.compile: compiled once per model and shape, for all plans.

    Returns:
        (B, C, H, W) float64.
    """
    stage_of = _compiled_stage(model) if compiled else _stage
    with torch.inference_mode() if not compiled else torch.no_grad():
        x = x.to(torch.float64)
        if plan.scale != 1.0:
            x = x * plan.scale
        coefficients = torch.tensor(
            # Rows of sixteen, so that each begins at an aligned address, as compiled code assumes.
            [[*s[:7], s.base_now, s.base_before, *[0.0] * 7] for s in plan.stages],
            dtype=torch.float64,
        ).to(x.device, non_blocking=True)
        base, slope = x, torch.zeros_like(x)
        step, steps = 0, plan.steps
        for stage, row in zip(plan.stages, coefficients, strict=True):
            if stage.sets_base:
                if plan.stochastic:
                    # Drawn in every step, used or not, so that later draws do not depend on the range of churn.
                    drawn = torch.randn_like(x) if noise is None else noise()
                    x = stage.carry * x + stage.churn * drawn
                elif stage.carry != 1.0:
                    x = stage.carry * x
                # Two tensors for a compiled stage: one passed twice would make another graph.
                base = x.clone() if compiled else x
            before = x
            x, base, slope, denoised = stage_of(model, x, base, slope, row, labels)
            if stage.starts_step:
                if callback is not None:
                    seen = before if stage.in_scale == 1.0 else before * stage.in_scale
                    callback(StepInfo(step, steps, stage.sigma, seen, denoised))
                step += 1
        return x if plan.end_scale == 1.0 else x / plan.end_scale


def _stage(
    model: Any,
    x: torch.Tensor,
    base: torch.Tensor,
    slope: torch.Tensor,
    row: torch.Tensor,
    labels: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One evaluation of the network and its linear combinations, see Stage; one graph for all stages of all solvers."""
    sigma, in_scale, p, q, keep, now, before, base_now, base_before = row.unbind()[:9]
    denoised = model(x * in_scale, sigma, labels).to(torch.float64)
    new_slope = p * x + q * denoised
    kept = keep * base
    return (
        kept + now * new_slope + before * slope,
        kept + base_now * new_slope + base_before * slope,
        new_slope,
        denoised,
    )


_COMPILED: weakref.WeakKeyDictionary[Any, Callable[..., Any]] = weakref.WeakKeyDictionary()


def is_compiled(model: Any) -> bool:
    """Whether a compiled step of this denoiser is at hand."""
    return model in _COMPILED


def is_compilable(model: Any) -> bool:
    """Whether this denoiser is one that torch.compile can take: networks are; what says `compilable = False` is not."""
    return getattr(model, "compilable", True)


def _compiled_stage(model: Any) -> Callable[..., Any]:
    """The compiled stage of this denoiser, made once."""
    if not is_compilable(model):
        raise InputError("compile: this denoiser cannot be compiled here; call torch.compile on your module yourself")
    if model not in _COMPILED:
        device = next((parameter.device.type for parameter in model.parameters()), "cpu")
        # CUDA graphs where there is CUDA: the step is dozens of small kernels.
        compiled = torch.compile(_stage, fullgraph=True, mode="reduce-overhead" if device == "cuda" else None)
        if device != "cuda":
            _COMPILED[model] = compiled
            return compiled

        def cloned(*arguments: Any) -> tuple[torch.Tensor, ...]:
            # A CUDA graph writes every run's results to the same memory.
            torch.compiler.cudagraph_mark_step_begin()
            return tuple(tensor.clone() for tensor in compiled(*arguments))

        _COMPILED[model] = cloned
    return _COMPILED[model]
