"""`diffmem trajectory`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffmem.cli.audit import Source
from diffmem.cli.options import (
    CommandWithJson,
    confidence_option,
    criterion_option,
    debug_option,
    gate_options,
    json_option,
    limits_of,
    reading,
    reading_options,
    reserve_report,
    resize_option,
    size_option,
    tell_gate,
)
from diffmem.cli.sampling_options import batch_option, device_option, folder_option, seeds_option, solver_option

if TYPE_CHECKING:
    from diffmem.evaluation import Trajectory


@click.command("trajectory", cls=CommandWithJson)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@seeds_option("0-9999")
@click.option("--every", type=click.IntRange(min=1), metavar="N", help="A snapshot every N images, and the last.")
@click.option(
    "--order", type=click.Choice(["newest", "oldest", "bisect"]), default="newest", show_default=True,
    help="Order in which snapshots are audited; bisect: only those that narrow down where R_mem passes --at-least, or "
    "0.5.",
)  # fmt: skip
@click.option(
    "--at-least", type=click.FloatRange(0, 1, min_open=True), metavar="SHARE",
    help="Test whether R_mem is at least SHARE, and sample only as many images of each snapshot as that needs.",
)  # fmt: skip
@confidence_option("of --at-least, over all snapshots")
@criterion_option
@click.option(
    "--loss-gap", is_flag=True,
    help="At each snapshot, how far denoising errors on unseen images are above those on training images, by noise "
    "level: it warns before there are copies. Unseen are the images of --holdout, or those that the run left of its "
    "source.",
)  # fmt: skip
@click.option(
    "--holdout", type=Source(), help="Real images that the model has not seen; for --loss-gap, which they imply."
)
@click.option("--data", type=Source(), help="The training images; required if the run does not record where they are.")
@size_option("; with --data")
@resize_option(more=" With --data.")
@reading_options()
@solver_option()
@batch_option(64)
@device_option
@folder_option("a folder for trajectory.html and its tables.  [default: RUN/trajectory]")
@json_option("the points and the answer")
@gate_options
@debug_option
def trajectory_command(
    run, seeds, every, order, at_least, confidence, criterion, loss_gap, holdout, data, size, resize, color, alpha, key,
    layout, skip_bad, solver, batch, device, out, as_json, fail_above, require_below, max_copies,
) -> int:  # fmt: skip
    """Measure R_mem over training time: of the snapshots of RUN, a folder of diffmem train.

    Writes trajectory.html (plot, first copies, table), .csv, .json and .svg. Images audited before, here or by train's
    --audit-every, are not audited again: the same command resumes after an interrupt, and further seeds cost only
    themselves. A gate applies to the interval of the highest R_mem, and --max-copies to each snapshot; it does not pass
    if the newest snapshot's images are of a single color or nearly all the same.

    \b
    Examples:
      diffmem trajectory run/                                       the protocol: 10,000 images of every snapshot
      diffmem trajectory run/ --seeds 0-255 --solver unipc          a quick look
      diffmem trajectory run/ --seeds 0-255 --loss-gap              does it begin to memorize, before there are copies?
      diffmem trajectory run/ --at-least 0.9 --order bisect         when did it pass 90 %? as few images as will do
    """
    import torch

    from diffmem.data import DatasetSpec
    from diffmem.evaluation import trajectory
    from diffmem.memorization import SequentialTest, decide_gate
    from diffmem.progress import progress_bars
    from diffmem.sampling import SamplerConfig
    from diffmem.training import RunFolder

    given = {"color": color, "alpha": alpha, "key": key, "layout": layout, "skip_bad": skip_bad}
    if data is None and (size or resize or any(given.values())):
        raise click.UsageError("--size, --resize, --color, --alpha, --key, --layout and --skip-bad go with --data")
    torch.set_flush_denormal(True)
    limits = limits_of(fail_above, require_below, max_copies)
    RunFolder.open(run)  # raises where there is none, before a folder is made in it
    reserve_report(run / "trajectory" if out is None else out)
    with progress_bars() as progress:
        result = trajectory(
            run,
            data=None if data is None else DatasetSpec(data, size, resize, **reading(**given)),
            seeds=seeds,
            every=every,
            order=order,
            stop=None if at_least is None else SequentialTest(at_least, confidence),
            sampler=SamplerConfig(solver=solver, batch=batch),
            criterion=criterion,
            loss_gap=loss_gap or holdout is not None,
            holdout=holdout,
            device=device,
            progress=progress,
        )
    gate = None
    if limits:
        copies = max(point.count for point in result.points)
        gate = decide_gate(copies, result.interval, **limits, warnings=result.warnings)
    if as_json:
        decided = {} if gate is None else {"gate": gate.to_dict()}
        click.echo(json.dumps({**result.to_dict(), **decided}, allow_nan=False))
    else:
        print_trajectory(result)
    for warning in result.warnings:
        click.echo(f"warning about the newest snapshot: {warning}", err=True)
    page = result.save(out)
    if not as_json:
        click.echo(f"report: {page}")
    return tell_gate(gate)


def print_trajectory(result: Trajectory) -> None:
    """The table and the verdict, on standard output."""
    from diffmem.html_report import percent, percent_range

    click.echo(f"{'epochs':>10}  {'loss':>8}  {'R_mem':>8}  95 % interval       images")
    for point in result.points:
        interval = percent_range(point.interval)
        click.echo(
            f"{point.epochs:>10,.0f}  {point.loss:>8.4g}  {percent(point.ratio):>8}  {interval:<18}  {point.total:,}"
        )
    click.echo(
        f"R_mem of the run, the highest over its snapshots: {percent(result.r_mem)} "
        f"({percent_range(result.interval)}), after {result.best.epochs:,.0f} epochs"
    )
    if result.points[0].gap is not None:
        warned = result.gap_warning
        click.echo(
            "loss gap: none is shown"
            if warned is None
            else f"loss gap: shown from {warned.epochs:,.0f} epochs on, where R_mem was {percent(warned.ratio)}"
        )
    if result.test is not None:
        answer = {True: "yes", False: "no", None: "not decided"}[result.answer]
        click.echo(f"at least {percent(result.test.at_least)}? {answer}")
