"""The theoretical optimum: the closed-form denoiser of a finite training set, its regularized variants, comparisons."""

from __future__ import annotations

from diffmem.optimum.denoiser import OptimalDenoiser, Weights
from diffmem.optimum.regularized import EmpiricalBayes, Regularization, Smoothed, Tikhonov, parse_regularization

__all__ = [
    "EmpiricalBayes",
    "OptimalDenoiser",
    "Regularization",
    "Smoothed",
    "Tikhonov",
    "Weights",
    "parse_regularization",
]
