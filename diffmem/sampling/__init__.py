"""Sampling: schedules, samplers that take them, the compiled step, per-image seeds, images of many seeds."""

from __future__ import annotations

from diffmem.sampling.batches import Samples, sample, sample_batches, sample_latents, to_uint8, worth_compiling
from diffmem.sampling.config import FAST_STEPS, HEUN_STEPS, SamplerConfig
from diffmem.sampling.plan import Churn, Plan
from diffmem.sampling.samplers import sample_dpmpp_2m, sample_euler, sample_general, sample_heun, sample_unipc
from diffmem.sampling.seeds import SeededGenerators
from diffmem.sampling.sigmas import (
    clip_range,
    round_sigmas,
    sigmas_iddpm,
    sigmas_karras,
    sigmas_logistic,
    sigmas_ve,
    sigmas_vp,
    vp_betas,
    vp_sigma,
)
from diffmem.sampling.step import StepInfo, is_compilable, is_compiled

__all__ = [
    "FAST_STEPS",
    "HEUN_STEPS",
    "Churn",
    "Plan",
    "SamplerConfig",
    "Samples",
    "SeededGenerators",
    "StepInfo",
    "clip_range",
    "is_compilable",
    "is_compiled",
    "round_sigmas",
    "sample",
    "sample_batches",
    "sample_dpmpp_2m",
    "sample_euler",
    "sample_general",
    "sample_heun",
    "sample_latents",
    "sample_unipc",
    "sigmas_iddpm",
    "sigmas_karras",
    "sigmas_logistic",
    "sigmas_ve",
    "sigmas_vp",
    "to_uint8",
    "vp_betas",
    "vp_sigma",
    "worth_compiling",
]
