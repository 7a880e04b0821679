"""`run_trials`: works trials off a ledger through an executor, whatever happens to single ones."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from diffmem.errors import InputError, OutputInUseError
from diffmem.executors import Executor, InProcess
from diffmem.logs import logger
from diffmem.progress import Progress, silent
from diffmem.studies.ledger import ATTEMPTS, DONE, LEASE_SECONDS, RUNNING, Ledger
from diffmem.studies.measure import InterruptedTrialError, Result, read_result, run_trial
from diffmem.studies.trial import Trial

_log = logger(__name__)
_TRIALS = "trials"
_EARLIER = "units"  # what earlier versions called it
_LOOK_SECONDS = 2.0  # between looks at what other processes do
_BUSY_SECONDS = 20.0  # before a trial is tried again whose folder another process writes to


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        trial: The run.
        result: What it found; None where it failed.
        error: What it failed with.
    """

    trial: Trial
    result: Result | None
    error: str | None = None


def trials_folder(root: str | Path) -> Path:
    """Where the trials lie in a study's folder. Raises InputError where an earlier version of diffmem put them."""
    earlier, folder = Path(root) / _EARLIER, Path(root) / _TRIALS
    if earlier.is_dir():
        raise InputError(
            f"{root}: its runs are in {_EARLIER}/, where an earlier version of diffmem kept them: "
            + (f"move its contents to {folder}" if folder.exists() else f"rename that folder to {_TRIALS}")
        )
    return folder


def trial_folder(root: str | Path, trial: Trial) -> Path:
    """Where a trial lies in a study's folder; see `trials_folder`."""
    return trials_folder(root) / trial.key


def run_trials(
    trials: Sequence[Trial],
    root: str | Path,
    executor: Executor | None = None,
    *,
    wait_for_others: bool = True,
    on_trial: Callable[[Outcome], None] = lambda outcome: None,
    progress: Progress = silent,
) -> list[Outcome]:
    """How each of `trials` ended, in their order, after all that are not done yet were run, the first ones first.

    What is done in `root` is not run again, what was interrupted continues; other processes may work in the same
    folder. A run that fails is recorded, tried once more where trying again may help, and does not keep the others from
    running.

    Args:
        trials: The runs.
        root: Folder of ledger and runs.
        executor: See `diffmem.executors`; default: in this process.
        wait_for_others: Wait for runs that other processes hold, or leave them out.
        on_trial: Called with every run that ends here.
        progress: Called as `progress(stage, done, total)`.
    """
    executor = InProcess() if executor is None else executor
    trials_folder(root)  # before anything is written
    root, ledger = Path(root).absolute(), Ledger(root)
    by_key = {trial.key: trial for trial in trials}
    keys = list(by_key)
    ledger.add(list(by_key.values()))
    running: dict[Future[Result], tuple[str, float]] = {}
    held: set[str] = set()
    busy: dict[str, float] = {}  # until when to leave a trial alone

    def settle(future: Future[Result]) -> None:
        key, began = running.pop(future)
        seconds = time.monotonic() - began
        trial = by_key[key]
        try:
            result = future.result()
        except InterruptedTrialError:
            raise KeyboardInterrupt from None
        except OutputInUseError:
            # Its last holder, which let the lease run out (asleep, say), still writes there.
            _log.info("run %s: another process is still writing there; it will be retried later", key)
            ledger.release(key)
            held.discard(key)
            busy[key] = time.monotonic() + _BUSY_SECONDS
            return
        except Exception as error:
            message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            # What is wrong with the input is wrong again.
            ledger.fail(key, message, seconds, attempts=ATTEMPTS if isinstance(error, InputError) else 1)
            _log.warning("run %s failed: %s", key, message)
            outcome = Outcome(trial, None, message)
        else:
            ledger.finish(key, result.seconds)
            outcome = Outcome(trial, result)
        held.discard(key)
        on_trial(outcome)

    def is_busy(key: str) -> bool:
        return busy.get(key, 0.0) > time.monotonic()

    def next_trial() -> str | None:
        while (key := ledger.claim([key for key in keys if not is_busy(key)])) is not None:
            held.add(key)
            if (known := read_result(trial_folder(root, by_key[key]))) is None:
                return key
            ledger.finish(key, known.seconds)
            held.discard(key)
        return None

    with _renewed(ledger, held):
        try:
            while True:
                entries = ledger.entries()
                progress("runs", sum(entries[key].state == DONE for key in keys), len(keys))
                while len(running) < executor.slots and (key := next_trial()) is not None:
                    running[executor.submit(run_trial, by_key[key], trial_folder(root, by_key[key]))] = (
                        key,
                        time.monotonic(),
                    )
                if running:
                    for future in wait(running, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED).done:
                        settle(future)
                elif wait_for_others and any(entries[key].state == RUNNING or is_busy(key) for key in keys):
                    time.sleep(_LOOK_SECONDS)
                else:
                    break
        except BaseException:
            executor.close()
            raise
        finally:
            for key in list(held):
                ledger.release(key)
    entries = ledger.entries()
    return [
        Outcome(
            trial, read_result(trial_folder(root, trial)), None if entry.state == DONE else entry.error or entry.state
        )
        for trial in by_key.values()
        for entry in [entries[trial.key]]
    ]


@contextmanager
def _renewed(ledger: Ledger, held: set[str]) -> Iterator[None]:
    """Renews the leases of the trials held, in a thread of its own, as long as this lasts."""
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(LEASE_SECONDS / 4):
            # A ledger that is busy now is asked again before the lease ends.
            with suppress(sqlite3.OperationalError):
                ledger.renew(list(held))

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
