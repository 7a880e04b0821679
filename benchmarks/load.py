"""What else the machine does while something is timed: cores that other processes and other guests take."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

LEAST = 0.2  # seconds below which hundredths of a second say nothing
STAT = Path("/proc/stat")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_others() -> float:
    """Cores that others may take while a machine counts as idle: a tenth of one, or 2 % of all."""
    return max(0.1, 0.02 * (os.cpu_count() or 1))


@dataclass(frozen=True)
class Load:
    """Cores, on average over a span of time; None where the system does not say.

    others: taken by processes other than this one and those that it started. steal: that the host gave to others.
    """

    others: float | None
    steal: float | None

    @property
    def idle(self) -> bool:
        """Whether nothing else ran; where the system does not say, it counts as idle."""
        return (self.others or 0.0) + (self.steal or 0.0) <= most_others()

    def columns(self) -> dict[str, str]:
        """Of a row."""
        return {
            name: "" if value is None else f"{value:.2f}"
            for name, value in (("load", self.others), ("steal", self.steal))
        }

    def __str__(self) -> str:
        if self.others is None:
            return "unknown"
        return f"{self.others:.2f} cores by other processes, {self.steal:.2f} stolen by the host"


class Meter:
    """Measures the load from when it is made."""

    def __init__(self) -> None:
        self._began, self._own, self._all = time.perf_counter(), own_seconds(), machine_seconds()

    def load(self) -> Load:
        """The load since then."""
        everyone = machine_seconds()
        seconds = time.perf_counter() - self._began
        if everyone is None or self._all is None or seconds < LEAST:
            return Load(None, None)
        busy, steal = (now - then for now, then in zip(everyone, self._all, strict=True))
        # The clock of the machine ticks in hundredths, once per core.
        others = busy - (own_seconds() - self._own) - 0.01 * (os.cpu_count() or 1)
        return Load(max(0.0, others / seconds), max(0.0, steal / seconds))


def machine_seconds() -> tuple[float, float] | None:
    """Seconds of all cores spent working since the machine started, and seconds stolen; None without /proc/stat."""
    if not STAT.exists():
        return None
    user, nice, system, _, _, irq, softirq, *rest = map(int, STAT.read_text().split("\n", 1)[0].split()[1:])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, (rest[0] if rest else 0) / tick


def own_seconds() -> float:
    """CPU seconds of this process and all its descendants, those that have ended included."""
    own = os.times()
    living = sum(_seconds(pid) for pid in _descendants(os.getpid()))
    return own.user + own.system + own.children_user + own.children_system + living


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            born = [int(each) for each in children.read_text().split()]
        except OSError:  # the thread has ended
            continue
        for child in born:
            found += [child, *_descendants(child)]
    return found


def _seconds(pid: int) -> float:
    try:
        numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return 0.0
    return sum(map(int, numbers[11:15])) / os.sysconf("SC_CLK_TCK")


def wait_until_idle(longest: float, span: float = 2.0) -> Load:
    """Waits until a span of time passes in which nothing else runs, `longest` seconds at most; the last span's load."""
    ends = time.monotonic() + longest
    while True:
        meter = Meter()
        time.sleep(span)
        load = meter.load()
        if load.idle or time.monotonic() >= ends:
            return load
