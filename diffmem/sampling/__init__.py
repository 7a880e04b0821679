"""Sampling: noise schedules, solvers, the compiled step, per-image seeds, images of many seeds."""

from __future__ import annotations

from diffmem.sampling.batches import Samples, sample, sample_batches, to_uint8
from diffmem.sampling.seeds import SeededGenerators
from diffmem.sampling.solvers import dpmpp_sample, general_sample, heun_sample

__all__ = [
    "Samples",
    "SeededGenerators",
    "dpmpp_sample",
    "general_sample",
    "heun_sample",
    "sample",
    "sample_batches",
    "to_uint8",
]
