"""Against the theoretical optimum: how close a trained network has come to it (`compare`), and how far its regularized
variants are from copying (`sweep`)."""

from __future__ import annotations

from diffmem.studies.comparison.gaps import Comparison, Curve, Gaps, NoiseRange, compare
from diffmem.studies.comparison.gaps_report import draw_scores
from diffmem.studies.comparison.sweeps import Sweep, SweepPoint, parse_sweep, sweep
from diffmem.studies.comparison.sweeps_report import draw as draw_sweeps

__all__ = [
    "Comparison",
    "Curve",
    "Gaps",
    "NoiseRange",
    "Sweep",
    "SweepPoint",
    "compare",
    "draw_scores",
    "draw_sweeps",
    "parse_sweep",
    "sweep",
]
