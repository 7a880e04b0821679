"""Sampling: noise schedules, solvers, the compiled step, per-image seeds, images of many seeds."""

from __future__ import annotations

from diffmem.sampling.batches import Samples, sample, sample_batches, to_uint8, worth_compiling
from diffmem.sampling.schedules import Churn, Plan
from diffmem.sampling.seeds import SeededGenerators
from diffmem.sampling.solvers import (
    FAST_STEPS,
    HEUN_STEPS,
    dpmpp_plan,
    dpmpp_sample,
    general_sample,
    heun_plan,
    heun_sample,
    is_compilable,
    is_compiled,
    unipc_plan,
    unipc_sample,
)

__all__ = [
    "FAST_STEPS",
    "HEUN_STEPS",
    "Churn",
    "Plan",
    "Samples",
    "SeededGenerators",
    "dpmpp_plan",
    "dpmpp_sample",
    "general_sample",
    "heun_plan",
    "heun_sample",
    "is_compilable",
    "is_compiled",
    "sample",
    "sample_batches",
    "to_uint8",
    "unipc_plan",
    "unipc_sample",
    "worth_compiling",
]
