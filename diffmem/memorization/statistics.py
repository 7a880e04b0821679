"""Honest uncertainty for shares of images."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist

from diffmem.errors import InputError


def wilson_interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a share of `count` out of `total`.

    (p̂ + z²/2n ± z √(p̂(1 − p̂)/n + z²/4n²)) / (1 + z²/n), p̂ = count/n, z the normal quantile (Wilson 1927).
    Unlike p̂ ± z·s.e. it keeps its coverage near 0 and 1, where memorization ratios live.
    Raises InputError unless 0 ≤ count ≤ total, total ≥ 1 and 0 < confidence < 1.
    """
    if not (0 <= count <= total and total >= 1 and 0 < confidence < 1):
        raise InputError(f"no interval for {count} of {total} images at confidence {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = count / total
    centre = share + z * z / (2 * total)
    half = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At the ends the formula gives 0 and 1 exactly, up to rounding.
    low = 0.0 if count == 0 else (centre - half) / scale
    high = 1.0 if count == total else (centre + half) / scale
    return low, high
