"""The README's table of measured results, made from `results/*.csv`: `python -m benchmarks.readme_table` writes it
there.

Of a workload that several files hold, the newest rows count. One line says where most rows were measured: machine,
versions, commit. Rows from elsewhere carry a number, whose meaning follows; rows that were measured while the machine
was not known to be idle carry a star.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from benchmarks.harness import RESULTS, is_idle
from benchmarks.rows import Row, groups, read_table

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results: python -m benchmarks.readme_table -->", "<!-- end of results -->"
LEFT_OUT = ("cost against N", "optimum, one call")  # workloads in a chart, and in the table of results only
# Baselines of another question (approximate search, what a build takes): in the table of results only.
NOT_COMPARED = ("faiss IVF", "faiss HNSW", "faiss IndexScalarQuantizer", "diffmem, ")
DIGITS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
Origin = tuple[str, str, str]  # machine and threads; versions; commit


def newest(results: Path) -> dict[tuple[str, str], list[Row]]:
    """Of each workload and instruction set, the rows that were measured last, in the order of the files; rows that do
    not name their instruction set give way to any that do."""
    found: dict[tuple[str, str], list[Row]] = {}
    for path in sorted(results.glob("*.csv")):
        if path.stem.endswith(".quick"):
            continue
        for key, rows in groups(read_table(path)).items():
            if key not in found or rows[0].get("date", "") >= found[key][0].get("date", ""):
                found[key] = rows
    named = {workload for workload, isa in found if isa}
    return {(workload, isa): rows for (workload, isa), rows in found.items() if isa or workload not in named}


def shown(results: Path) -> list[list[Row]]:
    """What the table holds: rows of each workload, those with a baseline."""
    return [
        [rows[0], *compared]
        for (workload, _), rows in newest(results).items()
        if (compared := [row for row in rows[1:] if not row["contender"].startswith(NOT_COMPARED)])
        and not workload.startswith(LEFT_OUT)
        and rows[0].get("subject") != "operations"  # of a GPU
    ]


def table(results: Path = RESULTS) -> str:
    """Markdown: a row per workload and baseline, and below it where the numbers come from."""
    lines = ["| work | isa | diffmem | baseline | | ratio |", "| --- | --- | --- | --- | --- | --- |"]
    workloads = shown(results)
    origins = Counter(origin for rows in workloads for origin in [origin_of(rows[0])] * (len(rows) - 1))
    if not origins:
        return "\n".join(lines)
    (usual, _), *_ = origins.most_common(1)
    numbers = {origin: str(i).translate(DIGITS) for i, origin in enumerate((o for o in origins if o != usual), 1)}
    sure = [all(map(is_idle, rows)) for rows in workloads]
    starred = any(sure)  # where none is sure, one sentence says so
    for (ours, *baselines), idle in zip(workloads, sure, strict=True):
        for baseline in baselines:
            ratio = float(baseline["seconds"]) / float(ours["seconds"])
            mark = numbers.get(origin_of(ours), "") + ("\\*" if starred and not idle else "")
            lines.append(
                f"| {ours['workload']}{mark} | {ours.get('isa') or '–'} | {seconds(ours)} | {baseline['contender']} | "
                f"{seconds(baseline)} | {ratio:.3g}× |"
            )
    lines += ["", f"Measured on {'; '.join(filter(None, usual[:2]))}; commit {usual[2]}."]
    if numbers:
        lines[-1] += " " + " ".join(f"{number} {difference(origin, usual)}." for origin, number in numbers.items())
    if not all(sure):
        lines[-1] += (" \\* Not" if starred else " No row is") + " known to have been measured while nothing else ran."
    return "\n".join(lines)


def origin_of(row: Row) -> Origin:
    return f"{row['machine']}, {row['threads']} threads", row["versions"], row["commit"]


def difference(origin: Origin, usual: Origin) -> str:
    """What differs of a row's origin from the usual one."""
    machine, versions, commit = origin
    parts = [machine] if machine != usual[0] else []
    theirs = set(usual[1].split(", "))
    parts += [each for each in versions.split(", ") if each not in theirs and not each.startswith("triton")]
    return ", ".join([*parts, f"commit {commit}"])


def seconds(row: Row) -> str:
    value = float(row["seconds"])
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def with_table(readme: str, results: Path = RESULTS) -> str:
    """`readme` with the table between its two marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
    print(f"wrote the table into {README}", file=sys.stderr)
