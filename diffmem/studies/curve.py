"""What runs at some sizes N say about the curve of R_mem over N, and so about EMM: a posterior on a grid.

The share of copies of a run on N images is R, with

    logit R = logit(1 − ζ) + h(x₀ + s·(ln EMM − ln N) + τz),

s > 0 the steepness at EMM, τz how a run deviates, and h the shape, of slope 1 at 0 (the bends of Stukel 1988, about the
crossing): with a bend of its own on either side it is a line (the logistic curve), grows exponentially (as probit and
the log-log curves do on their short sides) or logarithmically (heavy tails, as those of the Cauchy distribution, and
plateaus). z is normal, or Student's t with 2.5 degrees of freedom (runs of which some are far off), or normal but for
one run in ten that fails. x₀ is what makes the expected R at N = EMM just 1 − ζ. All but EMM is integrated over, so
that an interval of EMM covers what is not known of the rest: the noise of sampling (binomial), that between runs, the
shape of the curve between the sizes that were tried, and how much higher a run's best snapshot looks than it is.
`python -m benchmarks emm` measures its coverage on curves that are none of these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np

from diffmem.errors import InputError

_STEP = 0.1
_ETA = _STEP * np.arange(-100, 101)
_STEEPNESS = np.exp(np.linspace(math.log(0.25), math.log(20.0), 13))
_SPREADS = np.array([0.08, 0.18, 0.31, 0.5, 0.8, 1.3, 2.2])
_FREEDOM = 2.5  # of Student's t, for deviations of which some are large
_FAILING, _FAILED = 0.1, (0.5, 7.0)  # the share of runs that fail, and how much lower these lie
_ABOVE = np.array([-1.8, -0.4, 0.15])  # bends where R is above 1 − ζ
_BELOW = np.array([-0.35, 0.0, 0.3, 0.8])  # and below
# Prior: ln s normal around ln 3 (the paper's curves have 2 to 4), τ half Student's t, deviations and bends as weighed.
_PRIOR_STEEPNESS, _PRIOR_SPREAD, _PRIOR_KINDS = (math.log(3.0), 0.7), (0.4, 5.0), (0.64, 0.33, 0.03)
_PRIOR_ABOVE, _PRIOR_BELOW = np.array([0.15, 0.4, 0.45]), np.array([0.15, 0.4, 0.3, 0.15])
_ALIKE = 0.8  # that the snapshots which cannot be told from a run's best are as good as it
_BEYOND = 1.5  # how far EMM may lie outside the sizes that can be tried, in ln N
_FINE_STEEPNESS = 9  # points over ln s, the second time
_POINTS = (48, 64)  # of the grid over ln EMM, the first and the second time that it is laid


@dataclass(frozen=True)
class Observation:
    """One run: `count` copies among `total` images of its best snapshot, trained on `size` images. censored: it was
    ended when the answer was yes, so that its R_mem is at least what was seen. alike: the share of copies if the
    snapshots that cannot be told from the best are as good as it; None where there are none."""

    size: int
    count: float
    total: int
    censored: bool = False
    alike: float | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.count <= self.total or self.total < 1:
            raise InputError(f"{self.count} copies of {self.total} images on {self.size} training images is impossible")

    @staticmethod
    def of_snapshots(size: int, counts: Sequence[tuple[int, int]], censored: bool = False) -> Observation:
        """A run whose snapshots had these (count, total)."""
        count, total = max(counts, key=lambda each: (each[0] / each[1], each[1]))
        near = [each for each in counts if _indistinct(each, (count, total))]
        alike = sum(found for found, _ in near) / sum(images for _, images in near) if len(near) > 1 else None
        return Observation(size, count, total, censored, None if alike == count / total else alike)


def _indistinct(one: tuple[int, int], best: tuple[int, int]) -> bool:
    """Whether two shares differ by less than 2.5 standard errors."""
    share = (one[0] + best[0] + 1) / (one[1] + best[1] + 2)
    error = math.sqrt(share * (1 - share) * (1 / one[1] + 1 / best[1]))
    return best[0] / best[1] - one[0] / one[1] <= 2.5 * error


class Posterior:
    """What observations say of EMM, which may lie in low … high or up to a factor of 4.5 beyond.

    zeta: EMM is the size at which the expected R_mem is 1 − zeta.
    """

    def __init__(self, observations: Sequence[Observation], low: float, high: float, zeta: float = 0.1) -> None:
        if not 0 < zeta < 1:
            raise InputError(f"zeta is {zeta}, but must lie between 0 and 1")
        if not 1 <= low < high:
            raise InputError(f"sizes from {low} to {high}: the first must be at least 1 and below the second")
        self.zeta = zeta
        # R_mem is a run's highest of several estimates and too high on average, the more so the less its snapshots
        # differ. So twice as many columns: either the best snapshot alone counts, or those that may be as good do.
        self._views = (False, True) if any(seen.alike is not None for seen in observations) else (False,)
        self._steepness, self._columns = _STEEPNESS, np.arange(len(_TAUS) * len(self._views))
        self.log_sizes = _sizes(low, high)
        self._weigh(_coarse(tuple(observations), low, high, zeta, self._views).copy())
        if observations:
            # Once more, finer, where EMM may lie, and without what weighs nothing.
            heights = np.cumsum(self.marginal)
            first, last = np.searchsorted(heights, [1e-4, 1 - 1e-4])
            ends = self.log_sizes[max(first - 1, 0)], self.log_sizes[min(last + 1, _POINTS[0] - 1)]
            self.log_sizes = np.linspace(*ends, _POINTS[1])
            likely = _STEEPNESS[_heavy(self._weights.sum((0, 2)))]
            step = math.sqrt(_STEEPNESS[1] / _STEEPNESS[0])
            self._steepness = np.geomspace(likely[0] / step, likely[-1] * step, _FINE_STEEPNESS)
            self._columns = _heavy(self._weights.sum((0, 1)))
            self._weigh(self._logs(observations))

    def _logs(self, observations: Sequence[Observation]) -> np.ndarray:
        """ln of the weights over the grid of ln EMM, and of those s and columns that count."""
        tables: dict[int, np.ndarray] = {}  # of a size: what is looked up at the same points is added before
        for seen in observations:
            table = _tables(seen, self.zeta, self._views)[:, self._columns]
            tables[seen.size] = tables[seen.size] + table if seen.size in tables else table
        prior = _log_prior(self._steepness, self._views)[:, self._columns]
        logs = np.repeat(prior[None], len(self.log_sizes), axis=0)
        for size, table in tables.items():
            shift = self.log_sizes - math.log(size)
            _add_looked_up(logs, table, shift[:, None] * self._steepness)
        return logs

    def _weigh(self, logs: np.ndarray) -> None:
        # Each of two views keeps its weight: how well a curve fits would hardly say which one is right.
        between = np.searchsorted(self._columns, len(_TAUS))
        parts = (logs,) if len(self._views) == 1 else (logs[..., :between], logs[..., between:])
        for part, weight in zip(parts, _weights_of(self._views), strict=True):
            part -= part.max()
            np.exp(part, out=part)
            part *= weight / part.sum(dtype=np.float64)
        self._weights = logs
        self.marginal = self._weights.sum(axis=(1, 2), dtype=np.float64)

    def quantile(self, probability: float) -> float:
        """The size below which EMM lies with this probability."""
        heights = np.cumsum(self.marginal) - self.marginal / 2
        return math.exp(np.interp(probability, heights, self.log_sizes))

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The central interval of EMM."""
        return self.quantile((1 - confidence) / 2), self.quantile((1 + confidence) / 2)

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def below(self, size: float) -> float:
        """The probability that EMM is below `size`."""
        return float(np.interp(math.log(size), self.log_sizes, np.cumsum(self.marginal) - self.marginal / 2))

    def curve(self, sizes: Sequence[float] | np.ndarray, confidence: float = 0.95) -> np.ndarray:
        """[len(sizes), 3]: lower end, median and upper end of the expected R_mem at each size."""
        rows = []
        # Most points of the grid weigh nothing: together those left out have less than 1e-9.
        emm, steepness, column = places = np.nonzero(self._weights > 1e-9 / self._weights.size)
        weights = self._weights[places]
        means = _means(self.zeta)[:, self._columns % len(_TAUS)]
        for size in sizes:
            at, share = _position((self.log_sizes[emm] - math.log(size)) * self._steepness[steepness])
            expected = means[at, column] * (1 - share) + means[at + 1, column] * share
            order = np.argsort(expected)
            heights = np.cumsum(weights[order], dtype=np.float64)
            wanted = ((1 - confidence) / 2, 0.5, (1 + confidence) / 2)
            rows.append([expected[order[min(int(np.searchsorted(heights, each)), len(order) - 1)]] for each in wanted])
        return np.array(rows)

    @property
    def steepness(self) -> float:
        """Posterior mean of s, geometric."""
        weights = self._weights.sum(axis=(0, 2), dtype=np.float64)
        return math.exp((weights * np.log(self._steepness)).sum())

    @property
    def spread(self) -> float:
        """Posterior mean of τ."""
        return float((self._weights.sum(axis=(0, 1), dtype=np.float64) * _TAUS[self._columns % len(_TAUS)]).sum())


def _sizes(low: float, high: float) -> np.ndarray:
    """The first grid of ln EMM."""
    return np.linspace(math.log(low) - _BEYOND, math.log(high) + _BEYOND, _POINTS[0])


@lru_cache(maxsize=4)
def _coarse(
    observations: tuple[Observation, ...], low: float, high: float, zeta: float, views: tuple[bool, ...]
) -> np.ndarray:
    """ln of the weights over the first grid: [EMM, s, column]. A search asks for it run after run."""
    if not observations:
        return np.repeat(_log_prior(_STEEPNESS, views)[None], _POINTS[0], axis=0)
    logs, last = _coarse(observations[:-1], low, high, zeta, views).copy(), observations[-1]
    shift = _sizes(low, high) - math.log(last.size)
    _add_looked_up(logs, _tables(last, zeta, views), shift[:, None] * _STEEPNESS)
    return logs


def _heavy(weights: np.ndarray) -> np.ndarray:
    """Which of some weights that sum to 1 count; the others together are less than 0.002."""
    return np.flatnonzero(weights > 2e-3 / len(weights))


# Columns of the tables: every kind of deviation with every τ, and within it every shape.
_SHAPES = [(above, below) for above in range(len(_ABOVE)) for below in range(len(_BELOW))]
_TAUS = np.repeat(np.tile(_SPREADS, len(_PRIOR_KINDS)), len(_SHAPES))


def _bent(x: np.ndarray, bend: float) -> np.ndarray:
    """h at x ≥ 0."""
    if bend > 0:
        return np.expm1(np.minimum(bend * x, 50.0)) / bend
    return np.log1p(-bend * x) / -bend if bend < 0 else x


@cache
def _links(zeta: float) -> np.ndarray:
    """R by x, which is 0 where R is 1 − ζ: [shape, x]."""
    middle, ahead, behind = math.log((1 - zeta) / zeta), np.maximum(_ETA, 0), np.maximum(-_ETA, 0)
    logits = [middle + _bent(ahead, _ABOVE[above]) - _bent(behind, _BELOW[below]) for above, below in _SHAPES]
    return 1 / (1 + np.exp(-np.clip(logits, -60, 36)))


@cache
def _smoothing() -> np.ndarray:
    """The densities of the deviations as matrices over x: [kind, τ and x, x]."""
    points = len(_ETA)
    distances = _STEP * np.arange(1 - points, points) / _SPREADS[:, None]
    normal = np.exp(-0.5 * distances**2)
    heavy = (1 + distances**2 / _FREEDOM) ** (-(_FREEDOM + 1) / 2)
    offsets = _STEP * np.arange(1 - points, points)
    failed = (offsets > _FAILED[0]) & (offsets < _FAILED[1])
    failing = (1 - _FAILING) * normal / normal.sum(axis=1, keepdims=True) + _FAILING * failed / failed.sum()
    densities = np.concatenate([normal, heavy, failing])
    weights = densities[:, np.arange(points)[:, None] - np.arange(points) + points - 1]
    return (weights / weights.sum(axis=2, keepdims=True)).astype(np.float32).reshape(-1, points)


def _averaged(values: np.ndarray) -> np.ndarray:
    """The mean over runs, for every kind of deviation and τ, of what is given as [shape, x]: [kind and τ, shape, x]."""
    # Likelihoods are 0 but for a part of the grid.
    there = np.flatnonzero(values.max(axis=0) > 1e-12)
    part = slice(there[0], there[-1] + 1)
    points = len(_ETA)
    means = _smoothing()[:, part] @ values[:, part].T.astype(np.float32)
    return means.reshape(-1, points, len(values)).transpose(0, 2, 1)


@cache
def _crossings(zeta: float) -> np.ndarray:
    """x₀, where the expected R is 1 − ζ: [kind and τ, shape]."""
    return np.array([[np.interp(1 - zeta, row, _ETA) for row in rows] for rows in _averaged(_links(zeta))])


def _centered(averages: np.ndarray, zeta: float) -> np.ndarray:
    """Averages [kind and τ, shape, x] shifted so that EMM is at 0, as [x, column]."""
    at, share = _shifted(zeta)
    averages = averages.reshape(-1, len(_ETA))
    before, after = np.take_along_axis(averages, at, 1), np.take_along_axis(averages, at + 1, 1)
    return np.ascontiguousarray((before + (after - before) * share).T, np.float32)


@cache
def _shifted(zeta: float) -> tuple[np.ndarray, np.ndarray]:
    """Where x + x₀ lies on the grid, as `_position`: [column, x]."""
    return _position(_ETA[None] + _crossings(zeta).reshape(-1, 1))


@cache
def _means(zeta: float) -> np.ndarray:
    """The expected R over runs: [x, column]."""
    return _centered(_averaged(_links(zeta)), zeta)


def _weights_of(views: tuple[bool, ...]) -> tuple[float, ...]:
    return (1.0,) if len(views) == 1 else (1 - _ALIKE, _ALIKE)


def _log_prior(steepness: np.ndarray, views: tuple[bool, ...]) -> np.ndarray:
    """At some s, for the columns of every view: [s, column], unnormalized."""
    mean, deviation = _PRIOR_STEEPNESS
    columns = np.tile(_prior_of_columns(), len(views))
    return (-0.5 * ((np.log(steepness[:, None]) - mean) / deviation) ** 2 + columns).astype(np.float32)


@cache
def _prior_of_columns() -> np.ndarray:
    """ln, unnormalized; the widths of the cells over τ differ."""
    scale, freedom = _PRIOR_SPREAD
    spread = -(freedom + 1) / 2 * np.log1p((_SPREADS / scale) ** 2 / freedom) + np.log(np.gradient(_SPREADS))
    shape = np.array([math.log(_PRIOR_ABOVE[above] * _PRIOR_BELOW[below]) for above, below in _SHAPES])
    spreads = np.concatenate([spread + math.log(kind) for kind in _PRIOR_KINDS])
    return (spreads[:, None] + shape).ravel()


def _tables(seen: Observation, zeta: float, views: tuple[bool, ...]) -> np.ndarray:
    """The table of an observation, and where there is a second view, that of it."""
    alone = replace(seen, alike=None)
    if views == (False,):
        return _table(alone, zeta)
    alike = alone if seen.alike is None else replace(alone, count=seen.alike * seen.total)
    return np.concatenate([_table(alone, zeta), _table(alike, zeta)], axis=1)


@lru_cache(maxsize=128)
def _table(seen: Observation, zeta: float) -> np.ndarray:
    """ln of the observation's likelihood, averaged over z: [x, column]."""
    shares = np.clip(_links(zeta), 1e-300, 1 - 1e-16)
    # More images than make the noise of sampling one step of the grid over x add nothing beside that between runs.
    share = (seen.count + 0.5) / (seen.total + 1)
    effective = min(1.0, 1 / (seen.total * share * (1 - share) * _STEP**2))
    hits, misses = seen.count * effective, (seen.total - seen.count) * effective
    if seen.censored:
        likelihood = _at_least(hits, misses, shares)
    else:
        peak = seen.count / seen.total
        best = (hits * math.log(peak) if hits else 0.0) + (misses * math.log(1 - peak) if misses else 0.0)
        likelihood = np.exp(hits * np.log(shares) + misses * np.log1p(-shares) - best)
    return np.log(np.maximum(_centered(_averaged(likelihood), zeta), 1e-30))


def _at_least(hits: float, misses: float, shares: np.ndarray) -> np.ndarray:
    """The probability that a share drawn from Beta(hits + 1, misses + 1) is at most each of `shares`."""
    grid = np.linspace(0, 1, 20_001)[1:-1]
    density = hits * np.log(grid) + misses * np.log1p(-grid)
    heights = np.cumsum(np.exp(density - density.max()))
    return np.interp(shares, grid, heights / heights[-1], left=0.0, right=1.0)


def _position(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where x lies on the grid: the index of the point before it, and the part of the step after that."""
    position = np.clip((x - _ETA[0]) / _STEP, 0, len(_ETA) - 1.000001)
    index = position.astype(np.intp)
    return index, (position - index).astype(np.float32)


def _add_looked_up(logs: np.ndarray, table: np.ndarray, x: np.ndarray) -> None:
    """Adds the table [x, column] at x [EMM, s], linear between its points, to `logs` [EMM, s, column]."""
    index, share = _position(x)
    rows = max(1, 100_000 // logs[0].size)  # pieces that the cache holds
    for first in range(0, len(logs), rows):
        piece = slice(first, first + rows)
        before, after = table[index[piece]], table[index[piece] + 1]
        after -= before
        after *= share[piece, :, None]
        before += after
        logs[piece] += before
