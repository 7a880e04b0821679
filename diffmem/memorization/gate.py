"""Gates: whether the share of copies is low enough for what comes next, or cannot be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from diffmem.errors import InputError
from diffmem.html_report import percent, percent_range

PASSED, CLOSED, UNDECIDED = 0, 3, 4  # exit statuses


@dataclass(frozen=True)
class Gate:
    """What `decide_gate` decided.

    Attributes:
        state: "passed", "closed" or "undecided".
        reasons: Why, a sentence for each limit that does not pass.
    """

    state: Literal["passed", "closed", "undecided"]
    reasons: tuple[str, ...] = ()

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


def decide_gate(
    count: int,
    interval: tuple[float, float],
    *,
    fail_above: float | None = None,
    require_below: float | None = None,
    max_copies: int | None = None,
    warnings: Sequence[str] = (),
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

    Raises:
        InputError: No limit is given, or one that is no share or number of images.
    """
    low, high = interval
    if fail_above is None and require_below is None and max_copies is None:
        raise InputError("gate: no limit is given: fail_above, require_below or max_copies")
    for name, share in (("fail_above", fail_above), ("require_below", require_below)):
        if share is not None and not (isinstance(share, Real) and 0 <= share <= 1):
            raise InputError(f"gate: {name} is {share!r}, but must be a share from 0 to 1")
    if max_copies is not None and not (isinstance(max_copies, Integral) and max_copies >= 0):
        raise InputError(f"gate: max_copies is {max_copies!r}, but must be a whole number from 0")
    closed, undecided = [], []
    ends = f"the 95 % interval, {percent_range(interval)},"
    if fail_above is not None and low > fail_above:
        closed.append(f"{ends} lies above {percent(fail_above)}")
    if require_below is not None and high >= require_below:
        if low >= require_below:
            closed.append(f"{ends} does not lie below {percent(require_below)}")
        else:
            undecided.append(f"{ends} straddles {percent(require_below)}: audit more images")
    if max_copies is not None and count > max_copies:
        closed.append(f"{count:,} copies are more than {max_copies:,}")
    undecided += [f"the audit carries a warning: {warning}" for warning in warnings]
    state: Any = "closed" if closed else "undecided" if undecided else "passed"
    return Gate(state, (*closed, *undecided))
