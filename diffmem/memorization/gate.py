"""Gates: whether the share of copies is low enough for what comes next, or cannot be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from diffmem.atomic_io import atomic_file, check_output_file
from diffmem.errors import InputError
from diffmem.html_report import level, percent, percent_range
from diffmem.memorization.statistics import wilson_interval
from diffmem.memorization.verification import Verification
from diffmem.text import printable

PASSED, CLOSED, UNDECIDED = 0, 3, 4  # exit statuses


State = Literal["passed", "closed", "undecided"]
_BY_MISSES = "widened by what the search may have missed,"
_EXACTLY = "search exactly, or verify=… more images"


@dataclass(frozen=True)
class Gate:
    """What `decide_gate` decided.

    Attributes:
        state: "passed", "closed" or "undecided".
        reasons: Why, a sentence for each limit that does not pass.
        checks: What was asked: (name, state, reason) of each limit, and of the audit's warnings.
        figures: What it was decided by: count, and the interval's ends low and high; of a search that may miss
            neighbors also its recall, how many images were verified, and how many copies exact search would find.
    """

    state: State
    reasons: tuple[str, ...] = ()
    checks: tuple[tuple[str, State, str], ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.state == "passed"

    @property
    def status(self) -> int:
        """The exit status that the command line gives: 0 passed, 3 closed, 4 undecided."""
        return {"passed": PASSED, "closed": CLOSED, "undecided": UNDECIDED}[self.state]

    def __str__(self) -> str:
        return f"gate {self.state}" + (f": {'; '.join(self.reasons)}" if self.reasons else "")

    def to_dict(self) -> dict[str, Any]:
        return {"state": self.state, "reasons": list(self.reasons)}

    def to_junit(self, name: str = "diffmem") -> str:
        """The gate as JUnit XML, which CI systems show among the results of tests: a test case per limit, failed where
        it closed the gate, an error where it is undecided.

        Args:
            name: Name of the test suite.
        """
        states = [state for _, state, _ in self.checks]
        counts = {"tests": len(states), "failures": states.count("closed"), "errors": states.count("undecided")}
        described = {attribute: str(value) for attribute, value in counts.items()}
        root = ElementTree.Element("testsuites", described)
        suite = ElementTree.SubElement(root, "testsuite", {"name": printable(name), **described, "skipped": "0"})
        properties = ElementTree.SubElement(suite, "properties")
        for figure, value in self.figures.items():
            ElementTree.SubElement(properties, "property", {"name": figure, "value": f"{value:.6g}"})
        for check, state, reason in self.checks:
            case = ElementTree.SubElement(suite, "testcase", {"classname": f"{printable(name)}.gate", "name": check})
            if state != "passed":
                kind = {"closed": "failure", "undecided": "error"}[state]
                told = {"message": printable(reason), "type": state}
                ElementTree.SubElement(case, kind, told).text = printable(reason)
        ElementTree.indent(root)
        return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'

    def save_junit(self, path: str | Path, name: str = "diffmem") -> None:
        """Writes `to_junit` to a file.

        Args:
            path: The file.
            name: Name of the test suite.

        Raises:
            InputError: It cannot be written.
        """
        check_output_file(Path(path))
        with atomic_file(Path(path)) as partial:
            partial.write_text(self.to_junit(name), encoding="utf-8")


def decide_gate(
    count: int,
    interval: tuple[float, float],
    *,
    fail_above: float | None = None,
    require_below: float | None = None,
    max_copies: int | None = None,
    warnings: Sequence[str] = (),
    verification: Verification | None = None,
) -> Gate:
    """Whether `count` copies, a share within `interval`, pass the limits that are given.

    Args:
        count: Copies among the images audited.
        interval: The confidence interval of their share.
        fail_above: Closed where the interval's lower end lies above this share, that is, where it is shown to be
            exceeded; passed otherwise, also where too few images show anything.
        require_below: Passed where the interval's upper end lies below this share, that is, where it is shown to be
            kept; closed where the whole interval lies at or above it; undecided where the interval straddles it.
        max_copies: Closed where there are more copies than this, whatever the share.
        warnings: Why the audit must not be relied on: a gate that would pass is undecided.
        verification: Of a search that may miss neighbors: `interval` is then the wider one that covers this, and a
            limit that lies between its end and that of the interval without is undecided, for that reason.

    Raises:
        InputError: No limit is given, or one that is no share or number of images.
    """
    low, high = interval
    if fail_above is None and require_below is None and max_copies is None:
        raise InputError("gate: no limit given: pass fail_above, require_below or max_copies")
    for name, share in (("fail_above", fail_above), ("require_below", require_below)):
        if share is not None and not (isinstance(share, Real) and 0 <= share <= 1):
            raise InputError(f"gate: {name} is {share!r}, but must be a share from 0 to 1")
    if max_copies is not None and not (isinstance(max_copies, Integral) and max_copies >= 0):
        raise InputError(f"gate: max_copies is {max_copies!r}, but must be a whole number from 0")
    checks: list[tuple[str, State, str]] = []
    ends = f"the 95 % interval, {percent_range(interval)},"
    # Without what the search may have missed: what exact search would be expected to say.
    expected, fewest, most = interval, count, count
    if verification is not None and not verification.complete:
        expected = wilson_interval(round(verification.estimate), verification.images)
        fewest, most = verification.count_interval
    state: State
    if fail_above is not None:
        state, reason = "passed", ""
        if low > fail_above:
            state, reason = "closed", f"{ends} is above {percent(fail_above)}"
        elif expected[0] > fail_above:
            state, reason = "undecided", f"{ends} {_BY_MISSES} is not above {percent(fail_above)}: {_EXACTLY}"
        checks.append((f"fail above {level(fail_above)}", state, reason))
    if require_below is not None:
        state, reason = "passed", ""
        if low >= require_below:
            state, reason = "closed", f"{ends} is not below {percent(require_below)}"
        elif high >= require_below:
            missed = not expected[0] < require_below <= expected[1]
            way_out = _EXACTLY if missed else "audit more images"
            why = f" {_BY_MISSES}" if missed else ""
            state, reason = "undecided", f"{ends}{why} straddles {percent(require_below)}: {way_out}"
        checks.append((f"require below {level(require_below)}", state, reason))
    if max_copies is not None:
        state, reason = "passed", ""
        if fewest > max_copies:
            state, reason = "closed", f"{_number(fewest, count)} copies exceed the limit of {max_copies:,}"
        elif most > max_copies:
            state, reason = (
                "undecided",
                (f"exact search would find {fewest:,} to {most:,} copies, and the limit is {max_copies:,}: {_EXACTLY}"),
            )
        checks.append((f"at most {max_copies:,} copies", state, reason))
    for number, warning in enumerate(warnings, 1):
        checks.append((f"warning {number}", "undecided", f"the audit carries a warning: {warning}"))
    closed, undecided = ([reason for _, state, reason in checks if state == kind] for kind in ("closed", "undecided"))
    decided: State = "closed" if closed else "undecided" if undecided else "passed"
    figures: dict[str, float] = {"count": count, "low": low, "high": high}
    if verification is not None:
        figures |= {
            "recall_nearest": verification.recall_nearest, "recall_second": verification.recall_second,
            "verified": verification.verified, "fewest_copies": fewest, "most_copies": most,
        }  # fmt: skip
    return Gate(decided, (*closed, *undecided), tuple(checks), figures)


def _number(fewest: int, count: int) -> str:
    return f"{count:,}" if fewest >= count else f"at least {fewest:,}"
