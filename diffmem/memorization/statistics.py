"""Honest uncertainty for shares of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import exp, inf, lgamma, log, log1p, nan, sqrt
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np

from diffmem.errors import InputError
from diffmem.html_report import percent, percent_range


class CoversMisses(Protocol):
    """What knows an interval that also covers what a search may have missed."""

    def interval(self, confidence: float = 0.95) -> tuple[float, float]: ...


@dataclass(frozen=True)
class CopyRate:
    """How many of some images are copies, and what that says of the share of copies among all such images.

    Attributes:
        count: Number of copies.
        total: Number of images.
        verification: What is known of the copies that a search may have missed or invented (`Verification`); its
            interval is that of the share. None: the search was exact.

    Raises:
        InputError: Unless 0 ≤ count ≤ total.

    Example:
        >>> rate = CopyRate(3, 400)
        >>> rate.ratio
        0.0075
        >>> print(rate)
        3 of 400: 0.75 % (95 % interval 0.26 % to 2.18 %)
    """

    count: int
    total: int
    verification: CoversMisses | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.total:
            raise InputError(f"no rate: {self.count} of {self.total} images")

    @classmethod
    def of(cls, memorized: np.ndarray, verification: CoversMisses | None = None) -> CopyRate:
        """Of the verdicts about images, bool [n]."""
        return cls(int(memorized.sum()), len(memorized), verification)

    @property
    def ratio(self) -> float:
        """count / total; NaN where there are no images."""
        return self.count / self.total if self.total else nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share: Wilson's, or the wider one that covers what the search may have missed."""
        if self.verification is not None:
            return self.verification.interval()
        return wilson_interval(self.count, self.total)

    @property
    def exact_interval(self) -> tuple[float, float]:
        """The 95 % interval of Clopper and Pearson."""
        return exact_interval(self.count, self.total)

    @property
    def anytime_interval(self) -> tuple[float, float]:
        """A 95 % interval that holds where it was decided by what was seen when to stop."""
        return anytime_interval(self.count, self.total)

    def to_dict(self) -> dict[str, Any]:
        """count, total, ratio and interval in plain JSON types."""
        return {"count": self.count, "total": self.total, "ratio": self.ratio, "interval": list(self.interval)}

    def __str__(self) -> str:
        if not self.total:
            return "no images"
        of = f"{self.count:,} of {self.total:,}"
        return f"{of}: {percent(self.ratio)} (95 % interval {percent_range(self.interval)})"


class ReportsRate(ABC):
    """A result with a `rate`, whose figures it shows as its own."""

    @property
    @abstractmethod
    def rate(self) -> CopyRate:
        """How many images are copies."""

    @property
    def count(self) -> int:
        """Number of copies."""
        return self.rate.count

    @property
    def total(self) -> int:
        """Number of images audited."""
        return self.rate.total

    @property
    def ratio(self) -> float:
        """The memorization ratio, count / total (the paper's R_mem)."""
        return self.rate.ratio

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the ratio: Wilson's; wider where the search may have missed neighbors."""
        return self.rate.interval


def _check_interval(count: int, total: int, confidence: float) -> None:
    if not (0 <= count <= total and total >= 1 and 0 < confidence < 1):
        raise InputError(f"no interval for {count} of {total} images at confidence {confidence}")


def wilson_interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a share of `count` out of `total`.

    (p̂ + z²/2n ± z √(p̂(1 − p̂)/n + z²/4n²)) / (1 + z²/n), p̂ = count/n, z the normal quantile (Wilson 1927).
    Unlike p̂ ± z·s.e. it keeps its coverage near 0 and 1, where memorization ratios live.

    Args:
        count: Number of images that are copies.
        total: Number of images.
        confidence: With which the interval holds the true share.

    Returns:
        (low, high).

    Raises:
        InputError: Unless 0 ≤ count ≤ total, total ≥ 1 and 0 < confidence < 1.
    """
    _check_interval(count, total, confidence)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = count / total
    center = share + z * z / (2 * total)
    half = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At the ends the formula gives 0 and 1 exactly, up to rounding.
    low = 0.0 if count == 0 else (center - half) / scale
    high = 1.0 if count == total else (center + half) / scale
    return low, high


def anytime_interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """An interval of a share that may be looked at after every image: over a whole sequence of looks it misses the true
    share with probability 1 − confidence at most, whenever and for whatever reason one stops.

    {p : B(½ + k, ½ + n − k) / B(½, ½) < p^k (1 − p)^(n−k) / α}, k = count, n = total, α = 1 − confidence, B the beta
    function: the mixture martingale of Robbins (1970) with Jeffreys' prior and Ville's inequality. About 1.6 times as
    wide as Wilson's at some hundred images; nothing is known, (0, 1), where total is 0.

    Args:
        count: Number of images that are copies.
        total: Number of images.
        confidence: With which the interval holds the true share.

    Returns:
        (low, high).

    Raises:
        InputError: Unless 0 ≤ count ≤ total and 0 < confidence < 1.
    """
    if not (0 <= count <= total and 0 < confidence < 1):
        raise InputError(f"no interval for {count} of {total} images at confidence {confidence}")
    misses = total - count
    evidence = lgamma(count + 0.5) + lgamma(misses + 0.5) - lgamma(total + 1) - 2 * lgamma(0.5)

    def excluded(p: float) -> bool:
        hits_log = count * log(p) if p > 0 else (-inf if count else 0.0)
        misses_log = misses * log1p(-p) if p < 1 else (-inf if misses else 0.0)
        return evidence - hits_log - misses_log >= -log(1 - confidence)

    share = count / total if total else 0.5
    return _edge(excluded, 0.0, share), _edge(excluded, 1.0, share)


def exact_interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of Clopper and Pearson (1934) of a share of `count` out of `total`.

    Each end is the share at which a count as far or farther off has probability (1 − confidence)/2, so that each side
    misses the true share at most that often, for every share and total; Wilson's does so on average only.

    Args:
        count: Number of images that are copies.
        total: Number of images.
        confidence: With which the interval holds the true share.

    Returns:
        (low, high).

    Raises:
        InputError: Unless 0 ≤ count ≤ total, total ≥ 1 and 0 < confidence < 1.
    """
    _check_interval(count, total, confidence)
    side, share = (1 - confidence) / 2, count / total
    # P(X ≥ count) = I_p(count, total − count + 1) and P(X ≤ count) = I_(1−p)(total − count, count + 1).
    low = 0.0 if count == 0 else _edge(lambda p: _beta_cdf(p, count, total - count + 1) <= side, 0.0, share)
    high = 1.0 if count == total else _edge(lambda p: _beta_cdf(1 - p, total - count, count + 1) <= side, 1.0, share)
    return low, high


def highest_interval(
    counts: Iterable[tuple[int, int]],
    confidence: float = 0.95,
    *,
    looks: int | None = None,
    anytime: bool = False,
    verdicts: Sequence[np.ndarray] | None = None,
) -> tuple[float, float]:
    """An interval of the highest of several true shares, such as R_mem of a run, the highest over its snapshots.

    The highest of k estimates is too high on average, and an interval of that estimate alone covers too seldom: with
    20 snapshots of R_mem 0.5, 64 images each, Wilson's covers it in 55 % of cases. Here

        (max_j low_j, max_j high_j),  P(low_j > p_j) ≤ α/2k,  P(high_j < p_j) ≤ α/2,  α = 1 − confidence:

    the lower end must hold for all shares together (Bonferroni), the upper one only for the share that is the highest.
    It covers the highest share with at least the stated confidence whatever the shares are, equal ones included, and
    however the counts depend on each other (snapshots of one run are sampled from the same seeds).

    Where `verdicts` say how they depend, α/2k gives way to the level at which the lower ends of those snapshots that
    may have the highest share hold together: Φ(−c), c the quantile of the maximum of normal deviates correlated as
    their verdicts are (the intersection bounds of Chernozhukov, Lee and Rosen 2013, with the ends of Clopper and
    Pearson). α/20 is spent on leaving out the snapshots that are clearly lower.

    Args:
        counts: (count, total) of each audited snapshot.
        confidence: Confidence of the interval.
        looks: How many snapshots could have been audited, where which ones were depended on what was seen (bisection, a
            run that an answer ends); then both ends hold for all of them together. None: all of `counts`, whatever
            they show.
        anytime: Whether sampling a snapshot stopped with what was seen there; its ends are then those of
            `anytime_interval`, else of `exact_interval`.
        verdicts: Which images are copies, bool [total] per snapshot, of the same seeds in the same order; narrows the
            interval, except where `looks` or `anytime` are given, whose bounds it does not change. None: not known.

    Returns:
        (low, high).

    Raises:
        InputError: No counts, impossible ones, verdicts that do not agree with them, or a confidence outside (0, 1).
    """
    counts = list(counts)
    if not counts:
        raise InputError("counts: none given")
    alpha, k = 1 - confidence, max(len(counts), looks or 0)
    if looks is not None:
        below = above = alpha / k
    elif anytime:
        # Its two sides share one error: what the highest share may spend on either, the others add below only.
        above = alpha if k == 1 else alpha / 2
        below = alpha if k == 1 else alpha / (2 * (k - 1))
    else:
        above, below = alpha, alpha / k
        if verdicts is not None:
            copies = _same_seeds(counts, verdicts)
            if k > 1:
                below, likely = _together(copies, alpha)
                counts = [counts[each] for each in likely]
    interval = anytime_interval if anytime else exact_interval
    # Both ends grow with the count.
    most = {total: max(count for count, n in counts if n == total) for total in {total for _, total in counts}}
    return (
        max(interval(count, total, 1 - below)[0] for total, count in most.items()),
        max(interval(count, total, 1 - above)[1] for total, count in most.items()),
    )


def _same_seeds(counts: Sequence[tuple[int, int]], verdicts: Sequence[np.ndarray]) -> np.ndarray:
    """The verdicts as bool [snapshots, seeds]."""
    if [(int(np.sum(each)), len(each)) for each in verdicts] != list(counts) or len({n for _, n in counts}) > 1:
        raise InputError("verdicts: must be those that were counted, of the same seeds for every snapshot")
    return np.array(verdicts, dtype=bool)


def _together(copies: np.ndarray, alpha: float) -> tuple[float, np.ndarray]:
    """(twice the level of each lower end at which those of the likely snapshots hold together with probability
    1 − α/2, which snapshots may have the highest share), of verdicts [snapshots, seeds]."""
    spent, found = alpha / 20, copies.sum(axis=1)
    # Left out: what is below the best by more than chance explains, by the seeds on which the two differ.
    best = copies[int(np.argmax(found))]
    level = NormalDist().inv_cdf(1 - spent / len(copies))
    behind, unequal = found.max() - found, (copies != best).sum(axis=1)
    likely = np.flatnonzero(behind <= level * np.sqrt(unequal) + 1)
    deviations = copies[likely] - copies[likely].mean(axis=1, keepdims=True)
    # A third of a copy more and less keeps deviations above 0 where all images agree; their correlation is then 0.
    scales = np.sqrt((deviations**2).sum(axis=1) + 1 / 3)
    correlations = (deviations / scales[:, None]) @ (deviations / scales[:, None]).T
    values, vectors = np.linalg.eigh(correlations + np.diag(1 - np.diag(correlations)))
    normal = np.random.default_rng(0).normal(size=(20_000, len(likely)))
    highest = (normal @ (vectors * np.sqrt(np.maximum(values, 0))).T).max(axis=1)
    together = 2 * NormalDist().cdf(-float(np.quantile(highest, 1 - (alpha / 2 - spent))))
    return min(max(together, alpha / len(copies)), alpha), likely


def beta_interval(a: float, b: float, confidence: float = 0.95) -> tuple[float, float]:
    """The central interval of a share that is Beta(a, b) distributed.

    Args:
        a: Above 0.
        b: Above 0.
        confidence: With which the share lies in the interval.

    Returns:
        (low, high).

    Raises:
        InputError: Unless a > 0, b > 0 and 0 < confidence < 1.
    """
    if not (a > 0 and b > 0 and 0 < confidence < 1):
        raise InputError(f"no interval for Beta({a}, {b}) at confidence {confidence}")
    side, middle = (1 - confidence) / 2, a / (a + b)
    low = _edge(lambda p: _beta_cdf(p, a, b) <= side, 0.0, middle)
    return low, _edge(lambda p: _beta_cdf(1 - p, b, a) <= side, 1.0, middle)


def _beta_cdf(x: float, a: float, b: float) -> float:
    """I_x(a, b), the regularized incomplete beta function, by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, its mirror image does not
        return 1 - _beta_cdf(1 - x, b, a)
    # Lentz's method, as modified by Thompson and Barnett, from its second term on.
    value, upper, lower = 1.0, inf, 1.0
    for step in range(1, 10_000):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        lower = 1 / ((1 + term * lower) or 1e-300)
        upper = (1 + term / upper) or 1e-300
        value *= upper * lower
        if abs(upper * lower - 1) < 1e-14:
            break
    front = lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x) - log(a)
    return exp(front) * value


def _edge(excluded: Callable[[float], bool], outside: float, inside: float) -> float:
    """Where a share between `outside` and `inside` starts to be possible, on the side of `outside`."""
    if not excluded(outside):
        return outside
    while abs(outside - inside) > 1e-12:
        middle = (outside + inside) / 2
        if excluded(middle):
            outside = middle
        else:
            inside = middle
    return outside


@dataclass(frozen=True)
class SequentialTest:
    """Is the memorization ratio at least `at_least`? To be answered with `confidence`, after as few images as will do.

    An answer may be sought after every image: the probability that one of the answers is wrong stays below
    1 − confidence (see `anytime_interval`).

    Attributes:
        at_least: The share of copies asked about.
        confidence: Confidence of the answer.

    Raises:
        InputError: A share outside (0, 1] or a confidence outside (0, 1).

    Example:
        >>> test = SequentialTest(at_least=0.9)
        >>> test.answer(0, 20), test.answer(19, 20), test.answer(400, 400)
        (False, None, True)
    """

    at_least: float = 0.9
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not (0 < self.at_least <= 1 and 0 < self.confidence < 1):
            raise InputError(
                f"at_least is {self.at_least} and confidence {self.confidence}, but both must lie between 0 and 1"
            )

    def answer(self, count: int, total: int, of: int | None = None) -> bool | None:
        """Whether the ratio is that high.

        Args:
            count: Number of copies among the images seen so far.
            total: Number of these images.
            of: The images there are in all (10,000 in the protocol): an answer that holds whatever the rest will be is
                certain, and when all are seen there is one. None: the answer is about the model's probability.

        Returns:
            True or False, or None while it is open.
        """
        if of is not None:
            if count >= self.at_least * of:
                return True
            if count + of - total < self.at_least * of:
                return False
        low, high = anytime_interval(count, total, self.confidence)
        if low >= self.at_least:
            return True
        return False if high < self.at_least else None

    @staticmethod
    def of_highest(answers: Iterable[bool | None]) -> bool | None:
        """The answer about the highest of several shares, from the answers about each."""
        answers = list(answers)
        if any(answers):
            return True
        return None if None in answers else False

    def shared_among(self, looks: int) -> SequentialTest:
        """The same question to each of `looks` models: with the confidence that keeps all answers right together
        (Bonferroni)."""
        return SequentialTest(self.at_least, 1 - (1 - self.confidence) / max(looks, 1))
