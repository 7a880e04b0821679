"""Optima that do not end in copies: three ways to regularize the score of a finite training set.

Baptista et al., Memorization and Regularization in Generative Diffusion Models, arXiv 2501.15785, in EDM's
parametrization (m = 1). Each takes the exact posterior mean ȳ(x) of noise level s(σ), see `level`, and returns
D(x; σ) = x + σ²·score. Images lie in [-1, 1]; c is a variance and h a standard deviation in these units. As text a
variant is what `parse_regularization` reads: "tikhonov:0.01".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from diffmem.errors import InputError


@dataclass(frozen=True)
class Tikhonov:
    """score = (ȳ − x) / (σ² + c).

    Attributes:
        c: A variance, in the units of [-1, 1]; 0: the exact score.
    """

    c: float

    def __post_init__(self) -> None:
        _check(self, "c", self.c)

    def __str__(self) -> str:
        return f"tikhonov:{self.c:.12g}"

    def level(self, sigma: torch.Tensor) -> torch.Tensor:
        """The noise level whose posterior mean is asked for."""
        return sigma

    def denoised(self, x: torch.Tensor, mean: torch.Tensor, log_sum: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """D(x; σ) [B, d] from the posterior mean [B, d] and log Σ p_i [B] at `level`; sigma [B]."""
        return x + (1 / (1 + self.c / sigma.square()))[:, None] * (mean - x)


@dataclass(frozen=True)
class EmpiricalBayes:
    """score = Σ p_i (y_i − x) / (σ² · max(Σ p_i, τ)), p_i = exp(−‖x − y_i‖² / 2σ²), τ = exp(log_tau).

    In d dimensions Σ p_i is about exp(−d/2) on the way to a copy, far below the smallest float for images: hence the
    logarithm.

    Attributes:
        log_tau: ln τ.
    """

    log_tau: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.log_tau):
            raise InputError("bayes: tau must be positive and finite")

    def __str__(self) -> str:
        return f"bayes:exp({self.log_tau:.12g})"

    def level(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma

    def denoised(self, x: torch.Tensor, mean: torch.Tensor, log_sum: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x + (log_sum - self.log_tau).clamp(max=0).exp()[:, None] * (mean - x)


@dataclass(frozen=True)
class Smoothed:
    """The exact score of the training set with every image widened by a Gaussian of bandwidth h.

    score = (ȳ − x) / (σ² + h²) with ȳ the posterior mean at noise level √(σ² + h²).

    Attributes:
        h: A standard deviation, in the units of [-1, 1].
    """

    h: float

    def __post_init__(self) -> None:
        _check(self, "h", self.h)

    def __str__(self) -> str:
        return f"smooth:{self.h:.12g}"

    def level(self, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma.square() + self.h**2).sqrt()

    def denoised(self, x: torch.Tensor, mean: torch.Tensor, log_sum: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x + (1 / (1 + (self.h / sigma).square()))[:, None] * (mean - x)


Regularization = Tikhonov | EmpiricalBayes | Smoothed
_KINDS: dict[str, Callable[[float], Regularization]] = {
    "tikhonov": Tikhonov,
    "bayes": EmpiricalBayes,
    "smooth": Smoothed,
}


def parse_regularization(text: str) -> Regularization:
    """The variant that a text names.

    Args:
        text: "tikhonov:c", "bayes:tau" or "smooth:h"; tau may be written exp(-1500).

    Raises:
        InputError: It is none of these.

    Example:
        >>> parse_regularization("smooth:0.1")
        Smoothed(h=0.1)
    """
    name, _, value = text.partition(":")
    try:
        if name == "bayes":
            logarithm = re.fullmatch(r"exp\((.*)\)", value)
            return EmpiricalBayes(float(logarithm[1]) if logarithm else math.log(float(value)))
        return _KINDS[name](float(value))
    except (KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{text!r} is not a regularization: give tikhonov:C, bayes:TAU (or bayes:exp(-1500)) or smooth:H, as in "
            "tikhonov:0.1"
        ) from None


def to_json(regularization: Regularization | None) -> dict[str, Any] | None:
    """The variant and its constant in plain JSON types."""
    return None if regularization is None else {"kind": type(regularization).__name__, **asdict(regularization)}


def _check(regularization: Regularization, name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise InputError(f"{type(regularization).__name__.lower()}: {name} is {value}, but must be at least 0")
