"""Medians, ranges and what follows from them, by clocks that are told what to say."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmem.progress import _Log
from diffmem.timing import CompileCost, TimeLeft, Timing, compiling_pays, duration_range, measure, timing_of


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def measured(seconds, budget: float = 1e9) -> tuple[Timing, int]:
    """What `measure` makes of an action that takes these seconds, one run after another, and how often it ran."""
    clock, left, runs = Clock(), iter(seconds), itertools.count()

    def action():
        clock.now += next(left)
        next(runs)

    found = measure(action, budget, clock)
    return found, next(runs)


def test_warm_up_and_noise_do_not_count():
    found, runs = measured([100, 3, 2, 1, 1, 1, 1, 1])
    assert found.median == 1
    assert runs == 7
    noisy = [9, 1, 1, 1, 30, 1, 1, 1.1, 1, 40, 1, 1, 1, 1, 1, 1, 1] + [1] * 30
    assert measured(noisy)[0].median == 1


def test_slow_work_is_measured_once_and_says_how_little_that_is():
    found, runs = measured([50, 40, 40], budget=2)
    assert runs == 2
    assert found == (40, 24, 56)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9))
def test_range_holds_the_median_and_has_a_width(seconds):
    found = timing_of(seconds)
    assert min(seconds) <= found.median <= max(seconds)
    assert found.low <= 0.86 * found.median
    assert found.high >= 1.14 * found.median


@pytest.mark.parametrize(
    ("seconds", "steps", "parameters", "pays"),
    [
        (0.07, 1000, 78_385, False),  # a tiny network, a short run
        (0.4, 10**6, 78_385, False),  # tiny, however long, and however slow the machine was when asked
        (0.5, 1000, 35_000_000, False),  # minutes
        (1.0, 3 * 3600, 35_000_000, True),
        (1.0, 3600, 35_000_000, False),
    ],
)
def test_compiles_only_what_gains(seconds, steps, parameters, pays):
    cost = CompileCost(170, 0.07, 500_000)
    assert compiling_pays(timing_of([seconds] * 5), steps, parameters, cost) is pays
    assert not compiling_pays(timing_of([seconds] * 5), steps, parameters, None)


def test_one_slow_moment_does_not_decide():
    cost = CompileCost(170, 0.07, 500_000)
    assert not compiling_pays(measured([9, 8, 1, 9, 1, 1, 9, 1, 1] + [1] * 30)[0], 4000, 10**7, cost)


def test_time_left_is_a_range():
    left = TimeLeft()
    assert left.range(100) is None
    for speed in (10, 10, 20, 10, 5, 10):
        left.add(speed)
    low, high = left.range(1000)
    assert low < 100 < high
    assert high < 250


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (40, 55, "40 to 55 seconds"),
        (100, 300, "1.7 to 5 minutes"),
        (3600 * 5, 3600 * 5.01, "5 hours"),
        (86400 * 11.6, 86400 * 14.4, "12 to 14 days"),
        (0, 0.2, "0 to 0.2 seconds"),
    ],
)
def test_duration_range(low, high, text):
    assert duration_range(low, high) == text


def test_log_lines_give_a_range(monkeypatch, capsys):
    import sys

    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    log = _Log(sys.stdout)
    for done in range(101):
        log("reading", done, 1000)
        clock.now += 1.0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "reading: 30 of 1,000, 1/s, 14 to 19 minutes left"
    assert len(lines) == 3
