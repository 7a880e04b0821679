"""The ledger of a study's folder: which trials wait, run, are done or failed, at what cost, in one SQLite file.

Several processes may work from one ledger. A trial is taken under a lease that its holder renews; when the holder dies,
the lease runs out and another takes the trial up, where it continues from what lies in its folder. No clock is shared:
a lease is a number that its holder counts up, and it has run out for whoever saw the same number for `LEASE_SECONDS`,
by a clock of its own that is never set back. It ends at once where the holder was a process that this one can see to be
gone: of the same boot of the machine and the same container, by its number and start time. The file is in WAL mode: it
must not lie on a network file system that several machines write to. Runs on many machines go through one process that
keeps the ledger (see `diffmem.executors`).
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffmem.errors import InputError
from diffmem.studies.trial import Trial

FILE = "ledger.sqlite"
LEASE_SECONDS = 120.0
ATTEMPTS = 2  # after so many failures a trial is left alone
LOSSES = 5  # after so many holders that died with it, too
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS trials (
    key      TEXT PRIMARY KEY,
    spec     TEXT NOT NULL,
    state    TEXT NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'running', 'done', 'failed')),
    holder   TEXT,
    lease    REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    losses   INTEGER NOT NULL DEFAULT 0,
    seconds  REAL NOT NULL DEFAULT 0,
    error    TEXT,
    changed  REAL NOT NULL
)
"""


@dataclass(frozen=True)
class Entry:
    """A line of the ledger.

    state: "waiting", "running", "done" or "failed". holder: who runs it. attempts: how often it was taken and failed.
    seconds: spent on it, over all attempts. error: what the last attempt failed with. changed: Unix time.
    """

    key: str
    state: str
    holder: str | None
    attempts: int
    seconds: float
    error: str | None
    changed: float


class Ledger:
    """The ledger in `folder`, made if need be. holder: the name under which this object takes trials. clock: seconds,
    never set back.

    Raises InputError where the file cannot be opened or is none.
    """

    def __init__(
        self, folder: str | Path, holder: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path = Path(folder) / FILE
        self.holder = holder or f"{socket.gethostname()}:{_process(os.getpid())}:{secrets.token_hex(4)}"
        self._clock = clock
        self._beat = 0
        # What was seen of the leases of others, and since when.
        self._seen: dict[str, tuple[tuple[object, object], float]] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"{self.path}: cannot be used as a ledger ({error})") from None

    def add(self, trials: Sequence[Trial]) -> None:
        """Enters the trials that are not there yet, as waiting."""
        rows = [(trial.key, json.dumps(trial.to_json(), sort_keys=True), time.time()) for trial in trials]
        with self._transaction() as connection:
            connection.executemany("INSERT OR IGNORE INTO trials (key, spec, changed) VALUES (?, ?, ?)", rows)

    def claim(self, keys: Sequence[str]) -> str | None:
        """Takes the first of `keys` that waits, or whose holder is gone, or that failed and may be tried again; None
        where there is none."""
        with self._transaction() as connection:
            known = {row["key"]: row for row in connection.execute("SELECT * FROM trials")}
            lost = [key for key in keys if key in known and self._lost(known[key])]
            for gone in lost:
                if known[gone]["losses"] >= LOSSES:
                    connection.execute(
                        "UPDATE trials SET state = 'failed', attempts = ?, holder = NULL, lease = NULL, error = ?,"
                        " changed = ? WHERE key = ?",
                        (ATTEMPTS, f"{LOSSES + 1} processes died while they ran it", time.time(), gone),
                    )
                    del known[gone]
            waiting = [key for key in keys if key in known and self._free(known[key])]
            # A trial that failed before comes after those that never did.
            key: str | None = min(waiting, key=lambda key: known[key]["attempts"], default=None)
            if key is not None:
                connection.execute(
                    "UPDATE trials SET state = 'running', losses = losses + (state = 'running'), holder = ?, lease = ?,"
                    " changed = ? WHERE key = ?",
                    (self.holder, self._next_beat(), time.time(), key),
                )
            return key

    def renew(self, keys: Sequence[str]) -> None:
        """Extends the leases of trials that this holder runs."""
        with self._transaction() as connection:
            connection.executemany(
                "UPDATE trials SET lease = ? WHERE key = ? AND holder = ? AND state = 'running'",
                [(self._next_beat(), key, self.holder) for key in keys],
            )

    def finish(self, key: str, seconds: float) -> None:
        """The trial is done, after `seconds` in all."""
        self._settle(key, DONE, "error = NULL, seconds = ?", seconds)

    def fail(self, key: str, error: str, seconds: float, attempts: int = 1) -> None:
        """An attempt of `seconds` failed; it counts as so many."""
        changes = "error = ?, seconds = seconds + ?, attempts = attempts + ?"
        self._settle(key, FAILED, changes, error, seconds, attempts)

    def release(self, key: str) -> None:
        """The trial was interrupted: it waits again."""
        self._settle(key, WAITING, "changed = changed")

    def retry(self, keys: Sequence[str]) -> int:
        """Lets failed trials be tried again; returns how many there are."""
        with self._transaction() as connection:
            count = 0
            for key in keys:
                count += connection.execute(
                    "UPDATE trials SET state = 'waiting', attempts = 0, losses = 0 WHERE key = ? AND state = 'failed'",
                    (key,),
                ).rowcount
            return count

    def entries(self) -> dict[str, Entry]:
        """All lines, by key."""
        with self._readable(), closing(self._connect()) as connection:
            names = list(Entry.__dataclass_fields__)
            rows = connection.execute(f"SELECT {', '.join(names)} FROM trials")
            return {row["key"]: Entry(**row) for row in rows}

    def _free(self, row: dict[str, Any]) -> bool:
        return self._lost(row) or row["state"] == WAITING or (row["state"] == FAILED and row["attempts"] < ATTEMPTS)

    def _lost(self, row: dict[str, Any]) -> bool:
        if row["state"] != RUNNING:
            return False
        lease, now = (row["holder"], row["lease"]), self._clock()
        seen, since = self._seen.get(row["key"], (None, now))
        if seen != lease:
            self._seen[row["key"]] = lease, now
            since = now
        return now - since > LEASE_SECONDS or _is_gone(row["holder"])

    def _next_beat(self) -> int:
        self._beat += 1
        return self._beat

    def _settle(self, key: str, state: str, changes: str, *values: object) -> None:
        """What became of a trial, unless another holder has it by now."""
        with self._transaction() as connection:
            connection.execute(
                f"UPDATE trials SET state = ?, {changes}, holder = NULL, lease = NULL, changed = ?"
                " WHERE key = ? AND holder = ?",
                (state, *values, time.time(), key, self.holder),
            )

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=60.0, isolation_level=None)
        connection.row_factory = _row
        return connection

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise InputError(
                f"{self.path}: cannot be used as a ledger ({error}): if it is damaged, delete it: the results of "
                "finished trials are read from their folders"
            ) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Writers wait for each other from the start, not in the middle."""
        with self._readable(), closing(self._connect()) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                connection.execute("ROLLBACK")
                raise


def _row(cursor: sqlite3.Cursor, values: tuple[Any, ...]) -> dict[str, Any]:
    return {column[0]: value for column, value in zip(cursor.description, values, strict=True)}


def _is_gone(holder: str) -> bool:
    """Whether the holder was a process that would be seen here if it still lived, and is not."""
    _, boot, container, number, started, *_ = (*holder.split(":"), "", "", "", "")
    if not boot or (boot, container) != _place() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False  # another user's
    return _start_time(int(number)) not in (started, "?")


def _process(number: int) -> str:
    """A process of this container: boot of the machine, name space of processes, number, start time."""
    return ":".join((*_place(), str(number), _start_time(number)))


def _place() -> tuple[str, str]:
    """The boot of this machine and the name space of this process; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return "", ""


def _start_time(number: int) -> str:
    """When a process began, in ticks since the machine did; "ended" where only its remains are left, "?" where that
    cannot be known."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "?"
    return "ended" if fields[0] in ("Z", "X") else fields[19]
