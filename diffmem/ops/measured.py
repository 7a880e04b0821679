"""Which of several ways to compute the same is fastest on a device: measured once and remembered.

A `Remembered` choice is kept in memory and in one file for all processes of this user,
`$DIFFMEM_CACHE/choices.json` (by default in ~/.cache/diffmem). Where that cannot be read or written, every process
measures for itself. Delete the file to have everything measured again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffmem.atomic_io import atomic_write
from diffmem.errors import InputError


def seconds_of(
    ways: dict[str, Callable[[], object]],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    runs: int = 1,
) -> dict[str, float]:
    """Seconds per run of each of `ways`, each run once to warm up, then `runs` times with the device synchronized
    around them."""
    seconds = {}
    for name, run in ways.items():
        run()
        _synchronize(device)
        started = clock()
        for _ in range(runs):
            run()
        _synchronize(device)
        seconds[name] = (clock() - started) / runs
    return seconds


def fastest(
    ways: dict[str, Callable[[], object]], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> str:
    """The name of the quickest of `ways`; nothing is run where there is only one."""
    if len(ways) == 1:
        return next(iter(ways))
    seconds = seconds_of(ways, device, clock)
    return min(seconds, key=seconds.get)


def device_name(device: torch.device) -> str:
    """What measurements on `device` are filed under: its model, and the versions whose kernels they timed."""
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{model}, torch {torch.__version__}"


def cache_file() -> Path:
    """Where choices are kept."""
    folder = os.environ.get("DIFFMEM_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "diffmem") / "choices.json"


@dataclass
class Remembered:
    """The measured choices of one op: {device: {case: {way: seconds}}}, read from the file when first asked."""

    op: str
    path: Path | None = None
    table: dict[str, dict[str, dict[str, float]]] | None = field(default=None, repr=False)

    def best(self, device: str, case: str) -> str | None:
        """The way that was fastest, or None where it was not measured."""
        seconds = self._loaded().get(device, {}).get(case)
        return min(seconds, key=seconds.get) if seconds else None

    def add(self, device: str, case: str, seconds: dict[str, float]) -> None:
        """Remembers a measurement, and writes it beside what other processes have written by now."""
        self._loaded().setdefault(device, {})[case] = seconds
        path = self.path or cache_file()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            everything = _read(path)
            everything.setdefault(self.op, {}).setdefault(device, {})[case] = seconds
            atomic_write(path, json.dumps(everything, indent=1) + "\n", durable=False)
        except (OSError, InputError):
            return  # remembered by this process only

    def _loaded(self) -> dict[str, dict[str, dict[str, float]]]:
        if self.table is None:
            self.table = _read(self.path or cache_file()).get(self.op, {})
        return self.table


def _read(path: Path) -> dict:
    """The file's {op: {device: {case: {way: seconds}}}}, empty where it cannot be read as that."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    good = isinstance(found, dict) and all(
        isinstance(cases, dict)
        and all(
            isinstance(ways, dict) and ways and all(isinstance(seconds, float) for seconds in ways.values())
            for ways in cases.values()
        )
        for devices in found.values()
        for cases in (devices.values() if isinstance(devices, dict) else [None])
    )
    return found if good else {}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
