"""`diffmem emm`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffmem.cli.execution import (
    dry_run_option,
    executing,
    executor_options,
    repetitions_option,
    tell_outcome,
    threads_option,
)
from diffmem.cli.options import (
    CommandWithJson,
    criterion_option,
    debug_option,
    json_option,
    moved_option,
    reading,
    reading_options,
    reserve_report,
)
from diffmem.cli.sampling_options import folder_option, solver_option
from diffmem.cli.training_options import POSITIVE, SHARE, describe_preset, parts_of, training_options

if TYPE_CHECKING:
    from diffmem.studies import EMM, Setting


class SizeRange(click.ParamType):
    """Two whole numbers, MIN:MAX."""

    name = "min:max"

    def convert(self, value, parameter, context) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        low, _, high = value.partition(":")
        if not (low.isdigit() and high.isdigit()):
            self.fail(f"{value!r} is not a range of sizes like 100:10000", parameter, context)
        return int(low), int(high)


class Percentage(click.ParamType):
    """A share: 10% or 0.1."""

    name = "percent"

    def convert(self, value, parameter, context) -> float:
        if isinstance(value, float):
            return value
        try:
            return float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
        except ValueError:
            self.fail(f"{value!r} is not a share like 10% or 0.1", parameter, context)


@click.command("emm", cls=CommandWithJson)
@training_options
@reading_options(color=False)
@folder_option("the folder of the search, with its runs and results.", required=True)
@click.option("--zeta", type=SHARE, default=0.1, show_default=True, help="R_mem at EMM is 1 - zeta.")
@click.option("--size-range", "sizes", type=SizeRange(),
              help="Smallest and largest training set.  [default: all possible sizes]")  # fmt: skip
@click.option("--half-width", "precision", type=Percentage(), default="10%", show_default=True,
              help="Stop when half the width of the 95 % interval is at most this fraction of EMM.")  # fmt: skip
@repetitions_option("maximum per size, each with its own subset and seed.", default=5)
@moved_option("--sizes", "a range of sizes is --size-range MIN:MAX, since --sizes is a list of them")
@moved_option("--precision", "the precision of EMM is --half-width, since --precision is that of a network's products")
@moved_option("--seeds", "runs per size are --repetitions, since --seeds are those of images")
@click.option("--max-runs", type=POSITIVE, default=40, show_default=True, help="Maximum number of runs.")
@click.option("--snapshots", type=POSITIVE, default=10, show_default=True, help="Number of snapshots audited per run.")
@click.option("--samples", type=POSITIVE, default=10_000, show_default=True, help="Maximum number of images per audit.")
@criterion_option
@solver_option()
@dry_run_option
@threads_option
@executor_options
@json_option("what emm.json holds")
@debug_option
def emm_command(
    source, resize, color, alpha, key, layout, skip_bad, cond, out, zeta,
    sizes, precision, repetitions, max_runs, snapshots, samples, criterion, solver,
    dry_run, threads, workers, ray, gpus_per_run, device, as_json, **options,
) -> None:  # fmt: skip
    """Find the Effective Model Memorization: the largest number of training images that a model still memorizes.

    Trains on subsets whose sizes it chooses from the results so far, ends each run as soon as its verdict is clear, and
    repeats a size only if that narrows the answer. The interval covers sampling, differences between runs, the curve's
    shape, and that R_mem of a run is the highest of its snapshots; 8 to 24 runs narrow it to 10 % on most curves. OUT
    receives emm.json, runs.csv, emm.svg, report.html and the runs; the same command resumes an interrupted search.
    Every option of `diffmem train` that decides what is trained is an option here.

    \b
    Examples:
      diffmem emm --data builtin:digits --images 64000 --size-range 10:200 --samples 500 --snapshots 3 --solver unipc \\
          --out emm-digits
      diffmem emm --data cifar10.zip --duration 2000 --size-range 100:20000 --workers 8 --device cuda --out emm
    """
    import torch

    from diffmem.data import DatasetSpec
    from diffmem.progress import progress_bars
    from diffmem.studies import Setting, find_emm
    from diffmem.studies.report import write_emm

    torch.set_flush_denormal(True)
    if not dry_run:
        reserve_report(out)
    read_as = reading(color=color, alpha=alpha, key=key, layout=layout, skip_bad=skip_bad)
    data = DatasetSpec(source, resolution=resize, **read_as, labels="true" if cond else "none")
    resolution = resize or replace(data.reading(), limit=1).load().image_shape[1]
    parts = parts_of(resolution, **options)
    click.echo(describe_preset(parts.preset, resolution), err=True)
    setting = Setting(
        data,
        parts.length,
        parts.network,
        parts.training,
        snapshots=snapshots,
        samples=samples,
        sampling={"solver": solver},
        threads=threads,
        criterion=criterion,
    )
    if dry_run:
        _print_plan(setting, sizes, repetitions, max_runs, device)
        return

    def watch(emm: EMM) -> None:
        write_emm(emm, out, running=True)

    with progress_bars() as progress, executing(workers, ray, gpus_per_run, device) as executor:
        found = find_emm(
            setting, out, sizes=sizes, zeta=zeta, precision=precision, repetitions=repetitions, runs=max_runs,
            executor=executor, on_trial=tell_outcome, watch=watch,
            progress=progress,
        )  # fmt: skip
    page = found.save(out)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        _print(found, page)


def _print_plan(setting: Setting, sizes: tuple[int, int] | None, repetitions: int, runs: int, device: str) -> None:
    """Prints the sizes, the number of runs, and the cost of a run at the smallest and largest size, measured on a few
    passes here."""
    from diffmem.studies import Trial
    from diffmem.studies.schedule import costs
    from diffmem.studies.search import Search
    from diffmem.timing import duration

    classes, largest = setting.limits()
    low, high = sizes or (2 * classes, largest)
    low, high = Search(low, min(high, largest), repetitions=repetitions, runs=runs, step=classes).ends
    each = [cost.left for cost in costs([Trial(setting, size) for size in (low, high)], None, device)]
    click.echo(f"sizes from {low:,} to {high:,}, up to {repetitions} runs per size and {runs} in all")
    click.echo(f"one full run: about {duration(each[0])} at N = {low:,}, {duration(each[1])} at N = {high:,}")
    click.echo(f"all runs: at most {duration(runs * max(each))} on one device; runs that are decided end earlier")


def _print(found: EMM, page: Path) -> None:
    click.echo(found.verdict())
    for line in found.unresolved:
        click.echo(f"unresolved: {line}")
    click.echo(f"report: {page}")
