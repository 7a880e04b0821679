"""When a run has leveled off: R_mem no longer rises as training goes on, by a rule over the audits of its snapshots.

Over the last doubling of the training length the highest R_mem must not have risen by more than `noise` standard errors
of the difference of the two estimates, at this audit and at the one before. So a run whose audits stand at lengths
a factor of √2 apart (`audit_steps`) ends at a length between two and three times the one from which R_mem no longer
rose. A run without copies has not leveled off: memorization may set in later. One whose images are all copies has, for
its R_mem cannot rise. The rule sees counts alone, so it is deterministic, and anyone can check it on the curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVELED_OFF, RISING, NO_ONSET, SHORT = "leveled off", "still rising", "no copies yet", "too few snapshots to tell"
ONSET = 0.05  # share of copies from which on memorization has set in
NOISE = 1.0  # standard errors


@dataclass(frozen=True)
class Level:
    """What a run's audits say.

    Attributes:
        state: LEVELED_OFF, RISING, NO_ONSET (below 5 % copies to the end), or SHORT.
        epochs: The length from which R_mem did not rise beyond noise; None unless it leveled off.
    """

    state: str
    epochs: float | None = None

    def __str__(self) -> str:
        if self.epochs is None:
            return self.state
        return f"{self.state} at {self.epochs:,.0f} epochs"


def audit_steps(count: int) -> list[int]:
    """At which multiples of a smallest interval a run of at most `count` audits is audited: 2·√2^j, rounded. The last
    is the whole length, the first √2^(count − 1) times shorter."""
    return [round(2 * math.sqrt(2) ** j) for j in range(count)]


def level_of(audits: Sequence[tuple[float, int, int]], noise: float = NOISE) -> Level:
    """Whether R_mem has leveled off.

    Args:
        audits: (length in epochs, copies, images) of each audited snapshot, in order.
        noise: By how many standard errors of the difference R_mem may have risen over the last doubling.
    """
    if not audits:
        return Level(SHORT)
    best = max(audits, key=lambda audit: audit[1] / audit[2])
    reached = next(audit[0] for audit in audits if not _above(best, audit, noise))
    if best[1] == best[2]:
        return Level(LEVELED_OFF, reached)
    if best[1] < ONSET * best[2]:
        return Level(NO_ONSET)
    if len(audits) < 3 or audits[-2][0] < 2 * audits[0][0] * (1 - 1e-9):
        return Level(SHORT)
    if not all(_no_rise(audits[:last], noise) for last in (len(audits), len(audits) - 1)):
        return Level(RISING)
    return Level(LEVELED_OFF, reached)


def _no_rise(audits: Sequence[tuple[float, int, int]], noise: float) -> bool:
    """Whether the highest share of the last doubling is not above the highest before, beyond noise."""
    half = audits[-1][0] / 2 * (1 + 1e-9)
    before = max((audit for audit in audits if audit[0] <= half), key=lambda audit: audit[1] / audit[2])
    since = max((audit for audit in audits if audit[0] > half), key=lambda audit: audit[1] / audit[2])
    return not _above(since, before, noise)


def _above(higher: tuple[float, int, int], lower: tuple[float, int, int], noise: float) -> bool:
    shares = [(count + 0.5) / (total + 1) for _, count, total in (higher, lower)]
    error = math.sqrt(sum(p * (1 - p) / each[2] for p, each in zip(shares, (higher, lower), strict=True)))
    return higher[1] / higher[2] - lower[1] / lower[2] > noise * error
