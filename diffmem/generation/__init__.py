"""Runs of a sampler: many seeds to one file, resumed where they stopped, shared among ranks, audited as they go."""

from __future__ import annotations

from diffmem.generation.kept import work_folder
from diffmem.generation.run import Generated, generate
from diffmem.generation.running_audit import RunningAudit, sample_detector
from diffmem.generation.seed_ranges import checked_seeds, format_seeds, parse_seeds

__all__ = [
    "Generated",
    "RunningAudit",
    "checked_seeds",
    "format_seeds",
    "generate",
    "parse_seeds",
    "sample_detector",
    "work_folder",
]
