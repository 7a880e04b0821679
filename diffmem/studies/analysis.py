"""How questions are decided: by pairs of runs that share a repetition, with an error that holds for a whole report.

A question is a weighted sum of cells (`Study.contrast`). Repetition r gives one value of it, Δ_r = Σ w·logit R_mem, in
which the subset, the seed and the latents that all variants of a repetition share cancel. Δ_1 … Δ_R are independent, so
their mean has the interval of Student's t with R − 1 degrees of freedom, whatever else the runs have in common
(`paired`). Few repetitions tell little of their own spread: two give a quantile of 12.7. So the
spread of all the study's variants is looked at, too (`pooled`): logit R_mem, averaged over the question's sizes, is

    y_rv = μ_v + a_r + e_rv,   var e_rv = σ² + the noise of sampling,

the mixed model of variant and repetition, with nothing assumed about the a_r: whatever a repetition has of its own, at
all sizes or at one of them, is in a_r, and what a variant has of its own in a repetition, at all sizes, in e_rv. The
degrees of freedom are (R − 1)(V − 1) where all runs are there; σ² follows from the weighted squares (Paule and Mandel
1982). But variants may differ in their spread. Of the two estimates the one with the larger error counts, with its own
degrees of freedom: where the spread is one, that spares repetitions, and where that of the question's own runs is twice
as large as that of the others, false verdicts stay at 5 % (`benchmarks/results/study-errors.csv`).

A run's logit is that of (copies + ½) / (images − copies + ½). Its noise of sampling has the variance 1 / (copies + ½) +
1 / (images − copies + ½); it is in the spread of the Δ_r already, and the error is never taken smaller than it alone.
That R_mem is the highest of several snapshots raises all runs alike: it cancels in a difference between runs with as
many audits, and makes the noise smaller than what is assumed. The same is computed in points of R_mem.

Where R_mem saturates, in all cells of a size above 98 % or all below 2 %, logits turn single images into large
differences, and hardly any difference can show. Such sizes are left out; where there are no others, points decide: a
difference may still be shown, but no equivalence, for R_mem cannot tell variants apart there.

Verdicts. A direction or trend holds (or is contrary) when a two-sided test rejects no difference; it is equivalent when
two one-sided tests reject every difference beyond the margin (TOST: the 90 % interval lies within it). An equivalence
is equivalent likewise, and contrary when the difference is shown to be beyond the margin. Of the two hypotheses that a
question may reject one at most is true, so that the smaller p-value stands for the question; Holm's correction holds
the probability of any false verdict among all questions of a report at 5 %. Simultaneous intervals are Bonferroni's.

Looks. A study that may add repetitions is looked at after every one, from `repetitions` on to `max_repetitions` = K.
The look after r repetitions may spend α·(r² − r'²) / K², r' the look before (the power family of Kim and DeMets 1987,
ρ = 2, each part spent by itself): a p-value is divided by this share, and the smallest over the looks so far counts. By
the union bound that holds whatever the looks have in common, and whatever made one stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffmem.studies.measure import Result
from diffmem.studies.study import EQUIVALENCE, TREND, Place, Question

HOLDS, CONTRARY, EQUIVALENT = "holds", "contrary", "equivalent"
UNDECIDED, UNMEASURED = "undecided", "not measured"
ALPHA = 0.05
SATURATED = 0.02  # R_mem this close to 0 or 1 tells little
PAIRS, POOLED = "pairs", "pooled spread"

Cells = Mapping[Place, Mapping[int, Result]]  # of every cell, the results by repetition


@dataclass(frozen=True)
class Effect:
    """An estimate with its standard error and the degrees of freedom that the error rests on."""

    estimate: float
    error: float
    freedom: float

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """The interval of confidence 1 − alpha."""
        reach = student(1 - alpha / 2, self.freedom) * self.error
        return self.estimate - reach, self.estimate + reach

    @property
    def p_difference(self) -> float:
        """Of no difference, two-sided."""
        return 2 * self._above(abs(self.estimate))

    @property
    def p_above(self) -> float:
        """Of 0 or less, one-sided: small where the estimate is shown to be above."""
        return self._above(self.estimate)

    def p_equivalence(self, margin: float) -> float:
        """Of a difference of `margin` or more (the larger of the two one-sided tests)."""
        return self._above(margin - abs(self.estimate))

    def p_beyond(self, margin: float) -> float:
        """Of a difference of `margin` at most, two-sided."""
        return min(1.0, 2 * self._above(abs(self.estimate) - margin))

    def _above(self, distance: float) -> float:
        """The probability that Student's t is above `distance` in standard errors."""
        from scipy.special import stdtr  # scikit-learn brings it

        if self.error == 0:
            return float(distance <= 0)
        return float(stdtr(self.freedom, -distance / self.error))


@dataclass(frozen=True)
class Estimate:
    """What the runs say of a question.

    Attributes:
        logit: In logit R_mem; None where fewer than two repetitions have all of its cells.
        points: In R_mem itself; likewise.
        scale: Which of the two decides, "logit" or "points".
        method: PAIRS or POOLED.
        repetitions: How many repetitions have all of its cells.
        sizes: At which N it was measured, and R_mem is not saturated.
    """

    logit: Effect | None
    points: Effect | None
    scale: str
    method: str
    repetitions: int
    sizes: tuple[int, ...]

    @property
    def effect(self) -> Effect | None:
        """The one that decides."""
        return self.logit if self.scale == "logit" else self.points

    def margin(self, question: Question) -> float:
        return question.margin if self.scale == "logit" else question.points

    def p_value(self, question: Question) -> float:
        """Of the question: the smaller one of those of its two verdicts."""
        return min(self.p_values(question))

    def p_values(self, question: Question) -> tuple[float, float]:
        """(of a difference, or, where equivalence is asked for, one beyond the margin; of equivalence)."""
        if self.effect is None:
            return 1.0, 1.0
        margin = self.margin(question)
        against = self.effect.p_beyond(margin) if question.kind == EQUIVALENCE else self.effect.p_difference
        return against, 1.0 if self.scale == "points" else self.effect.p_equivalence(margin)

    def verdict(self, question: Question) -> str:
        """The verdict if the question is decided at all."""
        if self.effect is None:
            return UNDECIDED
        different, equivalent = self.p_values(question)
        if equivalent < different:
            return EQUIVALENT
        return HOLDS if question.kind != EQUIVALENCE and self.effect.estimate > 0 else CONTRARY


def student(probability: float, freedom: float) -> float:
    """The quantile of Student's t."""
    from scipy.special import stdtrit  # scikit-learn brings it

    return float(stdtrit(freedom, probability))


def logit_of(result: Result) -> tuple[float, float]:
    """(logit R_mem of a run, the variance of its noise of sampling)."""
    hits, misses = result.count + 0.5, result.total - result.count + 0.5
    return math.log(hits / misses), 1 / hits + 1 / misses


def points_of(result: Result) -> tuple[float, float]:
    """(R_mem of a run, the variance of its noise of sampling)."""
    share = (result.count + 0.5) / (result.total + 1)
    return result.r_mem, share * (1 - share) / result.total


def paired(weights: Mapping[Place, float], cells: Cells) -> tuple[Effect | None, Effect | None, int]:
    """The contrast by hand: (in logits, in points, number of repetitions that have all of its cells); None where these
    are fewer than two."""
    common = set.intersection(*(set(cells.get(place, {})) for place in weights)) if weights else set()
    found: list[Effect | None] = []
    for scale in (logit_of, points_of):
        values, noise = [], 0.0
        for repetition in sorted(common):
            parts = [(weight, *scale(cells[place][repetition])) for place, weight in weights.items()]
            values.append(sum(weight * value for weight, value, _ in parts))
            noise += sum(weight**2 * variance for weight, _, variance in parts) / len(common)
        if len(values) < 2:
            found.append(None)
            continue
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        found.append(Effect(mean, math.sqrt(max(variance, noise) / len(values)), len(values) - 1))
    return found[0], found[1], len(common)


def _end(place: Place, cells: Cells) -> int:
    """Whether R_mem of a cell is saturated, near 1 or near 0 (−1); else 0."""
    results = cells[place].values()
    share = sum(result.count for result in results) / sum(result.total for result in results)
    return 1 if share > 1 - SATURATED else -1 if share < SATURATED else 0


def informative(question: Question, weights: Mapping[Place, float], cells: Cells) -> tuple[dict[Place, float], bool]:
    """(the weights without the sizes at which R_mem is saturated, whether it is so at all sizes: then all remain)."""
    along_sizes = question.kind == TREND and question.over == "size"
    ends: dict[int, set[int]] = {}
    for place in weights:
        ends.setdefault(0 if along_sizes else place[1], set()).add(_end(place, cells))
    saturated = {size for size, found in ends.items() if len(found) == 1 and 0 not in found}
    if len(saturated) == len(ends):
        return dict(weights), True
    scale = len(ends) / (len(ends) - len(saturated))
    return {place: weight * scale for place, weight in weights.items() if place[1] not in saturated}, False


def estimate(question: Question, weights: Mapping[Place, float], cells: Cells) -> Estimate | None:
    """What the runs say of a question.

    Args:
        question: The question.
        weights: Its contrast over cells that were measured (`Study.contrast`).
        cells: The results.

    Returns:
        None where it was not measured.
    """
    if not weights:
        return None
    weights, saturated = informative(question, weights, cells)
    logit, points, repetitions = paired(weights, cells)
    method, scale = PAIRS, "points" if saturated else "logit"
    if logit is not None and points is not None:
        columns = _columns(question, weights, cells)
        for name, measure, own in (("logit", logit_of, logit), ("points", points_of, points)):
            of_all = pooled(*columns, cells, measure)
            if of_all is None or of_all.freedom <= own.freedom or of_all.error < own.error:
                continue
            logit, points = (of_all, points) if name == "logit" else (logit, of_all)
            method = POOLED if name == scale else method
    sizes = tuple(sorted({size for _, size in weights}))
    return Estimate(logit, points, scale, method, repetitions, sizes)


def _columns(
    question: Question, weights: Mapping[Place, float], cells: Cells
) -> tuple[dict[Hashable, dict[Place, float]], dict[Hashable, float]]:
    """(the cells that are averaged in each column of a question's layout, with their shares; the columns' weights): a
    column per variant, over the sizes, or, of a trend over sizes, per size, over the variants."""
    along_sizes = question.kind == TREND and question.over == "size"
    column, other = (1, 0) if along_sizes else (0, 1)
    across = {place[other] for place in weights}
    columns: dict[Hashable, dict[Place, float]] = {}
    for place in cells:
        if place[other] in across:
            columns.setdefault(place[column], {})[place] = 1 / len(across)
    totals: dict[Hashable, float] = dict.fromkeys(columns, 0.0)
    for place, weight in weights.items():
        totals[place[column]] += weight
    for name, places in list(columns.items()):
        asked = any(place in weights for place in places)
        if len(places) < len(across) or not (asked or any(_end(place, cells) == 0 for place in places)):
            del columns[name], totals[name]
    return columns, totals


def pooled(
    columns: Mapping[Hashable, Mapping[Place, float]],
    weights: Mapping[Hashable, float],
    cells: Cells,
    scale: Callable[[Result], tuple[float, float]],
) -> Effect | None:
    """The contrast of columns with the spread of all of them.

    Args:
        columns: The cells that are averaged in each column, with their shares.
        weights: Of the columns.
        cells: The results.
        scale: `logit_of` or `points_of`.

    Returns:
        None where there are fewer than three columns, no degrees of freedom, or no runs that connect the columns.
    """
    from scipy.optimize import brentq  # scikit-learn brings it

    if len(columns) < 3:  # the pairs say as much
        return None
    places = {column: index for index, column in enumerate(columns)}
    values, noise, at = [], [], []
    for column, shares in columns.items():
        for repetition in set.intersection(*(set(cells[place]) for place in shares)):
            parts = [(share, *scale(cells[place][repetition])) for place, share in shares.items()]
            values.append(sum(share * value for share, value, _ in parts))
            noise.append(sum(share**2 * variance for share, _, variance in parts))
            at.append((places[column], repetition))
    repetitions = {each: index for index, each in enumerate(sorted({r for _, r in at}))}
    design = np.zeros((len(at), len(columns) + len(repetitions)))
    for row, (column_index, repetition) in enumerate(at):
        design[row, column_index] = design[row, len(columns) + repetitions[repetition]] = 1
    design = np.delete(design, len(columns), axis=1)  # the first repetition: the columns' means are those in it
    freedom = len(at) - design.shape[1]
    if freedom < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    y, sampling = np.array(values), np.array(noise)
    contrast = np.zeros(design.shape[1])
    contrast[: len(columns)] = [weights[column] for column in columns]

    def fitted(variance: float) -> tuple[float, np.ndarray, np.ndarray]:
        """(weighted squares of what is left over, coefficients, their covariances)."""
        w = 1 / (variance + sampling)
        covariance = np.linalg.inv(design.T @ (w[:, None] * design))
        coefficients = covariance @ (design.T @ (w * y))
        return float((w * (y - design @ coefficients) ** 2).sum()), coefficients, covariance

    variance = 0.0
    if fitted(variance)[0] > freedom:
        highest = float(np.var(y) * len(y))  # where the squares are below 1
        variance = float(brentq(lambda each: fitted(each)[0] - freedom, 0.0, highest, rtol=1e-6))
    _, coefficients, covariance = fitted(variance)
    return Effect(float(contrast @ coefficients), math.sqrt(float(contrast @ covariance @ contrast)), freedom)


def spent(first: int, last: int) -> dict[int, float]:
    """The share of α that each look may spend, after `first` … `last` repetitions."""
    looks = range(first, last + 1)
    return {r: (r**2 - (0 if r == first else (r - 1) ** 2)) / last**2 for r in looks}


def up_to(cells: Cells, repetitions: int) -> dict[Place, dict[int, Result]]:
    """The results of the first so many repetitions."""
    found = {place: {r: each for r, each in results.items() if r < repetitions} for place, results in cells.items()}
    return {place: results for place, results in found.items() if results}


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979), which may be held against α each."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
