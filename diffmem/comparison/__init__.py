"""Against the theoretical optimum: how close a trained network has come to it (`compare`), and how far its regularized
variants are from copying (`sweep`)."""

from __future__ import annotations

from diffmem.comparison.compare import Comparison, Curve, Gaps, NoiseRange, compare
from diffmem.comparison.sweep import Sweep, SweepPoint, parse_sweep, sweep

__all__ = [
    "Comparison",
    "Curve",
    "Gaps",
    "NoiseRange",
    "Sweep",
    "SweepPoint",
    "compare",
    "parse_sweep",
    "sweep",
]
