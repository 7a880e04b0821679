"""The one form of all measured times: a row per workload, contender and instruction set, in CSV.

`results/<subject>.<machine>.csv` hold such rows, one file per subject and machine; GPU rows (`benchmarks/gpu`) have the
same columns. COLUMNS, in order:

| column | what it holds |
| --- | --- |
| subject | the benchmark file (`nearest` of `bench_nearest.py`), or the stage of a GPU run |
| workload | what is done, with its sizes |
| contender, version | who does it, its package's version; a workload's first is diffmem's, the others baselines |
| seconds, iqr, fastest, repeats | median of the repeats, distance of their quartiles, least, how many |
| ratio | median in times of the first contender's |
| note | how it is used, accuracy |
| isa | instruction set that the work was held to: `avx512`, `avx2`, `portable`, `sm_90` |
| threads, machine, versions | threads of this process; processor and cores; of the packages that matter |
| load, steal | cores taken meanwhile by other processes, and by the host's other guests; empty: unknown |
| commit, date | of the checkout; `+` and a digest where package, core or benchmarks differ from the commit |
| times | the repeats, in seconds, in the order in which they were made |
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable
from pathlib import Path

COLUMNS = (
    "subject", "workload", "contender", "version", "seconds", "iqr", "fastest", "repeats", "ratio", "note", "isa",
    "threads", "machine", "versions", "load", "steal", "commit", "date", "times",
)  # fmt: skip
Row = dict[str, str]


def key_of(row: Row) -> tuple[str, str, str]:
    """What a later row must have in common with an earlier one to replace it."""
    return row["workload"], row["contender"], row.get("isa", "")


def read_table(path: Path) -> list[Row]:
    """The rows of a table, none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def write_table(path: Path, rows: Iterable[Row], columns: tuple[str, ...] = COLUMNS) -> None:
    """Replaces the table in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def merge_table(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a table; a workload's new rows replace all its earlier ones of the same instruction set."""
    rows = list(rows)
    measured = {(row["workload"], row.get("isa", "")) for row in rows}
    kept = [row for row in read_table(path) if (row["workload"], row.get("isa", "")) not in measured]
    write_table(path, [*kept, *rows])


def groups(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows with a time by workload and instruction set: the first is diffmem's, the others are its baselines."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("seconds") and row.get("contender"):
            found.setdefault((row["workload"], row.get("isa", "")), []).append(row)
    return found


def spread(times: list[float]) -> dict[str, str]:
    """The columns that sum up the repeats."""
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
    return {
        "seconds": f"{statistics.median(times):.6g}",
        "iqr": f"{high - low:.3g}",
        "fastest": f"{min(times):.6g}",
        "repeats": str(len(times)),
        "times": " ".join(f"{each:.5g}" for each in times),
    }


def times_of(row: Row) -> list[float]:
    """The repeats, none where an earlier form of the table did not keep them."""
    return [float(each) for each in row.get("times", "").split()]
