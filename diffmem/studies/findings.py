"""What a study's runs say: R_mem of every cell, EMM of every variant, and whether the paper's directions hold.

Runs of one cell differ. Their logit R_mem is taken to have one standard deviation τ throughout a study's folder, of
which its repetitions tell: τ² = (ν₀τ₀² + Σ squared deviations) / (ν₀ + degrees of freedom), with a prior guess of
τ₀ = 0.4 that counts as much as ν₀ = 4 repetitions. Intervals of means and differences hold this, with the quantiles of
Student's t at ν₀ + degrees of freedom, and the noise of sampling, by the distances to the ends of the single runs'
intervals (as in Zou and Donner 2008): to the upper ends in squares; to the lower ends, which allow for R_mem being the
highest of several snapshots, on average, for such estimates all err upwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from diffmem.studies.curve import Posterior
from diffmem.studies.emm import observation
from diffmem.studies.measure import Result
from diffmem.studies.study import Claim, Study, Variant

_GUESS, _GUESS_WEIGHT = 0.4, 4.0
_ALIKE = 0.1  # R_mem that differ by less count as about equal
HOLDS, CONTRARY, UNDECIDED, UNMEASURED = "holds", "does not hold", "undecided", "not measured"


@dataclass(frozen=True)
class Spread:
    """How much runs of one cell differ: τ, in logit R_mem, and the degrees of freedom that it rests on."""

    tau: float
    freedom: float


@dataclass(frozen=True)
class Cell:
    """A variant at a size: its results, their mean R_mem and its 95 % interval."""

    variant: Variant
    size: int
    results: tuple[Result, ...]
    spread: Spread

    @property
    def r_mem(self) -> float:
        return sum(result.r_mem for result in self.results) / len(self.results)

    @property
    def margins(self) -> tuple[float, float]:
        """How far the 95 % interval of `r_mem` reaches below and above it, before it is cut to 0 … 1."""
        t, below, above, between = student(0.975, self.spread.freedom), 0.0, 0.0, 0.0
        for result in self.results:
            share = (result.count + 0.5) / (result.total + 1)
            between += (t * self.spread.tau * share * (1 - share)) ** 2
            low, high = result.interval
            below += result.r_mem - low
            above += (high - result.r_mem) ** 2
        return math.sqrt(below**2 + between) / len(self.results), math.sqrt(above + between) / len(self.results)

    @property
    def interval(self) -> tuple[float, float]:
        below, above = self.margins
        return max(0.0, self.r_mem - below), min(1.0, self.r_mem + above)


@dataclass(frozen=True)
class Judged:
    """A claim of the paper, and what the runs say: the difference of R_mem, averaged over the sizes at which both
    variants were measured, with its 95 % interval. verdict: HOLDS, CONTRARY, UNDECIDED or UNMEASURED."""

    claim: Claim
    sizes: tuple[int, ...]
    difference: float
    interval: tuple[float, float]
    verdict: str


@dataclass(frozen=True)
class Findings:
    """A study with what its runs found. failures: (variant's name, size, repetition, error); missing: trials without a
    result or an error; emm: (median, interval) for variants measured at two sizes or more."""

    study: Study
    cells: tuple[Cell, ...]
    judged: tuple[Judged, ...]
    emm: Mapping[str, tuple[float, tuple[float, float]]]
    failures: tuple[tuple[str, int, int, str], ...]
    missing: int

    @property
    def results(self) -> list[Result]:
        return [result for cell in self.cells for result in cell.results]

    @property
    def sizes(self) -> list[int]:
        """All sizes that were measured."""
        return sorted({cell.size for cell in self.cells})

    def cell(self, variant: str, size: int) -> Cell | None:
        return next((cell for cell in self.cells if cell.variant.name == variant and cell.size == size), None)


def spread_of(groups: Sequence[Sequence[Result]]) -> Spread:
    """τ from groups of results, each of runs that differ in their repetition only."""
    squares, freedom = _GUESS_WEIGHT * _GUESS**2, _GUESS_WEIGHT
    for results in groups:
        shares = [(result.count + 0.5) / (result.total + 1) for result in results]
        logits = [math.log(share / (1 - share)) for share in shares]
        mean = sum(logits) / len(logits)
        # What sampling adds to the differences is not the runs'.
        noise = sum(1 / (result.total * share * (1 - share)) for result, share in zip(results, shares, strict=True))
        found = sum((logit - mean) ** 2 for logit in logits) - noise * (len(results) - 1) / len(results)
        squares += max(0.0, found)
        freedom += len(results) - 1
    return Spread(math.sqrt(squares / freedom), freedom)


def find_among(studies: Sequence[Study], results: Mapping[str, Result], errors: Mapping[str, str]) -> list[Findings]:
    """What `results` (by trial key) and `errors` say of studies that share a spread between runs."""
    groups = {key: each for study in studies for key, each in _groups(study, results).items()}
    spread = spread_of([list(group.values()) for group in groups.values()])
    return [findings(study, results, errors, spread) for study in studies]


def _groups(study: Study, results: Mapping[str, Result]) -> dict[str, dict[int, Result]]:
    """The results of every cell, by the key of its first trial and by repetition, those beyond the study's own number
    of repetitions too: runs of one setting and size are as good, whichever study they were made for."""
    repetitions = max([study.repetitions, *(result.repetition + 1 for result in results.values())])
    groups: dict[str, dict[int, Result]] = {}
    for _, trial in replace(study, repetitions=repetitions).cells():
        if trial.key in results:
            groups.setdefault(replace(trial, repetition=0).key, {})[trial.repetition] = results[trial.key]
    return groups


def findings(
    study: Study, results: Mapping[str, Result], errors: Mapping[str, str], spread: Spread | None = None
) -> Findings:
    """What `results` (by trial key) and `errors` say of a study: a cell has all the results of its setting and size,
    also those of repetitions that the study does not ask for. spread: of runs; None: from this study alone."""
    failures, missing = [], 0
    for variant, trial in study.cells():
        if trial.key not in results and trial.key in errors:
            failures.append((variant.name, trial.size, trial.repetition, errors[trial.key]))
        elif trial.key not in results:
            missing += 1
    groups = _groups(study, results)
    spread = spread_of([list(each.values()) for each in groups.values()]) if spread is None else spread
    order = [variant.name for variant in study.variants]
    places = {(variant.name, trial.size): (variant, trial) for variant, trial in replace(study, repetitions=1).cells()}
    cells = [
        Cell(variant, trial.size, tuple(groups[trial.key].values()), spread)
        for variant, trial in places.values()
        if trial.key in groups
    ]
    cells.sort(key=lambda cell: (order.index(cell.variant.name), cell.size))
    return Findings(
        study,
        tuple(cells),
        tuple(_judged(claim, cells) for claim in study.claims),
        {name: found for name in order if (found := _emm(cells, name)) is not None},
        tuple(failures),
        missing,
    )


def _judged(claim: Claim, cells: Sequence[Cell]) -> Judged:
    by_place = {(cell.variant.name, cell.size): cell for cell in cells}
    pairs = [
        (by_place[claim.higher, size], by_place[claim.lower, size])
        for size in sorted({cell.size for cell in cells})
        if (claim.sizes is None or size in claim.sizes)
        and (claim.higher, size) in by_place
        and (claim.lower, size) in by_place
    ]
    if not pairs:
        return Judged(claim, (), math.nan, (math.nan, math.nan), UNMEASURED)
    difference = sum(more.r_mem - less.r_mem for more, less in pairs) / len(pairs)
    below = sum(more.margins[0] ** 2 + less.margins[1] ** 2 for more, less in pairs)
    above = sum(more.margins[1] ** 2 + less.margins[0] ** 2 for more, less in pairs)
    low, high = difference - math.sqrt(below) / len(pairs), difference + math.sqrt(above) / len(pairs)
    if claim.about_equal:
        alike, different = low > -_ALIKE and high < _ALIKE, low > _ALIKE or high < -_ALIKE
        verdict = HOLDS if alike else CONTRARY if different else UNDECIDED
    else:
        verdict = HOLDS if low > 0 else CONTRARY if high < 0 else UNDECIDED
    return Judged(claim, tuple(more.size for more, _ in pairs), difference, (low, high), verdict)


def _emm(cells: Sequence[Cell], name: str) -> tuple[float, tuple[float, float]] | None:
    own = [cell for cell in cells if cell.variant.name == name]
    if len(own) < 2:
        return None
    seen = [observation(result) for cell in own for result in cell.results]
    posterior = Posterior(seen, own[0].size, own[-1].size)
    return posterior.median, posterior.interval()


def student(probability: float, freedom: float) -> float:
    """The quantile of Student's t, from the normal one by the expansion of Fisher and Cornish (1960); off by less than
    0.01 at 95 % from 4 degrees of freedom on."""
    z = NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
