"""What runs at some sizes N say about the curve of R_mem over N, and so about EMM: a posterior on a grid.

The share of copies of a run on N images is R = link(η + τz), z normal and new for every run, with

    η = x₀ − s·(ln N − ln EMM),   link(η) = (1 / (1 + e^−η))^ν,

s > 0 the steepness, τ the spread between runs, ν the asymmetry (1: the logistic curve; the limits are the two
log-log curves), and x₀ what makes the expected R at N = EMM just 1 − ζ. So the four unknowns are EMM itself, s, τ and
ν; all are integrated over, and an interval of EMM covers what is not known of the others: the noise of sampling
(binomial), that between runs, and the shape of the curve between the sizes that were tried. `python -m benchmarks emm`
measures its coverage on curves that are none of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from diffmem.errors import InputError

_STEP = 0.05
_ETA = np.arange(-16.0, 16.0 + _STEP / 2, _STEP)
_STEEPNESS = np.exp(np.linspace(math.log(0.5), math.log(16.0), 14))
_SPREADS = np.array([0.05, 0.15, 0.25, 0.4, 0.55, 0.75, 1.0, 1.4])
_ASYMMETRIES = np.exp(np.array([-1.2, -0.6, 0.0, 0.6, 1.2]))
_STARTS = len(_ETA) * np.arange(len(_SPREADS) * len(_ASYMMETRIES)).reshape(len(_SPREADS), -1)  # of a table's rows
# Prior: ln s normal around ln 3.5 (the paper's curves have 2 to 4, in the middle), τ half normal, ln ν normal.
_PRIOR_STEEPNESS, _PRIOR_SPREAD, _PRIOR_ASYMMETRY = (math.log(3.5), 0.8), 0.5, 0.7
_BEYOND = 1.5  # how far EMM may lie outside the sizes that can be tried, in ln N
_POINTS = 120  # of the grid over ln EMM, each of the two times that it is laid


@dataclass(frozen=True)
class Observation:
    """One run: `count` copies among `total` images of its best snapshot, trained on `size` images. censored: it was
    ended when the answer was yes, so that its R_mem is at least what was seen."""

    size: int
    count: int
    total: int
    censored: bool = False

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.count <= self.total or self.total < 1:
            raise InputError(f"{self.count} copies of {self.total} images on {self.size} training images is impossible")


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
        self._crossings = _crossings(zeta)
        tables: dict[float, np.ndarray] = {}  # of a size: what is looked up at the same points is added before
        for seen in observations:
            at = math.log(seen.size)
            tables[at] = tables[at] + _table(seen) if at in tables else _table(seen)
        edges = math.log(low) - _BEYOND, math.log(high) + _BEYOND
        self._lay(tables, *edges)
        if observations:
            # Once more, finer, where EMM may lie.
            heights = np.cumsum(self.marginal)
            first, last = np.searchsorted(heights, [1e-4, 1 - 1e-4])
            self._lay(tables, self.log_sizes[max(first - 1, 0)], self.log_sizes[min(last + 1, _POINTS - 1)])

    def _lay(self, tables: Mapping[float, np.ndarray], low: float, high: float) -> None:
        """Weights over a grid of ln EMM from `low` to `high` and of the other three."""
        self.log_sizes = np.linspace(low, high, _POINTS)
        logs = np.broadcast_to(_log_prior(), (_POINTS, *_log_prior().shape)).copy()
        for log_size, table in tables.items():
            logs += _looked_up(table, self._eta(log_size))
        weights = np.exp(logs - logs.max())
        self._weights = weights / weights.sum()
        self.marginal = self._weights.sum(axis=(1, 2, 3))

    def _eta(self, log_size: float) -> np.ndarray:
        """η at a size, for every point of the grid: [EMM, s, τ, ν]."""
        shift = (self.log_sizes - log_size)[:, None, None, None] * _STEEPNESS[None, :, None, None]
        return self._crossings[None, None] + shift

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
        means = _mean_links()
        # Most points of the grid weigh nothing: together those left out have less than 1e-9.
        emm, steepness, spread, asymmetry = places = np.nonzero(self._weights > 1e-9 / self._weights.size)
        weights = self._weights[places]
        for size in sizes:
            shift = (self.log_sizes[emm] - math.log(size)) * _STEEPNESS[steepness]
            eta = self._crossings[spread, asymmetry] + shift
            expected = _looked_up(means, eta, _STARTS[spread, asymmetry])
            order = np.argsort(expected)
            heights = np.cumsum(weights[order])
            wanted = ((1 - confidence) / 2, 0.5, (1 + confidence) / 2)
            rows.append([expected[order[min(int(np.searchsorted(heights, each)), len(order) - 1)]] for each in wanted])
        return np.array(rows)

    @property
    def spread(self) -> float:
        """Posterior mean of τ."""
        return float((self._weights.sum(axis=(0, 1, 3)) * _SPREADS).sum())


def _links() -> np.ndarray:
    """link(η): [ν, η]."""
    return (1 / (1 + np.exp(-_ETA)))[None] ** _ASYMMETRIES[:, None]


@cache
def _smoothing() -> np.ndarray:
    """The normal density of every τ as a matrix over η: [τ, η, η]."""
    distances = (_ETA[:, None] - _ETA[None]) / _SPREADS[:, None, None]
    weights = np.exp(-0.5 * distances**2)
    return weights / weights.sum(axis=2, keepdims=True)


def _averaged(values: np.ndarray) -> np.ndarray:
    """The mean over runs, for every τ, of what is given as [ν, η]: [τ, ν, η]."""
    return (_smoothing() @ values.T).transpose(0, 2, 1)


@cache
def _mean_links() -> np.ndarray:
    """The expected R over runs: [τ, ν, η]."""
    return _averaged(_links())


@cache
def _crossings(zeta: float) -> np.ndarray:
    """x₀, where the expected R is 1 − ζ: [τ, ν]."""
    means = _mean_links()
    return np.array([[np.interp(1 - zeta, row, _ETA) for row in rows] for rows in means])


def _log_prior() -> np.ndarray:
    """[s, τ, ν], unnormalized; the widths of the cells over τ differ."""
    mean, deviation = _PRIOR_STEEPNESS
    steepness = -0.5 * ((np.log(_STEEPNESS) - mean) / deviation) ** 2
    spread = -0.5 * (_SPREADS / _PRIOR_SPREAD) ** 2 + np.log(np.gradient(_SPREADS))
    asymmetry = -0.5 * (np.log(_ASYMMETRIES) / _PRIOR_ASYMMETRY) ** 2
    return steepness[:, None, None] + spread[None, :, None] + asymmetry[None, None]


@lru_cache(maxsize=128)
def _table(seen: Observation) -> np.ndarray:
    """ln of the observation's likelihood, averaged over z: [τ, ν, η]."""
    shares = np.clip(_links(), 1e-300, 1 - 1e-16)
    # More images than make the noise of sampling one step of the grid over η add nothing beside that between runs.
    share = (seen.count + 0.5) / (seen.total + 1)
    effective = min(1.0, 1 / (seen.total * share * (1 - share) * _STEP**2))
    hits, misses = seen.count * effective, (seen.total - seen.count) * effective
    if seen.censored:
        likelihood = _at_least(hits, misses, shares)
    else:
        peak = seen.count / seen.total
        best = (hits * math.log(peak) if hits else 0.0) + (misses * math.log(1 - peak) if misses else 0.0)
        likelihood = np.exp(hits * np.log(shares) + misses * np.log1p(-shares) - best)
    return np.log(np.maximum(_averaged(likelihood), 1e-300))


def _at_least(hits: float, misses: float, shares: np.ndarray) -> np.ndarray:
    """The probability that a share drawn from Beta(hits + 1, misses + 1) is at most each of `shares`."""
    grid = np.linspace(0, 1, 20_001)[1:-1]
    density = hits * np.log(grid) + misses * np.log1p(-grid)
    heights = np.cumsum(np.exp(density - density.max()))
    return np.interp(shares, grid, heights / heights[-1], left=0.0, right=1.0)


def _looked_up(table: np.ndarray, eta: np.ndarray, starts: np.ndarray = _STARTS) -> np.ndarray:
    """The table [τ, ν, η] at η [EMM, s, τ, ν], linear between its points. starts: where the rows that are meant begin
    in the flattened table, if not all of them."""
    position = np.clip((eta - _ETA[0]) / _STEP, 0, len(_ETA) - 1.000001)
    index = position.astype(np.intp)
    share = position - index
    index += starts
    flat = table.ravel()
    return flat.take(index) * (1 - share) + flat.take(index + 1) * share
