"""Intervals for the ratio of two times, by the bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 4000
COVERED = 0.95


def paired(groups: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """The median of log ratios and the ends of its interval, as ratios.

    Args:
        groups: Log ratios of pairs that were measured one right after the other, those of each pair of processes
            together. Processes differ (in where their memory lies, for one), so whole groups are drawn first, and then
            pairs in each.
    """
    rng = np.random.default_rng(0)
    counts = np.array([len(group) for group in groups])
    values = np.full((len(groups), counts.max()), np.nan)
    for row, group in zip(values, groups, strict=True):
        row[: len(group)] = group
    drawn = rng.integers(len(groups), size=(RESAMPLES, len(groups)))[..., None]
    pairs = (rng.random((RESAMPLES, *values.shape)) * counts[drawn]).astype(int)
    resampled = np.where(np.arange(values.shape[1]) < counts[drawn], values[drawn, pairs], np.nan)
    median = np.median if counts.min() == counts.max() else np.nanmedian
    return ends(float(np.nanmedian(values)), median(resampled.reshape(RESAMPLES, -1), axis=1))


def unpaired(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """The ratio of the medians (after / before) and the ends of its interval, of times measured independently."""
    rng = np.random.default_rng(0)
    logs = []
    for times in (before, after):
        array = np.asarray(times, dtype=float)
        logs.append(np.log(np.median(array[rng.integers(len(array), size=(RESAMPLES, len(array)))], axis=1)))
    return ends(float(np.log(np.median(after) / np.median(before))), logs[1] - logs[0])


def ends(middle: float, resampled: np.ndarray) -> tuple[float, float, float]:
    """Percentiles of resampled log ratios, as ratios."""
    low, high = np.quantile(resampled, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(np.exp(middle)), float(np.exp(low)), float(np.exp(high))


def verdict(ratio: float, low: float, high: float, margin: float) -> str:
    """What an interval of the ratio after / before says: slower or faster by more than the margin, the same within it,
    or undecided."""
    if low > 1 + margin:
        return "slower"
    if high < 1 / (1 + margin):
        return "faster"
    return "same" if high <= 1 + margin and low >= 1 / (1 + margin) else "undecided"
