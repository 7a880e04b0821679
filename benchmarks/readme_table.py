"""The README's table of measured results, made from `results/*.csv`: `python -m benchmarks.readme_table` writes it
there."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.harness import RESULTS, read_table

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results: python -m benchmarks.readme_table -->", "<!-- end of results -->"


def table(results: Path = RESULTS) -> str:
    """Markdown: a row per workload and baseline, and below it where the numbers come from."""
    lines = ["| work | diffmem | baseline | | ratio |", "| --- | --- | --- | --- | --- |"]
    origins: dict[str, None] = {}
    for path in sorted(results.glob("*.csv")):
        if path.stem.endswith(".quick"):
            continue
        rows = [row for row in read_table(path) if row.get("seconds") and row.get("contender")]
        by_workload: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            by_workload.setdefault(row["workload"], []).append(row)
        for workload, (ours, *baselines) in by_workload.items():
            if workload.startswith(("cost against N", "optimum, one call")):  # in the chart, and in the table only
                continue
            if ours.get("stage") == "operations":  # of a GPU: the table of results has them
                continue
            for baseline in baselines:
                ratio = float(baseline["seconds"]) / float(ours["seconds"])
                lines.append(
                    f"| {workload} | {seconds(ours)} | {baseline['contender']} | {seconds(baseline)} | {ratio:.3g}× |"
                )
            origins[f"{ours['machine']}, {ours['threads']} threads; {ours['versions']}; commit {ours['commit']}"] = None
    return "\n".join([*lines, "", *(f"Measured on {origin}." for origin in origins)])


def seconds(row: dict[str, str]) -> str:
    value = float(row["seconds"])
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def with_table(readme: str) -> str:
    """`readme` with the table between its two marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
    print(f"wrote the table into {README}", file=sys.stderr)
