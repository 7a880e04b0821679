"""Results of a GPU into benchmarks/results, in a file of the card's name, for the README's table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from benchmarks.gpu.runner import RESULTS as ROWS
from benchmarks.gpu.runner import STAGES_FILE
from benchmarks.harness import RESULTS
from benchmarks.rows import merge_table, read_table


def adopt_results(folder: Path, results: Path = RESULTS) -> Path:
    """Merges the rows of `folder` into gpu.<card>.csv, replacing earlier ones of the same workload and contender.

    Raises ClickException for a dry run, and where there is nothing.
    """
    rows = read_table(folder / ROWS)
    metadata = json.loads((folder / STAGES_FILE).read_text()) if (folder / STAGES_FILE).exists() else {}
    if not rows or metadata.get("dry_run", True):
        raise click.ClickException(f"{folder}: holds no results of a GPU (a dry run's are none)")
    (machine,) = {row["machine"] for row in rows}
    path = results / f"gpu.{re.sub(r'[^a-z0-9]+', '-', machine.lower()).strip('-')}.csv"
    merge_table(path, rows)
    return path
