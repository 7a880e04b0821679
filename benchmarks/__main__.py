"""`python -m benchmarks [subject …] [--quick] [--only TEXT]`: runs benchmarks and writes their tables."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import click
import torch

from benchmarks.harness import Bench

SUBJECTS = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


@click.command()
@click.argument("subjects", nargs=-1, type=click.Choice(SUBJECTS))
@click.option("--quick", is_flag=True, help="Small workloads, one repeat each: does everything run and agree?")
@click.option("--only", default="", help="Only workloads whose name contains this text.")
def main(subjects: tuple[str, ...], quick: bool, only: str) -> None:
    """Run the benchmarks of SUBJECTS (default: all)."""
    torch.set_flush_denormal(True)
    for subject in subjects or SUBJECTS:
        bench = Bench(subject, quick, only)
        importlib.import_module(f"benchmarks.bench_{subject}").run(bench)
        if bench.rows:
            print(f"wrote {bench.path}", file=sys.stderr)


main()
