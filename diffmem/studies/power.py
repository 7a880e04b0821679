"""What a study will decide before it starts: with how many repetitions, which power, and at which cost.

The difference Δ_r of a question's pairs is taken to be normal with one standard deviation σ_Δ (noise of sampling
included). The power of a direction is that of the two-sided t test, from the noncentral t distribution; that of an
equivalence, of the two one-sided tests when there is no difference. Degrees of freedom are those of
`diffmem.studies.analysis`, and the error is shared among all questions equally (Holm's correction decides a little
more). Of a study that may add repetitions the power is simulated, look by look.

σ_Δ is that of the question's own runs where there is a folder with two pairs or more; else the median over the questions
of that folder; else `SPREAD`, the median over the questions asked of the 113 runs of small digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from diffmem.studies.analysis import ALPHA, FEW, spent, student
from diffmem.studies.findings import Findings
from diffmem.studies.study import EQUIVALENCE, Place, Question, Study

SPREAD = 0.5
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


def freedom_of(repetitions: int, variants: int) -> int:
    """The degrees of freedom of a question of a study with so many variants."""
    return (repetitions - 1) * (max(2, variants) - 1 if repetitions <= FEW else 1)


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
    question: Question, effect: float, spread: float, variants: int, first: int, last: int, alpha: float = ALPHA
) -> tuple[float, float]:
    """(power, repetitions on average) of a study that looks after every one from `first` to `last`."""
    random = np.random.default_rng(0)
    values = random.normal(effect, spread, (_SIMULATED, last))
    others = max(2, variants) - 2  # variants whose spread counts too, while repetitions are few
    extra = random.chisquare(1, (_SIMULATED, last, max(1, others)))[..., :others].sum(axis=2) * spread**2
    ended = np.full(_SIMULATED, last)
    decided = np.zeros(_SIMULATED, dtype=bool)
    for repetitions, share in spent(first, last).items():
        if repetitions < 2:
            continue
        seen, freedom = values[:, :repetitions], freedom_of(repetitions, variants)
        squares = ((seen - seen.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
        if repetitions <= FEW and others:
            own = squares / (repetitions - 1)
            squares = np.maximum((squares + extra[:, 1:repetitions].sum(axis=1)) / freedom, own) * freedom
        error = np.sqrt(squares / freedom / repetitions)
        mean = seen.mean(axis=1)
        level = alpha * share
        if question.kind == EQUIVALENCE:
            now = np.abs(mean) + student(1 - level, freedom) * error < question.margin
        else:
            now = np.abs(mean) > student(1 - level / 2, freedom) * error
        ended = np.where(now & ~decided, repetitions, ended)
        decided |= now
    return float(decided.mean()), float(ended.mean())


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
    known: dict[tuple[str, Question], float] = {}
    for each in found:
        for answer in each.answers:
            latest = answer.latest
            if latest is not None and latest.logit is not None and latest.scale == "logit":
                known[each.study.name, answer.question] = latest.logit.error * math.sqrt(latest.repetitions)
    family = max(1, sum(len(study.questions) for study in studies))
    planned = []
    for study in studies:
        for question in study.questions:
            places = study.contrast(question)
            if not places:
                continue
            if (study.name, question) in known:
                spread, source = known[study.name, question], "its runs"
            elif known:
                spread, source = median(known.values()), f"median of {len(known)} questions with runs"
            else:
                spread, source = SPREAD, "assumed: as small digits"
            planned.append(
                _planned(study, question, spread, source, effect, family, sum(seconds[study.name][p] for p in places))
            )
    return planned


def _planned(
    study: Study, question: Question, spread: float, source: str, effect: float | None, family: int, seconds: float
) -> Planned:
    alpha, variants = ALPHA / family, len(study.variants)
    difference = 0.0 if question.kind == EQUIVALENCE else 2 * question.margin if effect is None else abs(effect)

    def direction(repetitions: int) -> float:
        return power_of_direction(difference, spread, repetitions, freedom_of(repetitions, variants), alpha)

    def equivalence(repetitions: int) -> float:
        return power_of_equivalence(question.margin, spread, repetitions, freedom_of(repetitions, variants), alpha)

    def needed(power: Any) -> int | None:
        return next((n for n in range(2, MOST + 1) if power(n) >= POWER), None)

    power = equivalence if question.kind == EQUIVALENCE else direction
    reached, expected = power(study.repetitions), None
    if study.max_repetitions is not None:
        first, last = study.repetitions, study.max_repetitions
        reached, expected = simulated(question, difference, spread, variants, first, last, alpha)
    return Planned(
        study.name, question, spread, source, difference, reached, needed(power), needed(equivalence), expected, seconds
    )
