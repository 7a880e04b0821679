"""What a study will decide before it starts: with how many repetitions, which power, and at which cost.

The difference Δ_r of a question's pairs is taken to be normal with one standard deviation σ_Δ (noise of sampling
included), which is that of all variants. Power is that of the tests of `diffmem.studies.analysis`, of equivalence when
there is no difference, in simulated studies; without other variants it is that of Student's t test, from the noncentral
t distribution (`power_of_direction`, `power_of_equivalence`). The error is shared among all questions equally; Holm's
correction decides a little more.

σ_Δ is that of the question's own runs where there is a folder with two pairs or more; else the median over the
questions of that folder; else `SPREAD`, the median over the 21 questions asked of 174 runs of small digits (0.16 to
1.85; `benchmarks/results/studies/digits`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from diffmem.studies.analysis import ALPHA, spent, student
from diffmem.studies.findings import Findings
from diffmem.studies.study import EQUIVALENCE, TREND, Place, Question, Study

SPREAD = 1.0
POWER = 0.8  # to be reached
MOST = 40  # repetitions
_SIMULATED = 4000


@dataclass(frozen=True)
class Planned:
    """A question before its runs.

    Attributes:
        study: The study's name.
        question: The question.
        spread: σ_Δ, in logit R_mem.
        source: Where the spread comes from.
        effect: The difference whose power is given, in logit R_mem; of an equivalence, none.
        power: By the study's number of repetitions (of `max_repetitions`, where it may add some).
        repetitions: By how many its power is POWER; None where more than MOST were needed.
        equivalence: By how many an equivalence, if there is no difference, is shown with the power POWER; or None.
        expected: Repetitions on average, where the study may add some.
        seconds: Of one device, of one repetition of the cells that the question needs.
        total: The same of `repetitions` repetitions; None where these are unknown.
    """

    study: str
    question: Question
    spread: float
    source: str
    effect: float
    power: float
    repetitions: int | None
    equivalence: int | None
    expected: float | None
    seconds: float

    @property
    def total(self) -> float | None:
        return None if self.repetitions is None else self.repetitions * self.seconds

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            **{name: value for name, value in vars(self).items() if name != "question"},
            "question": vars(self.question),
            "total": self.total,
        }


def power_of_direction(effect: float, spread: float, repetitions: int, freedom: float, alpha: float = ALPHA) -> float:
    """The probability that a two-sided t test shows a difference of `effect` in its direction; σ_Δ is `spread`."""
    from scipy.special import nctdtr  # scikit-learn brings it

    if repetitions < 2:
        return 0.0
    shift = abs(effect) * math.sqrt(repetitions) / spread
    if shift > 35:  # beyond which the function gives up
        return 1.0
    return float(1 - nctdtr(freedom, shift, student(1 - alpha / 2, freedom)))


def power_of_equivalence(
    margin: float, spread: float, repetitions: int, freedom: float, alpha: float = ALPHA, effect: float = 0.0
) -> float:
    """The probability that two one-sided t tests show that there is no difference of `margin`, where there is one of
    `effect`: over the distribution of the estimated spread, that of the mean to lie far enough within."""
    from scipy.special import chdtri, ndtr  # scikit-learn brings it

    if repetitions < 2:
        return 0.0
    error = spread / math.sqrt(repetitions)
    upper = (np.arange(2000) + 0.5) / 2000
    room = margin - student(1 - alpha, freedom) * error * np.sqrt(chdtri(freedom, upper) / freedom)
    inside = ndtr((room - effect) / error) - ndtr((-room - effect) / error)
    return float(np.where(room > 0, inside, 0.0).mean())


def simulated(
    kind: str,
    margin: float,
    effect: float,
    spread: float,
    variants: int,
    levels: Mapping[int, float],
) -> np.ndarray:
    """Simulated studies of a question.

    Args:
        kind: Of the question, "direction", "equivalence" or "trend".
        margin: Of an equivalence, in logit R_mem.
        effect: The true difference, in logit R_mem.
        spread: σ_Δ.
        variants: Whose spread counts (of a trend over sizes: sizes).
        levels: By the number of repetitions, at least 2, the error of a verdict then.

    Returns:
        Whether the verdict that fits is found, [studies, looks]: of a direction and trend, that of `effect`'s sign; of
        an equivalence, that.
    """
    random, last = np.random.default_rng(0), max(levels)
    values = random.normal(effect, spread, (_SIMULATED, last))
    others = max(2, variants) - 2  # degrees of freedom that the others add per repetition
    extra = np.zeros((_SIMULATED, last))
    if others:
        extra = random.chisquare(others, (_SIMULATED, last)) * spread**2
    found = []
    for n, level in levels.items():
        mean, own = values[:, :n].mean(axis=1), values[:, :n].var(axis=1, ddof=1)
        freedom = (n - 1) * (1 + others)
        of_all = ((n - 1) * own + extra[:, 1:n].sum(axis=1)) / freedom
        alone = own >= of_all
        tail = level if kind == EQUIVALENCE else level / 2
        quantile = np.where(alone, student(1 - tail, n - 1), student(1 - tail, freedom))
        reach = quantile * np.sqrt(np.maximum(own, of_all) / n)
        if kind == EQUIVALENCE:
            found.append(np.abs(mean) + reach < margin)
        else:
            found.append(mean * math.copysign(1.0, effect) > reach)
    return np.array(found).T


def plan(
    studies: Sequence[Study],
    seconds: Mapping[str, Mapping[Place, float]],
    found: Sequence[Findings] = (),
    effect: float | None = None,
) -> list[Planned]:
    """What the questions of some studies need.

    Args:
        studies: The studies.
        seconds: By the study's name, what one run of each of its cells costs.
        found: What runs of a folder say: their spread is taken.
        effect: The difference, in logit R_mem, that is to be found; None: twice the question's margin.
    """
    known: dict[tuple[str, Question], tuple[float, int]] = {}
    for each in found:
        for answer in each.answers:
            latest = answer.latest
            if latest is not None and latest.logit is not None and latest.scale == "logit":
                spread = latest.logit.error * math.sqrt(latest.repetitions)
                known[each.study.name, answer.question] = spread, latest.repetitions
    family = max(1, sum(len(study.questions) for study in studies))
    planned = []
    for study in studies:
        for question in study.questions:
            places = study.contrast(question)
            if not places:
                continue
            if (study.name, question) in known:
                spread, pairs = known[study.name, question]
                source = f"its {pairs} pairs of runs"
            elif known:
                spread, source = (
                    median(each for each, _ in known.values()),
                    f"median of {len(known)} questions with runs",
                )
            else:
                spread, source = SPREAD, "assumed: the median of small digits"
            planned.append(
                _planned(study, question, spread, source, effect, family, sum(seconds[study.name][p] for p in places))
            )
    return planned


def _planned(
    study: Study, question: Question, spread: float, source: str, effect: float | None, family: int, seconds: float
) -> Planned:
    alpha, places = ALPHA / family, study.contrast(question)
    along_sizes = question.kind == TREND and question.over == "size"
    variants = len({size for _, size in places}) if along_sizes else len(study.variants)
    difference = 0.0 if question.kind == EQUIVALENCE else 2 * question.margin if effect is None else abs(effect)
    levels = dict.fromkeys(range(2, MOST + 1), alpha)
    kind, margin = question.kind, question.margin
    power = simulated(kind, margin, difference, spread, variants, levels).mean(axis=0)
    none = simulated(EQUIVALENCE, margin, 0.0, spread, variants, levels).mean(axis=0)

    def needed(by_repetition: np.ndarray) -> int | None:
        return next((n for n, each in zip(levels, by_repetition, strict=True) if each >= POWER), None)

    if study.max_repetitions is None:
        reached = 0.0 if study.repetitions < 2 else float(power[min(study.repetitions, MOST) - 2])
        expected = None
    else:
        shares = spent(study.repetitions, study.max_repetitions)
        looks = {n: alpha * share for n, share in shares.items() if n > 1}
        decided = simulated(kind, margin, difference, spread, variants, looks)
        ends = np.where(decided.any(axis=1), np.array([*looks])[decided.argmax(axis=1)], study.max_repetitions)
        reached, expected = float(decided.any(axis=1).mean()), float(ends.mean())
    return Planned(
        study.name, question, spread, source, difference, reached, needed(power), needed(none), expected, seconds
    )
