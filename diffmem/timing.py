"""How long work will take, from a few measurements on a machine that does other things as well: medians and ranges.

Also whether `torch.compile` pays, which follows from that.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

WARM_RUNS = 4  # at most
FEWEST_RUNS, MOST_RUNS = 3, 25
SPREAD = 0.15  # of the median: a range is at least so wide on both sides; machines change their pace
FEW_SPREAD = 0.4  # the same where fewer than FEWEST_RUNS were measured


class Timing(NamedTuple):
    """Seconds that something takes: the median of several runs, and a range about it."""

    median: float
    low: float
    high: float

    def times(self, factor: float) -> Timing:
        return Timing(self.median * factor, self.low * factor, self.high * factor)


def timing_of(seconds: Sequence[float]) -> Timing:
    """The median of measured seconds, with their quartiles, widened to SPREAD (FEW_SPREAD where they are few)."""
    median = statistics.median(seconds)
    spread = FEW_SPREAD if len(seconds) < FEWEST_RUNS else SPREAD
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [median] * 3
    return Timing(median, min(quartiles[0], median * (1 - spread)), max(quartiles[2], median * (1 + spread)))


def measure(
    action: Callable[[], object], budget: float = 2.0, clock: Callable[[], float] = time.perf_counter
) -> Timing:
    """The time of `action`, which is run until it is warm (a run is no longer clearly faster than the one before), and
    then several times: more often where the times differ. budget: seconds, about; one run is measured in any case."""
    began = clock()

    def run() -> float:
        start = clock()
        action()
        return clock() - start

    before = run()
    for _ in range(WARM_RUNS - 1):
        if clock() - began > budget:
            break
        now = run()
        if now > 0.8 * before:
            break
        before = now
    seconds = [run()]
    while len(seconds) < MOST_RUNS and clock() - began + seconds[-1] < budget:
        if len(seconds) >= FEWEST_RUNS:
            found = timing_of(seconds)
            if found.high - found.low <= 2.5 * SPREAD * found.median:
                break
        seconds.append(run())
    return timing_of(seconds)


@dataclass(frozen=True)
class CompileCost:
    """What compiling costs and saves on a kind of device.

    seconds: until the first compiled step, for the large networks; saves: the share of eager time that is gained;
    parameters: networks with fewer never pay: their steps are short, and most of a step is not the network's.
    """

    seconds: float
    saves: float
    parameters: int


def compiling_pays(eager: Timing, steps: int, parameters: int, cost: CompileCost | None) -> bool:
    """Whether a run of `steps` steps that take `eager` gains by compiling at least twice what compiling costs.

    The low end of the range counts: on a busy machine times are too long, never too short. cost None: the device is
    none that can compile.
    """
    if cost is None or parameters < cost.parameters:
        return False
    return eager.low * steps * cost.saves > 2 * cost.seconds


class TimeLeft:
    """The time that is left, as a range, from the speeds of the last `keep` reports."""

    def __init__(self, keep: int = 20) -> None:
        self.seconds_each: deque[float] = deque(maxlen=keep)

    def add(self, speed: float) -> None:
        """speed: of the work since the last report, per second."""
        if speed > 0:
            self.seconds_each.append(1 / speed)

    def range(self, left: float) -> tuple[float, float] | None:
        """Seconds for `left` more of the work, from low to high; None before the first report."""
        if not self.seconds_each:
            return None
        found = timing_of(self.seconds_each).times(left)
        return found.low, found.high


def duration(seconds: float) -> str:
    """A length of time in the unit that suits it: 45 seconds, 3.5 minutes, 2.1 days."""
    unit, length = _unit(seconds)
    number = f"{seconds / length:.{0 if length == 1 else 1}f}"
    return f"{number} {unit.removesuffix('s') if number == '1' else unit}"


def duration_range(low: float, high: float) -> str:
    """A range of lengths of time: 40 to 55 seconds, 3.5 to 5 minutes; one length where both read the same."""
    unit, length = _unit(high)
    first, last = (f"{value / length:.2g}" if value < 10 * length else f"{value / length:.0f}" for value in (low, high))
    return f"{first} to {last} {unit}" if first != last else f"{last} {unit}"


def _unit(seconds: float) -> tuple[str, int]:
    units = (("days", 86400), ("hours", 3600), ("minutes", 60))
    return next(((unit, length) for unit, length in units if seconds >= 2 * length), ("seconds", 1))
