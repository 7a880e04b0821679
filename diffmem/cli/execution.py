"""Where the runs of a search or study are executed, and what is printed about them: shared by `emm` and `study`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from diffmem.cli.sampling_options import device_option

if TYPE_CHECKING:
    from diffmem.executors import Executor
    from diffmem.studies import Outcome

_OPTIONS = [
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        metavar="W",
        help="Number of concurrent runs, each in its own process; of an index: shards made at a time.  [default: one, "
        "in this process; of an index: the cores, where that is worth it]",
    ),
    click.option(
        "--ray",
        metavar="ADDRESS",
        help='Run on a Ray cluster: its address, "auto", or "local" to start one here. All nodes must see OUT.',
    ),
    click.option(
        "--gpus-per-run",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        help="With --ray: GPUs per run; 0.25: four runs share a GPU.",
    ),
    device_option,
]


threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="T",
    help="CPU threads of each run. Results depend on it by rounding, so runs with another number count as different "
    "runs.  [default: 1]",
)


dry_run_option = click.option(
    "-n", "--dry-run", is_flag=True, help="Print what would be done and what it would cost, and stop."
)


def repetitions_option(more: str, **settings: Any) -> Callable[[Callable], Callable]:
    """--repetitions. more: for the help."""
    return click.option(
        "--repetitions", type=click.IntRange(min=1), metavar="K", show_default=True, help=f"Runs: {more}", **settings
    )


def executor_options(command: Callable) -> Callable:
    """Gives a command --workers, --ray, --gpus-per-run and --device; see `executor_of`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@contextlib.contextmanager
def executing(workers: int | None, ray: str | None, gpus_per_run: float, device: str) -> Iterator[Executor]:
    """The executor that the options ask for, until it is closed. Standard output is the command's: what Ray writes
    there, of workers that died, goes to standard error."""
    with (
        contextlib.redirect_stdout(sys.stdout if ray is None else sys.stderr),
        contextlib.closing(executor_of(workers, ray, gpus_per_run, device)) as executor,
    ):
        yield executor


def executor_of(workers: int | None, ray: str | None, gpus_per_run: float, device: str) -> Executor:
    """The executor that the options ask for."""
    from diffmem.executors import InProcess, Processes, Ray

    if ray is not None:
        where: dict[str, Any] = {"include_dashboard": False} if ray == "local" else {}
        return Ray(ray, **where, gpus=gpus_per_run, slots=workers, device=device)
    if workers is not None and workers > 1:
        return Processes(workers, device=device)
    return InProcess(device)


def tell_outcome(outcome: Outcome, variant: str = "") -> None:
    """A line about a run that ended, on standard error. variant: its name in a study."""
    from diffmem.html_report import percent, percent_range

    trial, result = outcome.trial, outcome.result
    where = f"{variant and variant + ', '}N = {trial.size:,}, repetition {trial.repetition}"
    if result is None:
        click.echo(f"{where}: failed: {outcome.error}", err=True)
        return
    least = "at least " if result.censored else ""
    click.echo(
        f"{where}: R_mem {least}{percent(result.r_mem)} ({percent_range(result.interval)}), "
        f"{result.epochs:,.0f} epochs, {result.seconds:.0f} s",
        err=True,
    )
