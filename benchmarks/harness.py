"""How every benchmark measures and reports: values first, then time.

A benchmark is a module `bench_<subject>.py` with a function `run(bench)`. It calls `bench.compare(workload,
contenders, check)`: the contenders are run once, their answers are checked, and only then they are timed, warm, in
turns, so that what else the machine does falls on all of them alike. Each row of the table holds the median of the
repeats, the machine, the versions and the commit; rows go to `results/<subject>.<machine>.csv` as soon as they are
there, and replace earlier ones of the same workload and contender.
"""

from __future__ import annotations

import csv
import importlib.metadata
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "workload", "contender", "seconds", "fastest", "repeats", "ratio", "note", "machine", "threads", "versions",
    "commit", "date",
)  # fmt: skip
SHORT = 1.0  # seconds below which a run is repeated untimed before each timed one: another contender emptied the caches
LONGEST = 40.0  # seconds of timing per contender, after which no repeat is added


@dataclass(frozen=True)
class Contender:
    """One way to do the work: `run()` returns the answer, `note` says how it is used."""

    name: str
    run: Callable[[], Any]
    note: str = ""


@dataclass
class Bench:
    """One subject being measured.

    quick: smaller workloads, one repeat. only: run workloads whose name contains this.
    """

    subject: str
    quick: bool = False
    only: str = ""
    rows: list[dict[str, str]] = field(default_factory=list)

    def wants(self, workload: str) -> bool:
        return self.only in workload

    def compare(
        self,
        workload: str,
        contenders: list[Contender],
        check: Callable[[dict[str, Any]], None] | None = None,
        repeats: int = 5,
    ) -> None:
        """Checks the contenders' answers (by name; `check` raises where they are wrong), times them, records a row
        each.

        `ratio` of a row is that contender's time in times of the first one, the one under test.
        """
        if not self.wants(workload):
            return
        answers, warming = {}, {}
        for contender in contenders:  # also the warm-up
            start = time.perf_counter()
            answers[contender.name] = contender.run()
            warming[contender.name] = time.perf_counter() - start
        if check is not None:
            check(answers)
        answers.clear()
        times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for _ in range(1 if self.quick else repeats):
            for contender in contenders:
                if sum(times[contender.name]) > LONGEST:
                    continue
                if warming[contender.name] < SHORT:
                    contender.run()
                start = time.perf_counter()
                contender.run()
                times[contender.name].append(time.perf_counter() - start)
        first = statistics.median(times[contenders[0].name])
        for contender in contenders:
            measured = times[contender.name]
            median = statistics.median(measured)
            self.record(
                workload,
                contender.name,
                contender.note,
                seconds=f"{median:.6g}",
                fastest=f"{min(measured):.6g}",
                repeats=str(len(measured)),
                ratio=f"{median / first:.4g}",
            )
        self.write()

    def record(self, workload: str, contender: str, note: str = "", **values: str) -> None:
        """Adds a row and prints it."""
        row = environment() | {"workload": workload, "contender": contender, "note": note, **values}
        self.rows.append(row)
        print(
            f"{workload:44} {contender:26} {values.get('seconds', ''):>12} s  x{values.get('ratio', '')}  {note}",
            flush=True,
        )

    @property
    def path(self) -> Path:
        """The subject's table for this machine. Quick runs are kept apart."""
        return RESULTS / f"{self.subject}.{machine_slug()}{'.quick' if self.quick else ''}.csv"

    def write(self) -> None:
        """Merges the rows into the table."""
        self.path.parent.mkdir(exist_ok=True)
        table = {(row["workload"], row["contender"]): row for row in read_table(self.path)}
        table |= {(row["workload"], row["contender"]): row for row in self.rows}
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(table.values())
        partial.replace(self.path)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table, none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def machine() -> str:
    """Processor and number of cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        name = found[1]
    return f"{name}, {torch.get_num_threads()} cores"


def machine_slug() -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine().lower()).strip("-")


def environment() -> dict[str, str]:
    """Machine, thread count, versions, commit and date: the same columns in every row."""
    versions = []
    for package in ("torch", "numpy", "faiss-cpu", "faiss-gpu", "triton"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": machine(),
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join(versions),
        "commit": commit(),
        "date": date.today().isoformat(),
    }


@cache
def commit() -> str:
    """The checkout's commit, with a + where the tree differs from it."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()
