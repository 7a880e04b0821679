"""One compilation beforehand."""

from __future__ import annotations

import importlib

from benchmarks.gpu.jobs import IMPLEMENTATIONS, SAMPLER, TRAINING
from benchmarks.gpu.target import Target


def run(target: Target, name: str) -> None:
    """name: of the job, see `jobs`."""
    for variant in (*SAMPLER, *TRAINING):
        for implementation in IMPLEMENTATIONS:
            if variant.compiled and name == f"{variant.name}, {implementation}":
                module = importlib.import_module(f"benchmarks.gpu.{variant.stage}")
                module.compile_variant(variant, implementation, target)
                print(f"compiled: {variant.name}, {implementation}", flush=True)
