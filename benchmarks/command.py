"""The command line of `python -m benchmarks`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from benchmarks import plan as plans
from benchmarks.harness import RESULTS, ROOT, Bench, commit, held_to, is_idle, machine
from benchmarks.load import wait_until_idle
from benchmarks.plan import ELSEWHERE, SUBJECTS, Part

WAITS = 30.0  # seconds in which the machine may become idle before a run is refused


class WithDefault(click.Group):
    """A group whose command `run` need not be named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=WithDefault)
def main() -> None:
    """Measure diffmem against its baselines, and commits against each other.

    Without a command: `run`. `python -m benchmarks run --help` lists its options.
    """


def split(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """--only a,b and --only a --only b are the same; a comma followed by a space belongs to a workload's name."""
    pieces = [piece for text in value for piece in re.split(r",(?! )", text)]
    return tuple(filter(None, map(str.strip, pieces)))


def chosen(subjects: Sequence[str], only: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Subjects to run and texts of workloads, of what the command line names.

    Raises click.UsageError for a subject that is not there.
    """
    unknown = [each for each in subjects if each not in SUBJECTS]
    if unknown:
        raise click.UsageError(f"no subject {', '.join(unknown)}; there are {', '.join(SUBJECTS)}")
    named = [each for each in only if each in SUBJECTS]
    texts = tuple(each for each in only if each not in SUBJECTS)
    return list(dict.fromkeys([*subjects, *named])) or list(SUBJECTS), texts


@main.command()
@click.argument("subjects", nargs=-1)
@click.option("--only", multiple=True, callback=split,
              help="Subjects, and texts of which a workload's name must contain one; separated by commas.")  # fmt: skip
@click.option("--quick", is_flag=True, help="Small workloads, one repeat each: does everything run and agree?")
@click.option("--redo", is_flag=True, help="Measure again what this commit was measured for on this machine.")
@click.option("--busy", is_flag=True, help="Measure though other processes run; rows say so.")
@click.option("--plan", "only_plan", is_flag=True, help="Print what would be measured, and stop.")
@click.option("--results", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, hidden=True)
def run(
    subjects: tuple[str, ...], only: tuple[str, ...], quick: bool, redo: bool, busy: bool, only_plan: bool,
    results: Path,
) -> None:  # fmt: skip
    """Measure SUBJECTS (default: all), write their tables and the README's.

    Rows that this machine has measured with this commit's code while idle are kept, so that a run that was ended goes
    on. Each subject runs in a process of its own. Other processes' use of the processor is measured beside each row; a
    disturbed row is measured again, up to three times, and then written with a mark.
    """
    wanted, texts = chosen(subjects, only)
    parts = plans.plan(wanted, texts, quick, redo, results)
    if texts:  # of times; a table of values is made whole, where it was asked for
        parts = [part for part in parts if not part.values or part.subject in (*subjects, *only)]
    click.echo(f"{machine()}; commit {commit() or 'unknown'}\n{plans.described(parts)}")
    if only_plan:
        click.echo("  Not made here, since they take hours of training, or another machine:")
        for name, way in ELSEWHERE.items():
            click.echo(f"    {name}: {way}")
        return
    parts = [part for part in parts if not part.finished]
    if parts and not (busy or quick):
        load = wait_until_idle(WAITS)
        if not load.idle:
            raise click.ClickException(f"the machine is not idle: {load}. End other work, or pass --busy")
    failed = [str(part) for part, ok in measured(parts, texts, quick, redo, busy, results) if not ok]
    if not quick and results == RESULTS and any(not part.values for part in parts):
        from benchmarks.readme_table import README, with_table

        README.write_text(with_table(README.read_text()))
        click.echo("wrote the README's table")
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}; run the command again for what is missing")


def measured(parts: Sequence[Part], texts: Sequence[str], quick: bool, redo: bool, busy: bool, results: Path):
    """Runs each part in its process; the part, and whether it ended well."""
    for number, part in enumerate(parts, 1):
        left = sum(each.seconds for each in parts[number - 1 :])
        click.echo(f"[{number}/{len(parts)}] {part}: about {plans.minutes(part.seconds)}, {plans.minutes(left)} in all")
        words = [sys.executable, "-m", "benchmarks", "measure", part.subject, "--results", str(results)]
        words += [word for text in texts for word in ("--only", text)]
        words += [flag for flag, on in (("--quick", quick), ("--redo", redo), ("--busy", busy)) if on]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "PYTHONPATH": path, **({} if part.best else held_to(part.isa))}
        began = time.monotonic()
        status = subprocess.run(words, env=environment, cwd=ROOT).returncode
        if status == 0 and not (quick or texts):
            plans.note_made(part, time.monotonic() - began, results)
        yield part, status == 0


@main.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--only", multiple=True, callback=split,
              help="Subjects, and texts of which a workload's name must contain one; separated by commas.")  # fmt: skip
@click.option("--quick", is_flag=True, help="Small workloads.")
@click.option("--margin", type=click.FloatRange(min=0), default=0.05, show_default=True,
              help="Share by which a row may become slower.")  # fmt: skip
@click.option("--processes", type=click.IntRange(min=1), default=3, show_default=True,
              help="Pairs of processes for each subject.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=2), default=7, show_default=True,
              help="Runs of each workload by each process, at most.")  # fmt: skip
@click.option("--isa", "level", type=click.Choice(["portable", "avx2", "avx512"]), help="Hold the work to this.")
@click.option("--json", "machine_readable", is_flag=True, help="Print JSON.")
@click.option("--file", type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path),
              help="A benchmark file of your own in place of this checkout's.")  # fmt: skip
def compare(
    a: str, b: str, only: tuple[str, ...], quick: bool, margin: float, processes: int, rounds: int, level: str | None,
    machine_readable: bool, file: Path | None,
) -> None:  # fmt: skip
    """Is B slower than A? Exit status 3 where a row is, by more than the margin.

    A and B are commits (anything that git names; "." is the checkout as it is), or tables of results (.csv, or folders
    of them), which are compared as they are. Of commits, each gets a working tree and a compiled core of its own, and
    this checkout's benchmarks run on both in turns, after their values were checked.

    A row is slower, or faster, where the 95 % interval of the ratio of times lies beyond the margin, the same where it
    lies within, undecided otherwise.
    """
    from benchmarks import compare as comparing

    def say(text: str) -> None:
        click.echo(text, err=True)

    stored = [comparing.tables_of(name) for name in (a, b)]
    if (stored[0] is None) != (stored[1] is None):
        raise click.UsageError("A and B must both be commits, or both tables of results")
    if stored[0] is not None:
        found = comparing.compare_tables(stored[0], stored[1], only, margin)
    else:
        subjects, texts = chosen((), only)
        files = [file] if file else [Path(__file__).with_name(f"bench_{each}.py") for each in subjects]
        files = [each for each in files if file or not getattr(plans.module_of(each.stem[6:]), "VALUES", "")]
        with comparing.trees((a, b), ROOT, say) as pair:
            variables = held_to(level) if level else {}
            found = comparing.compare_trees(pair, files, texts, quick, processes, rounds, margin, variables, say)
        if not found:
            raise click.ClickException("nothing was measured: no workload has such a name")
    click.echo((comparing.as_json if machine_readable else comparing.described)(found, (a, b), margin))
    if wrong := [each.workload for each in found if each.verdict == "failed" and "at B" in each.note]:
        raise click.ClickException(f"failed at B: {', '.join(wrong)}")
    if any(each.verdict == "slower" for each in found):
        raise SystemExit(3)


@main.command(hidden=True)
@click.argument("subject", type=click.Choice(SUBJECTS))
@click.option("--only", multiple=True)
@click.option("--quick", is_flag=True)
@click.option("--redo", is_flag=True)
@click.option("--busy", is_flag=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def measure(subject: str, only: tuple[str, ...], quick: bool, redo: bool, busy: bool, results: Path) -> None:
    """One subject, in this process."""
    torch.set_flush_denormal(True)
    bench = Bench(subject, quick, only, redo, busy, results)
    plans.module_of(subject).run(bench)
    if bench.rows:
        click.echo(f"wrote {bench.path}", err=True)
        disturbed = sum(not is_idle(row) for row in bench.rows)
        if disturbed and not quick:
            click.echo(f"{disturbed} rows were measured while other processes ran, and are marked", err=True)
