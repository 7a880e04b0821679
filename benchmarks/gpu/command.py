"""The command line of `python -m benchmarks.gpu`."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

import click

from benchmarks.gpu import __doc__ as ABOUT
from benchmarks.gpu import runner

DRY_BUDGET = 3600.0  # a dry run is to end, not to be in time: it may share its processor
STAGES = ("compile", "sanitized", "profiled", *(stage.name for stage in runner.STAGES))


@click.command(help=ABOUT)
@click.option("--out", type=click.Path(path_type=Path), default="build/gpu", show_default=True, envvar="OUT",
              help="Where results go.")  # fmt: skip
@click.option(
    "--budget", type=click.FloatRange(min=1), default=runner.BUDGET, show_default=True, help="Seconds in all."
)
@click.option("--interpret", is_flag=True, help="A dry run on the CPU.")
@click.option("--only", multiple=True, help="Stages to run (of one stage, the case to run).")
@click.option("--stage", type=click.Choice(STAGES), hidden=True, help="Run this stage in this process.")
@click.option("--limit", type=float, default=3600.0, hidden=True, help="Seconds that this stage has.")
@click.option("--cache", type=click.Path(path_type=Path), help="Keep the compilers' caches here, for another run.")
@click.option("--adopt", type=click.Path(exists=True, path_type=Path), help="Copy results from here, and stop.")
def main(
    out: Path, budget: float, interpret: bool, only: tuple[str, ...], stage: str | None, limit: float,
    cache: Path | None, adopt: Path | None,
) -> None:  # fmt: skip
    began = time.monotonic()
    if adopt is not None:
        from benchmarks.gpu.adopt import adopt_results

        click.echo(f"wrote {adopt_results(adopt)}")
        return
    if stage is not None:
        run_stage(stage, out, interpret, began + limit, " ".join(only))
        return
    unknown = set(only) - {each.name for each in runner.STAGES}
    if unknown:
        raise click.UsageError(f"--only {', '.join(sorted(unknown))}: there are {', '.join(STAGES[3:])}")
    from benchmarks.gpu.jobs import DRY_JOBS, JOBS

    if interpret:
        budget = max(budget, DRY_BUDGET)
    outcomes = runner.run(out.resolve(), budget, interpret, only, jobs=DRY_JOBS if interpret else JOBS, cache=cache)
    bad = [each.stage for each in outcomes if each.status != "finished"]
    if bad:
        raise click.ClickException(f"not finished: {', '.join(bad)}; see {out / runner.LOG}")


def run_stage(stage: str, out: Path, interpret: bool, deadline: float, only: str = "") -> None:
    """One stage, in this process."""
    module = importlib.import_module(
        f"benchmarks.gpu.{ {'sanitized': 'correctness', 'profiled': 'search'}.get(stage, stage) }"
    )
    if stage in ("build", "correctness"):
        module.run(out, interpret, deadline)
        return
    from benchmarks.gpu.target import Target, recorded_launches

    target = Target.here(out, interpret, deadline)
    function = {"sanitized": "sanitized", "profiled": "profiled"}.get(stage, "run")
    arguments = (only,) if stage == "compile" else ()
    with recorded_launches(target, stage):
        wrong = getattr(module, function)(target, *arguments) or []
    for each in wrong:
        print(f"WRONG: {each}")
    if target.left_out:
        print(f"did not fit: {', '.join(target.left_out)}")
    if wrong:
        sys.exit(f"{len(wrong)} wrong: {wrong[0]}")
