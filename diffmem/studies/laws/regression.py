"""Exponents of power laws: log τ = a_r + b·log N over runs, some of which never got there (censored).

Every repetition r has an intercept of its own, for its runs share the order of the images and the seed: b is what runs
of one repetition say about each other. Where all τ are known this is least squares. Else it is the likelihood of a
normal error, in which a run that ended before its onset counts with the probability that its onset lies beyond its end,
and one that was past it at its first look with that of lying before (Tobin 1958).

Intervals are of Student's t. For least squares with n runs and ν degrees of freedom, twice the log of the likelihood
ratio of b against b₀ is exactly n·ln(1 + t²/ν), t = (b − b₀) / s.e.; with censored runs the same equation, n being the
runs that are not censored, defines t. So both have one form, and a few runs do not get the intervals of many.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from diffmem.studies.analysis import ALPHA, student

_REACH = 40.0  # of the exponent: where the likelihood does not close an interval, it ends here
_LEAST_SPREAD = 1e-3


@dataclass(frozen=True)
class Time:
    """When something happened in a run, in log time.

    Attributes:
        size: N.
        repetition: Of the run.
        low: log τ is at least this; −∞ where it had happened at the first look.
        high: And at most this; ∞ where it had not happened by the end. Both are log τ where that is known.
        error: Its standard error, of the noise of sampling.
    """

    size: int
    repetition: int
    low: float
    high: float
    error: float = 0.0

    @property
    def known(self) -> bool:
        return self.low == self.high

    @property
    def value(self) -> float:
        """τ, in the units of the times; a bound where it is censored."""
        return math.exp(self.low if math.isfinite(self.low) else self.high)


@dataclass(frozen=True, eq=False)
class Exponent:
    """b of log τ = a_r + b·log N.

    Attributes:
        times: The runs it rests on.
        estimate: b.
        intercepts: a_r by repetition.
        spread: Standard deviation of log τ about the line.
        freedom: Degrees of freedom, of the runs that are not censored.
    """

    times: tuple[Time, ...]
    estimate: float
    intercepts: dict[int, float]
    spread: float
    freedom: int
    _model: _Model = field(repr=False)

    @property
    def censored(self) -> int:
        """How many of the runs are censored."""
        return sum(not time.known for time in self.times)

    def t(self, exponent: float) -> float:
        """Student's t of the hypothesis that b is `exponent`; negative where the estimate is below."""
        return self._model.t(exponent)

    def p_above(self, exponent: float) -> float:
        """Of b ≤ `exponent`, one-sided: small where b is shown to be above."""
        from scipy.special import stdtr  # scikit-learn brings it

        return float(stdtr(self.freedom, -self.t(exponent)))

    def p_below(self, exponent: float) -> float:
        """Of b ≥ `exponent`, one-sided."""
        return 1 - self.p_above(exponent)

    def p_within(self, low: float, high: float) -> float:
        """Of b outside low … high: the larger of two one-sided tests."""
        return max(self.p_above(low), self.p_below(high))

    def p_beyond(self, low: float, high: float) -> float:
        """Of b within low … high, two-sided."""
        return min(1.0, 2 * min(self.p_below(low), self.p_above(high)))

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """The interval of confidence 1 − alpha."""
        return self._model.interval(student(1 - alpha / 2, self.freedom))

    def slopes(self) -> dict[int, float]:
        """b of each repetition alone, where none of its runs is censored and there are two sizes."""
        found = {}
        for repetition in self.intercepts:
            own = [time for time in self.times if time.repetition == repetition]
            if len({time.size for time in own}) > 1 and all(time.known for time in own):
                x = np.log([time.size for time in own])
                found[repetition] = float(np.polyfit(x, [time.low for time in own], 1)[0])
        return found


def exponent(times: Sequence[Time]) -> Exponent | None:
    """b from the times of runs; None where there are not enough of them: at least one degree of freedom, and two sizes
    in some repetition.

    Args:
        times: One per run.
    """
    known = {time.repetition for time in times if time.known}
    # A repetition without any onset says nothing of b but through the spread: its intercept takes what it has.
    used = tuple(time for time in times if time.repetition in known)
    groups = sorted(known)
    sizes = {group: {time.size for time in used if time.repetition == group and time.known} for group in groups}
    freedom = sum(time.known for time in used) - len(groups) - 1
    if freedom < 1 or all(len(each) < 2 for each in sizes.values()):
        return None
    model: _Model = (_Likelihood if any(not time.known for time in used) else _LeastSquares)(used, groups, freedom)
    b, intercepts, spread = model.best
    return Exponent(used, b, dict(zip(groups, intercepts, strict=True)), spread, freedom, model)


def expected_reach(sizes: Sequence[int], repetitions: int, spread: float = 0.15, alpha: float = ALPHA) -> float:
    """How far the interval of an exponent will reach to each side, when no run is censored; infinite without a degree
    of freedom.

    Args:
        sizes: N of each repetition's runs.
        repetitions: How many there will be.
        spread: Of log τ about its line; 0.15 is that of first runs on digits.
        alpha: One minus the confidence.
    """
    x = np.log(sizes)
    freedom = repetitions * (len(x) - 1) - 1
    squares = repetitions * float(np.square(x - x.mean()).sum())
    if freedom < 1 or squares == 0:
        return math.inf
    return student(1 - alpha / 2, freedom) * spread / math.sqrt(squares)


class _Model(ABC):
    """b, the intercepts and the spread that fit best, and how much worse others do."""

    def __init__(self, times: Sequence[Time], groups: Sequence[int], freedom: int) -> None:
        self.x = np.log([time.size for time in times])
        self.group = np.array([groups.index(time.repetition) for time in times])
        self.low, self.high = (np.array([getattr(time, end) for time in times]) for end in ("low", "high"))
        self.known = self.low == self.high
        self.noise = math.sqrt(np.mean([time.error**2 for time in times if time.known]))
        self.groups, self.freedom = len(groups), freedom

    @property
    @abstractmethod
    def best(self) -> tuple[float, np.ndarray, float]:
        """(b, the intercepts, the spread)."""

    @abstractmethod
    def t(self, exponent: float) -> float:
        """How many standard errors `best` lies above `exponent`."""

    @abstractmethod
    def interval(self, t: float) -> tuple[float, float]:
        """The exponents whose |t| is at most `t`."""


class _LeastSquares(_Model):
    @cached_property
    def _fit(self) -> tuple[float, np.ndarray, float, float]:
        """(b, the intercepts, the spread, the standard error of b)."""
        means = [np.array([each[self.group == g].mean() for g in range(self.groups)]) for each in (self.x, self.low)]
        x, y = self.x - means[0][self.group], self.low - means[1][self.group]
        b = float(x @ y / (x @ x))
        spread = math.sqrt(float(np.square(y - b * x).sum()) / self.freedom)
        # Runs that lie on a line by luck are still no more certain than their own noise of sampling.
        error = max(spread, self.noise) / math.sqrt(float(x @ x))
        return b, means[1] - b * means[0], spread, error

    @property
    def best(self) -> tuple[float, np.ndarray, float]:
        return self._fit[:3]

    def t(self, exponent: float) -> float:
        b, _, _, error = self._fit
        if error == 0:
            return math.copysign(math.inf, b - exponent) if b != exponent else 0.0
        return (b - exponent) / error

    def interval(self, t: float) -> tuple[float, float]:
        b, _, _, error = self._fit
        return b - t * error, b + t * error


class _Likelihood(_Model):
    """In the terms γ = 1 / spread and δ = intercept · γ the loss is convex (Olsen 1978)."""

    def _loss(self, values: np.ndarray, b: float) -> tuple[float, np.ndarray]:
        """Minus the log likelihood at δ and γ, and its gradient."""
        from scipy.special import log_ndtr

        delta, gamma = values[:-1], values[-1]
        right, left = ~np.isfinite(self.high), ~np.isfinite(self.low)
        ends = np.where(left, self.high, self.low) - b * self.x
        z = gamma * ends - delta[self.group]
        known = z[self.known]
        loss = float(0.5 * known @ known) - len(known) * math.log(gamma)
        slope = np.where(self.known, z, 0.0)  # of the loss, along z
        for rows, sign in ((right, -1.0), (left, 1.0)):
            logs = log_ndtr(sign * z[rows])
            loss -= float(logs.sum())
            slope[rows] = -sign * np.exp(-0.5 * z[rows] ** 2 - 0.5 * math.log(2 * math.pi) - logs)
        gradient = np.append(-np.bincount(self.group, slope, self.groups), slope @ ends - len(known) / gamma)
        return loss, gradient

    def _profile(self, b: float) -> tuple[float, np.ndarray]:
        """The least loss at this b, and the δ and γ where it lies."""
        from scipy.optimize import minimize

        ends = np.where(np.isfinite(self.low), self.low, self.high) - b * self.x
        start = np.array([ends[self.group == g].mean() for g in range(self.groups)])
        most = 1 / max(self.noise, _LEAST_SPREAD)
        gamma = min(most, 1 / max(float((ends - start[self.group]).std()), 1e-9))
        bounds = [(None, None)] * self.groups + [(1e-6, most)]
        found = minimize(self._loss, np.append(start * gamma, gamma), (b,), "L-BFGS-B", jac=True, bounds=bounds)
        return float(found.fun), found.x

    @cached_property
    def _fit(self) -> tuple[float, float, np.ndarray]:
        """(b, the least loss, its δ and γ)."""
        from scipy.optimize import minimize_scalar

        b = float(minimize_scalar(lambda b: self._profile(b)[0], bracket=(0.5, 1.5), options={"xtol": 1e-5}).x)
        return b, *self._profile(b)

    @property
    def best(self) -> tuple[float, np.ndarray, float]:
        b, _, values = self._fit
        return b, values[:-1] / values[-1], float(1 / values[-1])

    def t(self, exponent: float) -> float:
        b, least, _ = self._fit
        ratio = max(0.0, 2 * (self._profile(exponent)[0] - least)) / int(self.known.sum())
        return math.copysign(math.sqrt(self.freedom * math.expm1(min(ratio, 500.0))), b - exponent)

    def interval(self, t: float) -> tuple[float, float]:
        return self._end(-1.0, t), self._end(1.0, t)

    def _end(self, direction: float, t: float) -> float:
        """Where |t| passes `t` in that direction; infinite where no exponent is excluded."""
        from scipy.optimize import brentq

        b, inside, reach = self._fit[0], 0.0, 0.1
        while abs(self.t(b + direction * reach)) < t:
            inside, reach = reach, 2 * reach
            if reach > _REACH:
                return direction * math.inf
        found = brentq(lambda step: abs(self.t(b + direction * step)) - t, inside, reach, xtol=1e-4)
        return b + direction * float(found)
