"""What `python -m benchmarks` would measure, what is there already, and how long the rest takes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import ModuleType

from benchmarks.harness import RESULTS, Bench, commit, environment, is_current, isa, machine, unchanged_since
from benchmarks.rows import Row, groups, read_table, write_table

SUBJECTS = tuple(sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")))
MADE = "tables.csv"  # in the folder of results: when, where and from what each subject was measured, and how long
MADE_COLUMNS = ("subject", "isa", "seconds", "workloads", "machine", "versions", "commit", "date")
# Tables that come from trained networks: hours of training, which are commands of their own.
ELSEWHERE = {
    "studies": "diffmem study run …, see benchmarks/results/studies/README.md",
    "optimum": "python -m benchmarks.optimum_results RUNS",
    "trajectory-cifar-100": "diffmem train and diffmem trajectory, see benchmarks/optimum_results.py",
    "gpu.*": "make gpu, on a machine with a GPU",
}


@dataclass(frozen=True)
class Part:
    """A subject at one instruction set.

    Args:
        subject: Of `bench_<subject>.py`.
        isa: What the work is held to.
        best: Whether that is the best of this machine, which needs no holding.
        values: The table that a subject of values writes; empty for times.
        kept: Workloads that are there already, and need not be measured again.
        known: Workloads that its table holds.
        seconds: What the rest takes, by the last time or by the module's own word.
    """

    subject: str
    isa: str
    best: bool
    values: str
    kept: int
    known: int
    seconds: float

    @property
    def finished(self) -> bool:
        """Whether nothing is left to measure, as far as the last run's record says."""
        return self.seconds == 0

    def __str__(self) -> str:
        return self.subject if self.best else f"{self.subject} ({self.isa})"


def module_of(subject: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.bench_{subject}")


def plan(
    subjects: Sequence[str], only: Sequence[str] = (), quick: bool = False, redo: bool = False, folder: Path = RESULTS
) -> list[Part]:
    """A part per subject and instruction set: times first, while the machine is fresh, then values."""
    parts = []
    for subject in subjects:
        module = module_of(subject)
        levels = [isa(), *(each for each in getattr(module, "ISAS", ()) if below(each, isa()))]
        levels = levels[:1] if quick else levels
        parts += [_part(subject, module, level, only, quick, redo, folder) for level in levels]
    return sorted(parts, key=lambda part: bool(part.values))


def below(level: str, best: str) -> bool:
    """Whether an instruction set is a lower one than the best here."""
    order = ("portable", "avx2", "avx512")
    return level in order and best in order and order.index(level) < order.index(best)


def _part(
    subject: str, module: ModuleType, level: str, only: Sequence[str], quick: bool, redo: bool, folder: Path
) -> Part:
    values = getattr(module, "VALUES", "")
    made = record_of(subject, level, folder)
    expected = float(made["seconds"]) if made else 60.0 * getattr(module, "MINUTES", 10)
    if quick:
        return Part(subject, level, level == isa(), values, 0, 0, expected / 20)
    if values:
        kept = not redo and made is not None and unchanged_since(made["commit"]) and any(folder.glob(values))
        return Part(subject, level, level == isa(), values, int(kept), 1, 0.0 if kept else expected)
    table = groups(read_table(Bench(subject, folder=folder).path))
    known = [rows for (workload, rows_isa), rows in table.items()
             if rows_isa == level and (not only or any(text in workload for text in only))]  # fmt: skip
    kept = 0 if redo else sum(all(is_current(row | {"isa": isa()}) for row in rows) for rows in known)
    whole = made is not None and unchanged_since(made["commit"]) and int(made["workloads"]) <= kept
    if only and known and kept == len(known):
        whole = True
    return Part(subject, level, level == isa(), "", kept, len(known), 0.0 if whole else expected)


def record_of(subject: str, level: str, folder: Path = RESULTS) -> Row | None:
    """The last complete run of a subject on this machine."""
    for row in read_table(folder / MADE):
        if (row["subject"], row["isa"], row["machine"]) == (subject, level, machine()):
            return row
    return None


def note_made(part: Part, seconds: float, folder: Path = RESULTS) -> None:
    """Records a complete run; what was resumed keeps the longer time that the whole took."""
    before = record_of(part.subject, part.isa, folder)
    table = groups(read_table(Bench(part.subject, folder=folder).path))
    made = [rows for (_, level), rows in table.items() if level == part.isa]
    now = environment()
    row = {
        "subject": part.subject,
        "isa": part.isa,
        "seconds": f"{max(seconds, float(before['seconds']) if before and part.kept else 0.0):.0f}",
        "workloads": str(sum(unchanged_since(rows[0]["commit"]) for rows in made)),
        "machine": machine(),
        "versions": now["versions"],
        "commit": commit(),
        "date": date.today().isoformat(),
    }
    same = ("subject", "isa", "machine")
    others = [each for each in read_table(folder / MADE) if any(each[name] != row[name] for name in same)]
    write_table(folder / MADE, [*others, row], MADE_COLUMNS)


def described(parts: Sequence[Part]) -> str:
    """The plan as a table for the terminal."""
    lines = []
    for part in parts:
        if part.finished:
            state = "is there"
        else:
            state = f"about {minutes(part.seconds)}" + (f", {part.kept} of {part.known} rows kept" if part.kept else "")
        lines.append(f"  {part!s:24} {state}")
    return "\n".join([*lines, f"  {'in all':24} about {minutes(sum(part.seconds for part in parts))}"])


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
