"""The autotune cache: which backend of an op is fastest on a device, measured once and remembered.

An `AutotuneCache` is kept in memory and in one file for all processes of this user, `$DIFFMEM_CACHE/autotune.json` (by
default in ~/.cache/diffmem). Where that cannot be read or written, every process measures for itself. Delete the file
to have everything measured again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from diffmem.atomic_io import atomic_write
from diffmem.errors import InputError
from diffmem.logs import logger

_log = logger(__name__)
Timing = dict[str, float]  # backend: seconds


def seconds_of(
    backends: dict[str, Callable[[], object]],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    runs: int = 1,
) -> Timing:
    """Seconds per run of each of `backends`, each run once to warm up, then `runs` times with the device synchronized
    around them."""
    seconds = {}
    for name, run in backends.items():
        run()
        _synchronize(device)
        started = clock()
        for _ in range(runs):
            run()
        _synchronize(device)
        seconds[name] = (clock() - started) / runs
    return seconds


def device_name(device: torch.device) -> str:
    """What measurements on `device` are filed under: its model, and the versions whose kernels they timed."""
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{model}, torch {torch.__version__}"


def cache_file() -> Path:
    """Where the cache is kept."""
    folder = os.environ.get("DIFFMEM_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "diffmem") / "autotune.json"


@dataclass
class AutotuneCache:
    """The measurements of one op: {device: {case: {backend: seconds}}}, read from the file when first asked."""

    op: str
    path: Path | None = None
    table: dict[str, dict[str, Timing]] | None = field(default=None, repr=False)

    def best(self, device: str, case: str, among: Collection[str] | None = None) -> str | None:
        """The backend that was fastest, or None where nothing was measured, or what was is not one of `among`."""
        seconds = self._loaded().get(device, {}).get(case)
        found = min(seconds, key=seconds.__getitem__) if seconds else None
        return found if among is None or found in among else None

    def fastest(self, device: str, case: str, among: Collection[str], measure: Callable[[], Timing]) -> str:
        """The fastest of the backends `among`, which `measure` times where that is not known yet."""
        found = self.best(device, case, among)
        if found is None:
            self.add(device, case, measure())
            found = self.best(device, case)
        return cast(str, found)

    def add(self, device: str, case: str, seconds: Timing) -> None:
        """Remembers a measurement, and writes it beside what other processes have written by now."""
        self._loaded().setdefault(device, {})[case] = seconds
        path = self.path or cache_file()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            everything = _read(path)
            everything.setdefault(self.op, {}).setdefault(device, {})[case] = seconds
            atomic_write(path, json.dumps(everything, indent=1) + "\n", durable=False)
        except (OSError, InputError) as error:
            _log.info("%s: cannot be written; the autotuning results are kept for this process only: %s", path, error)

    def _loaded(self) -> dict[str, dict[str, Timing]]:
        if self.table is None:
            self.table = _read(self.path or cache_file()).get(self.op, {})
        return self.table


def _read(path: Path) -> dict[str, Any]:
    """The file's {op: {device: {case: {backend: seconds}}}}, empty where it cannot be read as that."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    good = isinstance(found, dict) and all(
        isinstance(cases, dict)
        and all(
            isinstance(backends, dict) and backends and all(isinstance(each, float) for each in backends.values())
            for backends in cases.values()
        )
        for devices in found.values()
        for cases in (devices.values() if isinstance(devices, dict) else [None])
    )
    return found if good else {}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
