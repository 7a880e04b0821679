"""Intervals of means over images and of what is made of them: the percentile bootstrap (Efron 1979)."""

from __future__ import annotations

import hashlib

import numpy as np

SAMPLES = 1000


def resampled(count: int, kind: str) -> np.ndarray:
    """The weights of `count` images in each of the bootstrap samples, float64 [SAMPLES, count]: `weights @ values` are
    the samples' means. The same for the same arguments; sets of another `kind` are resampled independently."""
    seed = int.from_bytes(hashlib.sha256(f"{kind} {count}".encode()).digest()[:8], "little")
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), SAMPLES) / count


def interval(draws: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The lower and upper ends of the central interval of the samples [SAMPLES, …]; NaN where one of them is NaN."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(draws, [tail, 100 - tail], axis=0)
    return low, high
