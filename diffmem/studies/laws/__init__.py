"""Laws of the field, read off one grid of watched runs (`diffmem.studies.watch`), sizes by repetitions: when copies
appear (`onset`), what shows it before (`early_warning`), and what lies between copying and generalizing (`spurious`).

A study whose `law` is one of these has a verdict on it in its report, with an interval over runs; its module says how
the verdict is found. These laws share their trials: whichever study runs first, the others need no run of their own.
`crossover` and `halves` are read off runs of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffmem.studies.laws import crossover, early_warning, halves, onset, spurious
from diffmem.studies.laws.finding import Estimate, LawFinding, Test, corrected
from diffmem.studies.laws.regression import Exponent, Time, expected_reach, exponent
from diffmem.studies.measure import Result

_MODULES = {
    "onset": onset,
    "early-warning": early_warning,
    "spurious": spurious,
    "crossover": crossover,
    "halves": halves,
}
SENTENCES: dict[str, str] = {name: module.TEXT for name, module in _MODULES.items()}
SOURCES: dict[str, str] = {name: module.SOURCE for name, module in _MODULES.items()}


def judge(law: str, results: Sequence[Result]) -> LawFinding:
    """What runs of one setting say of a law.

    Args:
        law: one of `diffmem.studies.study.LAWS`.
        results: Runs of several sizes and repetitions.
    """
    ordered = sorted(results, key=lambda result: (result.repetition, result.size))
    found: LawFinding = _MODULES[law].judge([result for result in ordered if result.snapshots])
    return found


__all__ = [
    "SENTENCES",
    "SOURCES",
    "Estimate",
    "Exponent",
    "LawFinding",
    "Test",
    "Time",
    "corrected",
    "expected_reach",
    "exponent",
    "judge",
]
