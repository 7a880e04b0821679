"""`diffmem train`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffmem.cli.distributed import is_first_rank, process_group
from diffmem.cli.options import debug_option, reading, reading_options, say_notes
from diffmem.cli.training_options import POSITIVE, describe_preset, training_options, training_parts
from diffmem.timing import TimeLeft, duration_range

if TYPE_CHECKING:
    from diffmem.data import ImageSet
    from diffmem.monitoring import Point
    from diffmem.training import DataSource, Observer, Plan, Run, Snapshot, Stats, TrainingConfig

INTERRUPTED = 130
_LONG = 12 * 3600.0  # seconds
_LINE_SECONDS = 10.0  # between lines of progress where there is no terminal


@click.command("train")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run. Needed, but for --dry-run.")
@click.option("--size", type=POSITIVE, metavar="N", help="A subset of N images, as many of each class.")
@training_options
@reading_options(color=False)
@click.option("--batch-gpu", type=POSITIVE, help="Images per forward pass of a process. [default: all of its share]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
# The run.
@click.option("--snapshot-images", type=POSITIVE, metavar="N", help="A snapshot every N images. [default: at the end]")
@click.option("--keep", type=POSITIVE, metavar="K", help="Keep the last K snapshots and the best. [default: all]")
@click.option(
    "--grid", type=click.IntRange(min=0), default=16, show_default=True, help="Images to sample at snapshots."
)
@click.option("--audit-every", type=POSITIVE, metavar="N", help="Audit a snapshot every N images, and the last.")
@click.option("--audit-samples", type=POSITIVE, default=256, show_default=True, help="Images per audit, at most.")
@click.option("--audit-solver", type=click.Choice(["heun", "unipc", "dpm++"]), default="heun", show_default=True,
              help="heun: the protocol's 35 network calls; unipc: 14, with nearly the same verdicts.")  # fmt: skip
@click.option("--stop-at", type=click.FloatRange(0, 1, min_open=True), metavar="SHARE",
              help="End the run once an audit shows that R_mem is at least SHARE.")  # fmt: skip
@click.option("--confidence", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.95,
              show_default=True, help="Of --stop-at, over all audits of the run.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
@click.option("--compile", "compile_", type=click.Choice(["auto", "yes", "no"]), default="auto", show_default=True,
              help="Compile the network; auto: where it is large and the run is hours long.")  # fmt: skip
@click.option("--precision", type=click.Choice(["ieee", "tf32", "bf16"]), default="ieee", show_default=True,
              help="Of the network's products. ieee: float32, the protocol's; tf32: rounded on a GPU; bf16: autocast, "
              "weights stay float32.")  # fmt: skip
@click.option("--cuda-graph", type=click.Choice(["auto", "yes", "no"]), default="auto", show_default=True,
              help="On a GPU, launch a pass's kernels at once; auto: where that is faster.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue the run in OUT.")
@click.option("-n", "--dry-run", is_flag=True, help="Print the configuration and what it would cost, and stop.")
@debug_option
def train_command(
    source, out, size, resize, color, alpha, key, layout, skip_bad, cond, batch_gpu, seed, snapshot_images, keep,
    grid, audit_every, audit_samples, audit_solver, stop_at, confidence, device, compile_, precision, cuda_graph,
    resume, dry_run, **options,
) -> int:  # fmt: skip
    """Train a diffusion model.

    The defaults are the reference protocol of Gu et al. (arXiv 2310.02664) for CIFAR-10; images of at most 24x24 get a
    network that a CPU trains (--preset protocol: the paper's). OUT receives config.json,
    stats.jsonl, snapshots/ (checkpoints of the averaged weights), grids/ and state/, from which --resume continues
    exactly. Ctrl-C finishes the step and saves.

    \b
    Examples:
      diffmem train --data cifar10.zip --size 1000 --duration 2000 --snapshot-images 2000000 --out run
      diffmem train --data builtin:digits --epochs 40 --out run
      diffmem train --data builtin:digits --size 20 --epochs 4000 --audit-every 16000 --stop-at 0.8 --out run
      torchrun --nproc-per-node 8 -m diffmem train --data cifar10.zip --epochs 4000 --out run
    """
    import torch

    from diffmem.data.classes import label_dim as label_dim_of
    from diffmem.data.classes import missing_classes
    from diffmem.generation import SampleSettings
    from diffmem.memorization import Question
    from diffmem.monitoring import AuditEvery
    from diffmem.training import (
        EMA,
        DataSource,
        Grids,
        KeepLast,
        TensorBoard,
        TrainingConfig,
        denoiser_config,
        images_of,
        keep_all,
        plan_training,
        train,
    )

    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out' (or --dry-run).")
    if stop_at is not None and audit_every is None:
        raise click.UsageError("--stop-at goes with --audit-every")
    torch.set_flush_denormal(True)
    with process_group():
        found_at = DataSource(
            source, size, resize, **reading(color=color, alpha=alpha, key=key, layout=layout, skip_bad=skip_bad)
        )
        data = _load(found_at)
        label_dim = label_dim_of(data, "--cond") if cond else 0
        if cond and is_first_rank() and data.labels.ndim == 1 and (gaps := missing_classes(data.labels)):
            click.echo(f"note: {source}: {gaps}; the model has inputs for them all the same", err=True)
        xflip = options["xflip"]
        parts = training_parts(data.image_shape[1], **options)
        denoiser = denoiser_config(
            data.image_shape[1],
            data.image_shape[0],
            label_dim=label_dim,
            augment_dim=9 if parts.training["augment"] else 0,
            **parts.network,
        )
        items = len(data) * (2 if xflip else 1)
        config = TrainingConfig(
            denoiser,
            images_of(items, **parts.length),
            seed=seed,
            precision=precision,
            **{**parts.training, "ema": EMA(**parts.training["ema"])},
        )
        choices = {
            "device": device,
            "batch_gpu": batch_gpu,
            "compile": {"yes": True, "no": False}.get(compile_, "auto"),
            "cuda_graph": {"yes": True, "no": False}.get(cuda_graph, "auto"),
        }
        if is_first_rank():
            click.echo(json.dumps(config.to_json(), indent=1))
            click.echo(describe_preset(parts.preset, data.image_shape[1]))
            click.echo(f"EMA weights: {config.ema.describe(items)}")
        if dry_run:
            plan = plan_training(config, data, **choices)
            if is_first_rank():
                _print_plan(plan)
            return 0
        display = _display()
        observers = [display]
        if audit_every is not None:
            # Without a snapshot there is nothing to audit.
            snapshot_images = min(snapshot_images or audit_every, audit_every)
            if is_first_rank():
                observers.append(
                    AuditEvery(
                        data,
                        out,
                        every=audit_every,
                        samples=audit_samples,
                        question=None if stop_at is None else Question(stop_at, confidence),
                        flip=xflip,
                        settings=SampleSettings(solver=audit_solver),
                        device=device,
                        tell=display.audited,
                    )
                )
        if grid:
            observers.append(Grids(out, grid))
        if TensorBoard.available() and is_first_rank():
            observers.append(TensorBoard(out))
        run = train(
            config,
            data,
            out,
            snapshot_images=snapshot_images,
            keep=keep_all if keep is None else KeepLast(keep),
            resume=resume,
            observers=observers,
            found_at=found_at,
            **choices,
        )
    if is_first_rank():
        _print_ending(run, config)
    return INTERRUPTED if run.ending == "interrupted" else 0


def _load(data: DataSource) -> ImageSet:
    """The training set, with a progress bar."""
    from diffmem.progress import progress_bars

    with progress_bars(is_first_rank()) as progress:
        images = data.load(progress)
    say_notes([images], is_first_rank())
    return images


def _print_plan(plan: Plan) -> None:
    """What a run will do and cost, one line each."""
    place = "on the device" if plan.resident else "in the host's memory"
    click.echo(
        f"{plan.parameters:,} parameters on {plan.device}{f' x {plan.ranks}' if plan.ranks > 1 else ''}; "
        f"{plan.size:,} training images {place}"
    )
    click.echo(f"{plan.steps:,} steps, {plan.images:,} images, {plan.epochs:,.1f} epochs")
    if plan.resumed_at:
        click.echo(f"continuing after {plan.resumed_at:,} images")
    how = "before compiling, which this run will do" if plan.compiled else "not compiled"
    how += ", in one CUDA graph" if plan.graphed else ""
    how += f", in {plan.precision}" if plan.precision != "ieee" else ""
    click.echo(
        f"about {duration_range(*plan.seconds_range)}: {plan.seconds_per_step:.3g} s per step ({how}), sampling not "
        "counted"
    )
    if plan.seconds > _LONG and plan.device == "cpu":
        click.echo("that is long for a CPU: smaller images (--resize 16) get a network of a fiftieth of the cost")


def _print_ending(run: Run, config: TrainingConfig) -> None:
    made = f"{len(run.snapshots)} snapshot{'' if len(run.snapshots) == 1 else 's'} in {run.out}/snapshots"
    if run.ending == "finished":
        click.echo(f"finished: {run.images:,} images, loss {run.loss:.5g}; {made}")
    elif run.ending == "stopped":
        click.echo(f"stopped after {run.images:,} images: {run.reason}; {made}")
    else:
        click.echo(
            f"diffmem: interrupted after {run.images:,} of {config.images:,} images; saved. Go on with the same "
            "command and --resume",
            err=True,
        )


def _display() -> Observer:
    """An observer that shows the plan, and then loss, images per second and time left: a bar on terminals, else a line
    every ten seconds, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from diffmem.pages import percent
    from diffmem.training import Observer

    class Display(Observer):
        def started(self, plan: Plan) -> None:
            _print_plan(plan)
            self.plan, self.shown, self.left, self.ticks = plan, time.monotonic(), TimeLeft(), 0
            console = Console(stderr=True)
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[line]}"))
            self.bar = Progress(*columns, console=console) if console.is_terminal else None
            if self.bar is not None:
                self.bar.start()
                self.task = self.bar.add_task("training", total=plan.images, completed=plan.resumed_at, line="")

        def tick(self, stats: Stats) -> None:
            line = f"loss {stats.loss:.4g}, {stats.images_per_second:,.0f} images/s"
            self.ticks += 1
            if self.ticks > 1 or not self.plan.compiled:  # else the first step has compiled
                self.left.add(stats.images_per_second)
            if (left := self.left.range(self.plan.images - stats.images)) is not None:
                line += f", {duration_range(*left)} left"
            if self.bar is not None:
                self.bar.update(self.task, completed=stats.images, line=line)
            elif time.monotonic() - self.shown > _LINE_SECONDS:
                self.shown = time.monotonic()
                click.echo(f"{stats.images:,} of {self.plan.images:,} images: {line}", err=True)

        def snapshot(self, snapshot: Snapshot) -> None:
            if self.bar is None:
                click.echo(f"snapshot {snapshot.folder}: loss {snapshot.loss:.4g}", err=True)

        def audited(self, point: Point) -> None:
            low, high = (percent(end) for end in point.interval)
            line = f"audit after {point.epochs:,.0f} epochs: R_mem {percent(point.ratio)} ({low} to {high}), "
            line += f"{point.count:,} of {point.total:,} images"
            click.echo(line, err=True) if self.bar is None else self.bar.console.print(line, highlight=False)

        def finished(self) -> None:
            if self.bar is not None:
                self.bar.stop()

    return Display()
