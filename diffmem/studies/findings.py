"""What a study's runs say: R_mem of every cell, EMM of every variant, and the verdicts on the study's questions.

How questions are decided stands in `diffmem.studies.analysis`. The interval of a single cell's mean R_mem is about runs
that are not compared in pairs. Their logit R_mem is taken to have one standard deviation τ throughout a study's folder,
of which its repetitions tell: τ² = (ν₀τ₀² + Σ squared deviations) / (ν₀ + degrees of freedom), with a prior guess of
τ₀ = 0.4 that counts as much as ν₀ = 4 repetitions. A cell's interval holds this, with the quantiles of Student's t at
ν₀ + degrees of freedom, and the noise of sampling, by the distances to the ends of the single runs' intervals (as in
Zou and Donner 2008): to the upper ends in squares; to the lower ends, which allow for R_mem being the highest of
several snapshots, on average, for such estimates all err upward.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

from diffmem.studies import laws
from diffmem.studies.analysis import (
    ALPHA,
    UNDECIDED,
    UNMEASURED,
    Cells,
    Estimate,
    estimate,
    holm,
    spent,
    student,
    up_to,
)
from diffmem.studies.curve import Posterior
from diffmem.studies.emm import observation
from diffmem.studies.laws import LawFinding
from diffmem.studies.leveling import LEVELED_OFF, SHORT
from diffmem.studies.measure import Result
from diffmem.studies.study import READ_WITHIN, Place, Question, Study, Variant

_GUESS, _GUESS_WEIGHT = 0.4, 4.0


@dataclass(frozen=True)
class Spread:
    """How much runs of one cell differ: τ, in logit R_mem, and the degrees of freedom that it rests on."""

    tau: float
    freedom: float


@dataclass(frozen=True)
class Cell:
    """A variant at a size: its runs, their mean R_mem and its 95 % interval.

    Attributes:
        variant: The variant.
        size: N.
        runs: The runs, with R_mem as the highest over their snapshots.
        spread: Of runs.
        read_at: As of the study.
    """

    variant: Variant
    size: int
    runs: tuple[Result, ...]
    spread: Spread
    read_at: float | None = None

    @cached_property
    def results(self) -> tuple[Result, ...]:
        """The runs, with R_mem as the study reads it."""
        read = [after(run, self.read_at) for run in self.runs]
        return tuple(each for each in read if each is not None)

    @property
    def r_mem(self) -> float:
        return sum(result.r_mem for result in self.results) / len(self.results)

    @property
    def highest(self) -> float:
        """The mean over its runs of the highest R_mem of each."""
        return sum(run.r_mem for run in self.runs) / len(self.runs)

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
    def level(self) -> str:
        """In how many runs R_mem had leveled off, in words; empty where their audits cannot tell."""
        levels = [result.level for result in self.runs if result.level.state != SHORT]
        if not levels:
            return ""
        states = Counter(level.state for level in levels)
        ends = sorted(level.epochs for level in levels if level.epochs is not None)
        where = f" at {ends[len(ends) // 2]:,.0f} epochs" if ends else ""
        if len(states) == 1:
            return next(iter(states)) + where
        return ", ".join(f"{count} {state}{where * (state == LEVELED_OFF)}" for state, count in states.most_common())

    @property
    def interval(self) -> tuple[float, float]:
        below, above = self.margins
        return max(0.0, self.r_mem - below), min(1.0, self.r_mem + above)


@dataclass(frozen=True)
class Answer:
    """A question, and what the runs say of it.

    Attributes:
        question: The question.
        verdict: HOLDS, CONTRARY, EQUIVALENT, UNDECIDED or UNMEASURED.
        estimate: The estimate on which the verdict rests: of the look that decided, or the last one; None where it was
            not measured.
        latest: The estimate from all runs.
        p: Its p-value, over all looks.
        adjusted: The same, corrected for the number of questions.
        family: How many questions the correction is for.
        looks: After how many repetitions one may have looked; one: the runs are analyzed once.
    """

    question: Question
    verdict: str
    estimate: Estimate | None = None
    latest: Estimate | None = None
    p: float = 1.0
    adjusted: float = 1.0
    family: int = 1
    looks: tuple[int, ...] = ()

    @property
    def decided(self) -> bool:
        return self.verdict not in (UNDECIDED, UNMEASURED)

    @property
    def sizes(self) -> tuple[int, ...]:
        return () if self.estimate is None else self.estimate.sizes

    def interval(self, scale: str, alpha: float = ALPHA) -> tuple[float, float] | None:
        """Of the difference in "logit" or "points"; None where there is none yet."""
        effect = None if self.estimate is None else getattr(self.estimate, scale)
        if effect is None:
            return None
        low, high = effect.interval(alpha)
        return _within(scale, low), _within(scale, high)

    def difference(self, scale: str) -> float | None:
        """What is estimated of it, in "logit" or "points"; None where nothing is yet."""
        effect = None if self.estimate is None else getattr(self.estimate, scale)
        return None if effect is None else _within(scale, effect.estimate)

    def simultaneous(self, scale: str) -> tuple[float, float] | None:
        """The interval that holds together with those of all other questions, at all looks."""
        shares = spent(self.looks[0], self.looks[-1]) if self.looks else {}
        seen = 0 if self.estimate is None else self.estimate.repetitions
        share = shares.get(seen, min([1.0, *shares.values()]))
        return self.interval(scale, ALPHA * share / self.family)


def _within(scale: str, difference: float) -> float:
    """In points no more than from none to all copies, which the line of a trend may exceed."""
    return min(max(difference, -1.0), 1.0) if scale == "points" else difference


@dataclass(frozen=True)
class Findings:
    """A study with what its runs found. failures: (variant's name, size, repetition, error); missing: trials without a
    result or an error; emm: (median, interval) for variants measured at two sizes or more; law: what the runs say of
    the study's law; unread: runs of cells of which none was audited where the study reads R_mem."""

    study: Study
    cells: tuple[Cell, ...]
    answers: tuple[Answer, ...]
    emm: Mapping[str, tuple[float, tuple[float, float]]]
    failures: tuple[tuple[str, int, int, str], ...]
    missing: int
    law: LawFinding | None = None
    unread: tuple[Result, ...] = ()

    @property
    def runs(self) -> list[Result]:
        """All runs, with R_mem as the highest over their snapshots."""
        return [run for cell in self.cells for run in cell.runs]

    @property
    def by_place(self) -> dict[Place, dict[int, Result]]:
        """The results of every cell, by repetition."""
        return _by_place(self.cells)

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
    """What `results` (by trial key) and `errors` say of studies that share a spread between runs; their questions are
    one family."""
    # Runs that end with their onset say nothing of how R_mem differs between runs of full length.
    groups: dict[float | None, dict[str, dict[int, Result]]] = {}  # those of one setting and size once
    for study in studies:
        if study.law is None:
            groups.setdefault(study.read_at, {}).update(_groups(study, results))
    spread = spread_of([read for read_at, each in groups.items() for read in _read(each, read_at)])
    found = [findings(study, results, errors, spread) for study in studies]
    answers = corrected([answer for each in found for answer in each.answers])
    ends = list(accumulate((len(each.answers) for each in found), initial=0))
    judged = laws.corrected([each.law for each in found])
    return [
        replace(each, answers=tuple(answers[start:end]), law=law)
        for each, (start, end), law in zip(found, pairwise(ends), judged, strict=True)
    ]


def corrected(answers: Sequence[Answer]) -> list[Answer]:
    """Answers with verdicts that hold together: those of questions that were measured are one family."""
    measured = [answer for answer in answers if answer.estimate is not None]
    adjusted = dict(zip(map(id, measured), holm([answer.p for answer in measured]), strict=True))
    found = []
    for answer in answers:
        if (seen := answer.estimate) is None:
            found.append(replace(answer, verdict=UNMEASURED))
            continue
        p = adjusted[id(answer)]
        answer = replace(answer, adjusted=p, family=len(measured))
        if p <= ALPHA:
            found.append(replace(answer, verdict=seen.verdict(answer.question)))
        else:
            found.append(replace(answer, verdict=UNDECIDED, estimate=answer.latest))
    return found


def after(run: Result, epochs: float | None) -> Result | None:
    """A run with R_mem as that of its snapshot after so many epochs, within `READ_WITHIN`.

    Args:
        run: The run.
        epochs: The training length; None: R_mem stays the highest over its snapshots.

    Returns:
        None where it was not audited there. A run that had leveled off before has the R_mem at which it did.
    """
    if epochs is None:
        return run
    if run.epochs < epochs * (1 - READ_WITHIN) and run.level.state == LEVELED_OFF:
        return replace(run, snapshots=(), looks=1, tabled=None)
    at = next((each for each in run.snapshots if abs(each.epochs - epochs) <= READ_WITHIN * epochs), None)
    if at is None:
        return None
    return replace(run, count=at.count, total=at.total, best_images=at.images, snapshots=(), looks=1, tabled=None)


def _read(groups: Mapping[str, Mapping[int, Result]], epochs: float | None) -> list[list[Result]]:
    """`after` of the runs of every group, those that were audited there."""
    read = ([after(run, epochs) for run in runs.values()] for runs in groups.values())
    found = ([each for each in runs if each is not None] for runs in read)
    return [runs for runs in found if runs]


def _by_place(cells: Sequence[Cell]) -> dict[Place, dict[int, Result]]:
    """The results of every cell, by repetition."""
    return {(cell.variant.name, cell.size): {result.repetition: result for result in cell.results} for cell in cells}


def _groups(study: Study, results: Mapping[str, Result]) -> dict[str, dict[int, Result]]:
    """The results of every cell, by the key of its first trial and by repetition, those beyond the study's own number
    of repetitions too: runs of one setting and size are as good, whichever study they were made for."""
    repetitions = max([study.repetitions, *(result.repetition + 1 for result in results.values())])
    groups: dict[str, dict[int, Result]] = {}
    for _, trial in replace(study, repetitions=repetitions, max_repetitions=None).cells():
        if trial.key in results:
            groups.setdefault(replace(trial, repetition=0).key, {})[trial.repetition] = results[trial.key]
    return groups


def findings(
    study: Study, results: Mapping[str, Result], errors: Mapping[str, str], spread: Spread | None = None
) -> Findings:
    """What `results` (by trial key) and `errors` say of a study: a cell has all the results of its setting and size,
    also those of repetitions that the study does not ask for. spread: of runs; None: from this study alone."""
    failures, missing = [], 0
    for variant, trial in replace(study, repetitions=study.max_repetitions or study.repetitions).cells():
        if trial.key not in results and trial.key in errors:
            failures.append((variant.name, trial.size, trial.repetition, errors[trial.key]))
        elif trial.key not in results and trial.repetition < study.repetitions:
            missing += 1
    groups = _groups(study, results)
    spread = spread_of(_read(groups, study.read_at)) if spread is None else spread
    order = [variant.name for variant in study.variants]
    places = {(variant.name, trial.size): (variant, trial) for variant, trial in replace(study, repetitions=1).cells()}
    cells = [
        Cell(variant, trial.size, tuple(groups[trial.key].values()), spread, study.read_at)
        for variant, trial in places.values()
        if trial.key in groups
    ]
    unread = tuple(run for cell in cells if not cell.results for run in cell.runs)
    cells = [cell for cell in cells if cell.results]
    by_place = _by_place(cells)
    cells.sort(key=lambda cell: (order.index(cell.variant.name), cell.size))
    return Findings(
        study,
        tuple(cells),
        tuple(corrected([answer(study, question, by_place) for question in study.questions])),
        {} if study.law else {name: found for name in order if (found := _emm(cells, name)) is not None},
        tuple(failures),
        missing,
        None if study.law is None else laws.judge(study.law, _of_law(study, cells)),
        unread,
    )


def _of_law(study: Study, cells: Sequence[Cell]) -> list[Result]:
    """The results off which a study's law is read: of its first variant, or of all."""
    own = study.variants if study.law == "crossover" else study.variants[:1]
    return [result for cell in cells if cell.variant in own for result in cell.results]


def answer(study: Study, question: Question, cells: Cells) -> Answer:
    """A question by itself; see `corrected`. Where the study may add repetitions, at each look so far."""
    last = study.max_repetitions
    if last is None:
        found = estimate(question, study.contrast(question, set(cells)), cells)
        return Answer(question, UNDECIDED, found, found, 1.0 if found is None else found.p_value(question))
    shares = spent(study.repetitions, last)
    best = Answer(question, UNMEASURED, looks=tuple(shares))
    for repetitions in sorted({each + 1 for results in cells.values() for each in results}):
        seen = up_to(cells, repetitions)
        found = estimate(question, study.contrast(question, set(seen)), seen)
        before = 0 if best.latest is None else best.latest.repetitions
        if found is None or before >= last or (best.latest is not None and found.repetitions <= before):
            continue  # no new pair
        share = shares.get(found.repetitions, 0.0)
        p = min(1.0, found.p_value(question) / share) if share else 1.0
        best = replace(best, latest=found)
        if best.estimate is None or p < best.p:
            best = replace(best, estimate=found, p=p)
    return best


def _emm(cells: Sequence[Cell], name: str) -> tuple[float, tuple[float, float]] | None:
    own = [cell for cell in cells if cell.variant.name == name]
    if len(own) < 2:
        return None
    seen = [observation(run) for cell in own for run in cell.runs]  # at the end of training, as EMM is defined
    posterior = Posterior(seen, own[0].size, own[-1].size)
    return posterior.median, posterior.interval()
