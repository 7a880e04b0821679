"""Where units run: in this process, in a pool of processes, or on the machines of a Ray cluster.

An executor has a number of slots and a method `submit`, which returns a future of the unit's result. It knows nothing
of the ledger, which `run_units` keeps.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from diffmem.studies.measure import Result, run_unit
from diffmem.studies.unit import Unit


class Executor(Protocol):
    """slots: units that run at the same time."""

    slots: int

    def submit(self, unit: Unit, folder: Path) -> Future[Result]:
        """Starts a unit."""
        ...

    def close(self) -> None:
        """Ends what still runs."""
        ...


class InProcess:
    """One unit after another, here. device: as for `run_unit`."""

    slots = 1

    def __init__(self, device: str = "auto"):
        self.device = device

    def submit(self, unit: Unit, folder: Path) -> Future[Result]:
        future: Future[Result] = Future()
        try:
            future.set_result(run_unit(unit, folder, self.device))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        pass
