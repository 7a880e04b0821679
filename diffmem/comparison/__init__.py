"""Against the theoretical optimum: how close a trained network has come to it (`compare`), and how far its regularized
variants are from copying (`sweep`)."""

from __future__ import annotations

from diffmem.comparison.compare_page import draw_memory
from diffmem.comparison.gaps import Comparison, Curve, Gaps, NoiseRange, compare
from diffmem.comparison.sweep_page import draw as draw_sweeps
from diffmem.comparison.sweeps import Sweep, SweepPoint, parse_sweep, sweep

__all__ = [
    "Comparison",
    "Curve",
    "Gaps",
    "NoiseRange",
    "Sweep",
    "SweepPoint",
    "compare",
    "draw_memory",
    "draw_sweeps",
    "parse_sweep",
    "sweep",
]
