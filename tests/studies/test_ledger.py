"""The ledger under several writers, and trials under a lease."""

import multiprocessing
import os

import pytest

from diffmem.data import DatasetSpec
from diffmem.errors import InputError
from diffmem.studies import Setting, Trial
from diffmem.studies.ledger import ATTEMPTS, DONE, FAILED, LEASE_SECONDS, RUNNING, WAITING, Ledger

TRIALS = [Trial(Setting(DatasetSpec("builtin:digits"), {"epochs": 1}), size) for size in range(10, 30)]
KEYS = [trial.key for trial in TRIALS]


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ledger_of(folder, holder, clock) -> Ledger:
    ledger = Ledger(folder, holder, clock)
    ledger.add(TRIALS)
    return ledger


def _take_all(folder: str, taken) -> None:
    ledger = Ledger(folder)
    while (key := ledger.claim(KEYS)) is not None:
        taken.put((key, os.getpid()))
        ledger.finish(key, 1.0)


def test_two_processes_share_the_trials_and_none_runs_twice(tmp_path):
    Ledger(tmp_path).add(TRIALS)
    context = multiprocessing.get_context("fork")
    taken = context.Queue()
    workers = [context.Process(target=_take_all, args=(str(tmp_path), taken)) for _ in range(3)]
    for worker in workers:
        worker.start()
    keys = sorted(taken.get(timeout=60)[0] for _ in TRIALS)
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert keys == sorted(KEYS)
    assert taken.empty()
    assert {entry.state for entry in Ledger(tmp_path).entries().values()} == {DONE}


def test_a_lease_that_is_renewed_holds_and_one_that_is_not_runs_out(tmp_path, clock):
    ours, theirs = ledger_of(tmp_path, "here:1", clock), ledger_of(tmp_path, "there:2", clock)
    only = KEYS[:1]
    assert ours.claim(only) == KEYS[0]
    assert theirs.claim(only) is None  # from here on it watches
    clock.now += LEASE_SECONDS - 1
    ours.renew(only)
    assert theirs.claim(only) is None
    clock.now += LEASE_SECONDS - 1
    assert theirs.claim(only) is None
    clock.now += 2
    assert theirs.claim(only) == KEYS[0]
    # The first holder comes back: what it says no longer counts.
    ours.finish(KEYS[0], 5.0)
    ours.release(KEYS[0])
    entry = ours.entries()[KEYS[0]]
    assert (entry.state, entry.holder) == (RUNNING, "there:2")


def test_a_trial_whose_holder_keeps_dying_is_given_up(tmp_path, clock):
    ledger = ledger_of(tmp_path, "there:2", clock)
    for _ in range(100):
        ledger.claim(KEYS[:1])
        clock.now += LEASE_SECONDS / 2 + 1
    entry = ledger.entries()[KEYS[0]]
    assert entry.state == FAILED
    assert "died" in entry.error


def test_the_trial_of_a_dead_process_of_this_machine_is_free_at_once(tmp_path, clock):
    context = multiprocessing.get_context("fork")
    gone = context.Process(target=lambda: Ledger(tmp_path).claim(KEYS[:1]))
    Ledger(tmp_path).add(TRIALS)
    gone.start()
    gone.join(timeout=60)
    ledger = Ledger(tmp_path)
    assert ledger.entries()[KEYS[0]].state == RUNNING
    assert ledger.claim(KEYS[:1]) == KEYS[0]


@pytest.mark.parametrize(
    ("changed", "gone"),
    [
        ({}, False),  # this process, which lives
        ({3: "4194300"}, True),  # of this container, and its number is nobody's
        ({4: "1"}, True),  # of this container; its number is another's by now
        ({2: "1", 3: "4194300"}, False),  # of another container, whose numbers mean others
        ({1: "another-boot", 3: "4194300"}, False),  # of another machine, or this one before it was started again
        ({0: "another name of this host", 3: "4194300"}, True),
    ],
)
def test_a_process_is_gone_only_where_it_would_be_seen(tmp_path, changed, gone):
    parts = Ledger(tmp_path).holder.split(":")
    for place, value in changed.items():
        parts[place] = value
    ledger = Ledger(tmp_path, ":".join(parts))
    ledger.add(TRIALS)
    assert ledger.claim(KEYS[:1]) == KEYS[0]
    assert Ledger(tmp_path).claim(KEYS[:1]) == (KEYS[0] if gone else None)


def test_wall_clocks_decide_nothing(tmp_path, clock, monkeypatch):
    """A clock that is set back or forth, here or where the holder runs, neither loses a lease nor keeps a dead one."""
    ours, theirs = ledger_of(tmp_path, "here:1", clock), ledger_of(tmp_path, "there:2", clock)
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert ours.claim(KEYS[:1]) == KEYS[0]
    monkeypatch.setattr("time.time", lambda: 10.0)
    assert theirs.claim(KEYS[:1]) is None
    clock.now += LEASE_SECONDS + 1
    assert theirs.claim(KEYS[:1]) == KEYS[0]


def test_failures_are_tried_again_last_and_not_for_ever(tmp_path, clock):
    ledger = ledger_of(tmp_path, "here:1", clock)
    assert ledger.claim(KEYS[:2]) == KEYS[0]
    ledger.fail(KEYS[0], "out of memory", 3.0)
    assert ledger.claim(KEYS[:2]) == KEYS[1]
    ledger.release(KEYS[1])
    assert ledger.entries()[KEYS[1]].state == WAITING
    assert ledger.claim(KEYS[:1]) == KEYS[0]
    ledger.fail(KEYS[0], "out of memory", 4.0)
    assert ledger.claim(KEYS[:1]) is None
    entry = ledger.entries()[KEYS[0]]
    assert (entry.state, entry.attempts, entry.seconds, entry.error) == (FAILED, ATTEMPTS, 7.0, "out of memory")
    assert ledger.retry(KEYS) == 1
    assert ledger.claim(KEYS[:1]) == KEYS[0]


def test_something_else_is_no_ledger(tmp_path):
    (tmp_path / "ledger.sqlite").write_text("not a database, but long enough to be taken for one" * 50)
    with pytest.raises(InputError, match="cannot be used as a ledger"):
        Ledger(tmp_path)
