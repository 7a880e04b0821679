"""What runs say of a law of the field: its tests with their verdicts, and the estimates they rest on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from diffmem.studies.analysis import ALPHA, CONTRARY, HOLDS, UNDECIDED, UNMEASURED, Effect, holm


@dataclass(frozen=True)
class Test:
    """One sentence of a law.

    Attributes:
        text: The sentence.
        p_holds: Of its not being so: small where it is shown to hold.
        p_contrary: Of its being so.
        verdict: HOLDS, CONTRARY, UNDECIDED or UNMEASURED.
        adjusted: The p-value on which the verdict rests, corrected for the number of tests.
        family: How many these are.
        basis: The estimate that it rests on, and what is asked of it, in words.
    """

    text: str
    p_holds: float = 1.0
    p_contrary: float = 1.0
    verdict: str = UNMEASURED
    adjusted: float = 1.0
    family: int = 1
    basis: str = ""

    @property
    def p(self) -> float:
        """The smaller one of the two, of which one at most is that of a true hypothesis."""
        return min(self.p_holds, self.p_contrary)


def figures(value: float, interval: tuple[float, float]) -> str:
    """A number and its interval in words: of two decimal places up to a hundred, whole beyond."""
    decimals = 0 if abs(value) >= 100 else 2
    low, high = interval
    return f"{value:,.{decimals}f} ({low:,.{decimals}f} to {high:,.{decimals}f})".replace("-", "−")


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval, and what it rests on."""

    name: str
    value: float
    interval: tuple[float, float]
    basis: str

    @property
    def figures(self) -> str:
        """The number and its interval."""
        return figures(self.value, self.interval)


@dataclass(frozen=True)
class LawFinding:
    """What is known of a law.

    Attributes:
        name: Its study's law.
        source: Who found it.
        tests: Its sentences; the first one is the law, others are beside it.
        estimates: What they rest on.
        notes: What a reader should know, a sentence each.
        details: Further numbers, in JSON types.
    """

    name: str
    source: str
    tests: tuple[Test, ...]
    estimates: tuple[Estimate, ...]
    notes: tuple[str, ...]
    details: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Everything in plain JSON types."""
        return {
            "law": self.name,
            "source": self.source,
            "tests": [asdict(test) for test in self.tests],
            "estimates": [{**asdict(each), "interval": list(map(_finite, each.interval))} for each in self.estimates],
            "notes": list(self.notes),
            **self.details,
        }


def _finite(end: float) -> float | None:
    return end if math.isfinite(end) else None


def corrected(findings: Sequence[LawFinding | None]) -> list[LawFinding | None]:
    """Laws with verdicts that hold together (Holm 1979, at 5 %): the tests of all laws of a report are one family."""
    measured = [test for each in findings if each is not None for test in each.tests if test.verdict != UNMEASURED]
    adjusted = dict(zip(map(id, measured), holm([test.p for test in measured]), strict=True))

    def judged(test: Test) -> Test:
        return _judged(test, adjusted[id(test)], len(measured)) if id(test) in adjusted else test

    return [None if each is None else replace(each, tests=tuple(map(judged, each.tests))) for each in findings]


def tested(text: str, p_holds: float, p_contrary: float, basis: str) -> Test:
    """A test by itself, at 5 %."""
    test = Test(text, p_holds, p_contrary, basis=basis)
    return _judged(test, test.p, 1)


def _judged(test: Test, adjusted: float, family: int) -> Test:
    verdict = UNDECIDED if adjusted > ALPHA else HOLDS if test.p_holds < test.p_contrary else CONTRARY
    return replace(test, verdict=verdict, adjusted=adjusted, family=family)


def mean_of(values: Sequence[float], least: float = 0.0) -> Effect:
    """The mean of two values or more, with its error.

    Args:
        values: The values.
        least: The standard deviation that single values have at least.
    """
    spread = max(float(np.std(values, ddof=1)), least)
    return Effect(float(np.mean(values)), spread / math.sqrt(len(values)), len(values) - 1)
