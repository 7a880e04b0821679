"""How every benchmark measures and reports: values first, then time.

A benchmark is a module `bench_<subject>.py` with a function `run(bench)`. It calls `bench.compare(workload,
contenders, check)`: the contenders are run once, their answers are checked, and only then they are timed, warm, in
turns, so that what else the machine does falls on all of them alike. What it does is measured meanwhile: a row that was
disturbed is measured again, and written with its load. Rows (`benchmarks/rows.py` says what they hold) go to
`results/<subject>.<machine>.csv` as soon as they are there, and replace earlier ones of the same workload. A row that
was measured on this machine with the code as it is now is kept, unless `redo`.

What a module may say of itself, for the plan of `python -m benchmarks`:

    MINUTES = 12                 # what it takes on two cores, where it has never been measured here
    VALUES = "detection.csv"     # it measures values, not time: the table that it writes
    ISAS = ("avx2",)             # instruction sets that it is measured with beside the best one
"""

from __future__ import annotations

import getpass
import hashlib
import importlib.metadata
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.load import Load, Meter, cores, wait_until_idle
from benchmarks.rows import COLUMNS, Row, groups, merge_table, read_table, spread

__all__ = ["COLUMNS", "RESULTS", "Bench", "Contender", "environment", "read_table"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
SHORT = 1.0  # seconds below which a run is repeated untimed before each timed one: another contender emptied the caches
LONGEST = 40.0  # seconds of timing per contender, after which no repeat is added
LEAST, MOST_REPEATS = 1.0, 40  # seconds of timing per contender until which repeats are added, and how many at most
ATTEMPTS, PATIENCE = 3, 60.0  # times a disturbed row is measured, and seconds of waiting before each
# What decides what is measured, and what does not.
CODE = ("diffmem", "csrc", "benchmarks", "setup.py", "CMakeLists.txt", ":!benchmarks/results", ":!benchmarks/*.md")


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Args:
        name: As the table shows it; the first contender of a workload is the one under test.
        run: Does the work and returns the answer.
        note: How it is used.
        package: The distribution whose version the row names; by default diffmem's or PyTorch's, by the name.
    """

    name: str
    run: Callable[[], Any]
    note: str = ""
    package: str = ""

    @property
    def version(self) -> str:
        """Package and version, or nothing where it is not installed."""
        known = {"diffmem": "diffmem", "faiss": "faiss-cpu"}
        package = self.package or known.get(re.split(r"\W", self.name)[0], "torch")
        return package_version(package)


@dataclass
class Bench:
    """One subject being measured.

    Args:
        subject: Of `bench_<subject>.py`.
        quick: Smaller workloads, one repeat, in a table of their own.
        only: Run workloads whose name contains one of these texts; all where there are none.
        redo: Measure rows that are there already.
        busy: Take rows as they come, however busy the machine is.
        folder: Of the tables.
    """

    subject: str
    quick: bool = False
    only: tuple[str, ...] = ()
    redo: bool = False
    busy: bool = False
    folder: Path = RESULTS
    rows: list[Row] = field(default_factory=list)

    def wants(self, workload: str) -> bool:
        """Whether the workload was asked for, and has not been measured yet."""
        return (not self.only or any(text in workload for text in self.only)) and not self.measured(workload)

    def measured(self, workload: str) -> bool:
        """Whether the table holds the workload, timed here while nothing else ran, by the code as it is now."""
        if self.redo or self.quick:
            return False
        found = groups(read_table(self.path)).get((workload, isa()), [])
        return bool(found) and all(is_current(row) for row in found)

    def compare(
        self,
        workload: str,
        contenders: list[Contender],
        check: Callable[[dict[str, Any]], None] | None = None,
        repeats: int = 5,
    ) -> None:
        """Checks the contenders' answers, times them, records a row each.

        Args:
            workload: What is done, with its sizes.
            contenders: The one under test first, then its baselines.
            check: Gets the answers by name and raises where they are wrong.
            repeats: At least; short work is repeated for LEAST seconds.
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
        attempts: list[tuple[Load, dict[str, list[float]]]] = []
        while not attempts or (len(attempts) < ATTEMPTS and not attempts[-1][0].idle and not (self.busy or self.quick)):
            if attempts:
                print(f"{workload}: not alone ({attempts[-1][0]}), again", flush=True)
                wait_until_idle(PATIENCE)
            meter = Meter()
            times = in_turns(contenders, warming, 1 if self.quick else repeats, 0.0 if self.quick else LEAST)
            attempts.append((meter.load(), times))
        load, times = min(attempts, key=lambda attempt: (attempt[0].others or 0) + (attempt[0].steal or 0))
        first = statistics.median(times[contenders[0].name])
        for contender in contenders:
            measured = times[contender.name]
            self.record(
                workload, contender.name, contender.note, version=contender.version, **spread(measured),
                ratio=f"{statistics.median(measured) / first:.4g}", **load.columns(),
            )  # fmt: skip
        self.write()

    def record(self, workload: str, contender: str, note: str = "", **values: str) -> None:
        """Adds a row and prints it."""
        row = environment() | {"subject": self.subject, "workload": workload, "contender": contender, "note": note}
        self.rows.append(row | values)
        print(
            f"{workload:44} {contender:26} {values.get('seconds', ''):>12} s  x{values.get('ratio', '')}  {note}",
            flush=True,
        )

    @property
    def path(self) -> Path:
        """The subject's table for this machine. Quick runs are kept apart."""
        return self.folder / f"{self.subject}.{machine_slug()}{'.quick' if self.quick else ''}.csv"

    def write(self) -> None:
        """Merges the rows into the table."""
        merge_table(self.path, self.rows)


def in_turns(
    contenders: list[Contender], warming: dict[str, float], repeats: int, least: float
) -> dict[str, list[float]]:
    """Seconds of each contender's runs, by name; at least so many, and until they have taken `least` seconds."""
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}

    def missing(name: str) -> bool:
        taken = sum(times[name])
        if taken > LONGEST or len(times[name]) >= max(repeats, MOST_REPEATS):
            return False
        return len(times[name]) < repeats or taken < least

    while any(missing(name) for name in times):
        for contender in contenders:
            if not missing(contender.name):
                continue
            if warming[contender.name] < SHORT:
                contender.run()
            start = time.perf_counter()
            contender.run()
            times[contender.name].append(time.perf_counter() - start)
    return times


# ------------------------------------------------------------------------------------------------ where it is measured


@cache
def machine() -> str:
    """Processor, its family and model, and number of cores."""
    name, kind = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        first = info.read_text().split("\n\n", 1)[0]
        found = dict(re.findall(r"^([\w ]+?)\s*:\s*(.+)$", first, re.MULTILINE))
        name = found.get("model name", name)
        if "cpu family" in found and "model" in found:
            kind = f" (family {found['cpu family']}, model {found['model']})"
    return f"{name}{kind}, {cores()} cores"


def machine_slug() -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine().lower()).strip("-")


@cache
def isa() -> str:
    """The instruction set that the work is held to: of the compiled core, or of PyTorch where there is none."""
    import torch

    from diffmem.ops.registry import native_module

    core = native_module()
    return str(core.cpu_level()) if core else f"torch {torch.backends.cpu.get_cpu_capability().lower()}"


@cache
def best_isa() -> str:
    """The best instruction set of this machine, whatever this process is held to."""
    from diffmem.ops.registry import native_module

    core = native_module()
    if core is None:
        return isa()
    found = set(core.cpu_features())
    needed = {"avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"}, "avx2": {"avx2", "fma", "bmi2"}}
    return next((level for level, features in needed.items() if features <= found), "portable")


def held_to(level: str) -> dict[str, str]:
    """Environment variables that hold diffmem's core and the baselines' libraries to an instruction set."""
    if level == "avx2":
        return {
            "DIFFMEM_CPU": "avx2",
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "FAISS_OPT_LEVEL": "AVX2",
            # Its keys leave ATEN_CPU_CAPABILITY out: code made for wider vectors would be taken, with wrong values.
            "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"torchinductor-{getpass.getuser()}-avx2"),
        }
    return {"DIFFMEM_CPU": level}


@cache
def package_version(package: str) -> str:
    """Package and version, nothing where it is not installed."""
    if package == "diffmem":
        from diffmem import __version__

        return f"diffmem {__version__}"
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def environment() -> Row:
    """Instruction set, threads, machine, versions, commit and date: the same columns in every row."""
    import torch  # here, so that a process that compares small things need not

    versions = map(package_version, ("torch", "numpy", "faiss-cpu", "faiss-gpu", "triton"))
    return {
        "isa": isa(),
        "machine": machine(),
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join(filter(None, versions)),
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def git(*arguments: str, tree: Path = ROOT) -> str | None:
    """What git says, None where it says nothing or is not there."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=tree).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def commit(tree: Path = ROOT) -> str:
    """The checkout's commit; with + and a digest of the differences where the code that is measured differs from it."""
    found = (git("rev-parse", "--short", "HEAD", tree=tree) or "").strip()
    changed = git("diff", "HEAD", "--", *CODE, tree=tree)
    strangers = git("ls-files", "--others", "--exclude-standard", "--", *CODE, tree=tree)
    if not found or not (changed or strangers):
        return found
    digest = hashlib.sha256((changed or "").encode())
    for name in (strangers or "").splitlines():
        digest.update(name.encode() + (tree / name).read_bytes())
    return f"{found}+{digest.hexdigest()[:4]}"


@cache
def unchanged_since(earlier: str) -> bool:
    """Whether the code that is measured is that of an earlier commit, whatever else has changed since."""
    if earlier == commit():
        return bool(earlier)
    if not earlier or "+" in earlier or "+" in commit():
        return False
    # A commit that is not there, and a difference, both give None.
    return git("diff", "--quiet", earlier, "HEAD", "--", *CODE) is not None


def is_current(row: Row) -> bool:
    """Whether a row would be the same if it were measured now: this machine, this code, these versions, nothing else
    running."""
    now = environment()
    same = all(row.get(name, "") == now[name] for name in ("isa", "machine", "threads", "versions"))
    return same and unchanged_since(row["commit"]) and is_idle(row)


def is_idle(row: Row) -> bool:
    """Whether the machine was known to be idle while the row was timed."""
    if not row.get("load"):
        return not Path("/proc/stat").exists()
    return Load(float(row["load"]), float(row.get("steal") or 0)).idle
