"""`diffmem train`."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from diffmem.cli.distributed import is_first_rank, process_group
from diffmem.cli.execution import dry_run_option
from diffmem.cli.options import (
    AutoOnOff,
    confidence_option,
    debug_option,
    reading,
    reading_options,
    say_notes,
    size_option,
)
from diffmem.cli.sampling_options import compile_option, device_option, folder_option, solver_option
from diffmem.cli.training_options import POSITIVE, describe_preset, parts_of, resumable_training_options
from diffmem.errors import InputError
from diffmem.timing import TimeLeft, duration_range

if TYPE_CHECKING:
    from diffmem.data import DatasetSpec, ImageSet
    from diffmem.evaluation import Point
    from diffmem.training import Callback, Plan, Run, RunFolder, Snapshot, Stats, TrainingConfig

INTERRUPTED = 130
_LONG = 12 * 3600.0  # seconds
_ON_OFF = {"on": True, "off": False, "yes": True, "no": False}  # the latter in the records of earlier runs
COMMAND = "command.json"  # in the run's folder: the options of the command that began it
_LINE_SECONDS = 10.0  # between lines of progress where there is no terminal


@click.command("train")
@folder_option("the folder of the run. Required except with --dry-run.")
@size_option()
@resumable_training_options
@reading_options(color=False)
@click.option(
    "--batch-gpu",
    type=POSITIVE,
    help="Microbatch: images per forward pass of a process.  [default: its whole share of the batch]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Seed of the random choices: of weights, data order and noise.")  # fmt: skip
# The run.
@click.option("--snapshot-images", type=POSITIVE, metavar="N", help="A snapshot every N images. [default: at the end]")
@click.option("--keep", type=POSITIVE, metavar="K", help="Keep only the last K snapshots and the best.  [default: all]")
@click.option(
    "--grid", type=click.IntRange(min=0), default=16, show_default=True, help="Sample N images at each snapshot."
)
@click.option("--audit-every", type=POSITIVE, metavar="N", help="Audit a snapshot every N images, and the last.")
@click.option(
    "--audit-samples", type=POSITIVE, default=256, show_default=True, help="Maximum number of images per audit."
)
@solver_option("--audit-solver")
@click.option("--stop-at", type=click.FloatRange(0, 1, min_open=True), metavar="SHARE",
              help="End the run once an audit shows that R_mem is at least SHARE.")  # fmt: skip
@confidence_option("of --stop-at, over all audits of the run")
@device_option
@compile_option("compile_", "if the network is large and the run takes hours")
@click.option(
    "--precision", type=click.Choice(["ieee", "tf32", "bf16"]),
    help="Precision of matrix products and convolutions in the network. ieee: float32, the protocol's; tf32: TF32 on a "
    "GPU; bf16: autocast, weights stay float32.  [default: ieee]",
)  # fmt: skip
@click.option("--cuda-graph", type=AutoOnOff(), default="auto", show_default=True,
              help="On a GPU, capture each pass in a CUDA graph; auto: if that is faster.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue the run in OUT, with its own settings; needs no other option.")
@dry_run_option
@debug_option
@click.pass_context  # type: ignore[arg-type] # click fills in the rest by name
def train_command(context: click.Context, out: Path | None, resume: bool, dry_run: bool, **options: Any) -> int:
    """Train a diffusion model.

    The defaults are the reference protocol of Gu et al. (arXiv 2310.02664) for CIFAR-10; images of at most 24x24 get a
    network that a CPU can train (--preset protocol: the paper's). OUT receives config.json, stats.jsonl, snapshots/
    (checkpoints of the EMA weights), grids/ and state/, from which --resume continues exactly: `diffmem train --resume
    --out OUT` takes all other options from the run. Options given with it must match the run's, except its length and
    those that do not affect the weights (snapshots, audits, device). Ctrl-C finishes the step and saves.

    \b
    Examples:
      diffmem train --data cifar10.zip --size 1000 --duration 2000 --snapshot-images 2000000 --out run
      diffmem train --data builtin:digits --epochs 40 --out run
      diffmem train --data builtin:digits --size 20 --epochs 4000 --audit-every 16000 --stop-at 0.8 --out run
      diffmem train --resume --out run
      torchrun --nproc-per-node 8 -m diffmem train --data cifar10.zip --epochs 4000 --out run
    """
    run = None
    if resume and out is not None:
        given = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
        options, run = resumed(out, options, given)
    return _train(run, out, resume, dry_run, options, **options)


# What a continuation may change: the length, where the same images come from, and what does not decide the weights.
_LENGTH = {"images", "epochs", "duration"}
_DATA = {"source", "size", "resize", "color", "alpha", "key", "layout", "skip_bad"}
_WATCHING = {
    "batch_gpu", "snapshot_images", "keep", "grid", "audit_every", "audit_samples", "audit_solver", "stop_at",
    "confidence", "device", "compile_", "cuda_graph",
}  # fmt: skip


def resumed(out: Path, options: dict[str, Any], given: set[str]) -> tuple[dict[str, Any], RunFolder | None]:
    """The options of a command that continues the run in `out`, those of the command that began it where they are not
    `given`, and the run itself where nothing is given that says what to train: then its own configuration counts."""
    from diffmem.integrity import read_sealed
    from diffmem.training.run_folder import CONFIG, RunFolder, holds_run

    if not holds_run(out):
        if options["source"] is None:
            raise InputError(f"{out}: there is no run to resume ({CONFIG} is missing): give --data to start one")
        return options, None
    path = out / COMMAND
    recorded = read_sealed(path, "delete it, and give the run's options again") if path.is_file() else {}
    if given & _LENGTH:
        recorded = {name: value for name, value in recorded.items() if name not in _LENGTH}
    kept = {name: value for name, value in recorded.items() if name in options and name not in given}
    merged = {**options, **{name: tuple(v) if isinstance(v, list) else v for name, v in kept.items()}}
    direct = not given - _LENGTH - _DATA - _WATCHING
    if not direct and merged["source"] is None:
        raise InputError(f"{out}: does not record the command that started the run: give --data, or no other option")
    if direct and not given & _LENGTH:
        merged |= {name: options[name] for name in _LENGTH}
    if direct and not given & _DATA:
        merged |= {name: options[name] for name in _DATA}  # the run knows
    return merged, RunFolder.open(out) if direct else None


def _data_of_run(run: RunFolder, source: str | None, changes: dict[str, Any]) -> tuple[ImageSet, DatasetSpec | None]:
    """The run's training set, from where it was or, where anything is given, from there."""
    from diffmem.data import DatasetSpec
    from diffmem.progress import progress_bars

    data_source = run.dataset
    changes = {name: value for name, value in changes.items() if value not in (None, False)}
    if source is not None:
        changes["source"] = source
    if changes:
        if data_source is None and source is None:
            raise InputError(f"{run.path}: does not record where its training set is: give --data")
        data_source = DatasetSpec(**changes) if data_source is None else replace(data_source, **changes)
    data_source = None if data_source is None else data_source.absolute()
    with progress_bars(is_first_rank()) as progress:
        return run.training_images(data_source, progress), data_source


def _train(
    of_run, out, resume, dry_run, recorded, source, size, resize, color, alpha, key, layout, skip_bad, cond, batch_gpu,
    seed, snapshot_images, keep, grid, audit_every, audit_samples, audit_solver, stop_at, confidence, device, compile_,
    cuda_graph, **options,
) -> int:  # fmt: skip
    """The command, with its options known."""
    import torch

    from diffmem.data import DatasetSpec
    from diffmem.evaluation import AuditEvery
    from diffmem.memorization import SequentialTest
    from diffmem.sampling import SamplerConfig
    from diffmem.training import (
        Grids,
        KeepLast,
        TensorBoard,
        images_of,
        keep_all,
        plan_training,
        train,
    )
    from diffmem.training.configure import LENGTHS, items_per_epoch

    if source is None and of_run is None:
        raise click.UsageError("Missing option '--data'.")
    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out' (or --dry-run).")
    if stop_at is not None and audit_every is None:
        raise click.UsageError("--stop-at goes with --audit-every")
    torch.set_flush_denormal(True)
    with process_group():
        read_as = reading(color=color, alpha=alpha, key=key, layout=layout, skip_bad=skip_bad)
        preset_line = None
        if of_run is not None:
            data, data_source = _data_of_run(of_run, source, {"size": size, "resolution": resize, **read_as})
            config = of_run.config
            xflip = config.xflip
            items = items_per_epoch(data, xflip)
            length = {name: options[name] for name in LENGTHS}
            if any(value is not None for value in length.values()):
                config = replace(config, images=images_of(items, **length))
        else:
            data_source = DatasetSpec(source, size, resize, **read_as).absolute()
            data = _load(data_source)
            config, items, preset_line = _configuration(data, source, cond, seed, options)
            xflip = config.xflip
        choices = {
            "device": device,
            "batch_gpu": batch_gpu,
            "compile": _ON_OFF.get(compile_, "auto"),
            "cuda_graph": _ON_OFF.get(cuda_graph, "auto"),
        }
        if is_first_rank():
            click.echo(json.dumps(config.to_json(), indent=1))
            if preset_line is not None:
                click.echo(preset_line)
            click.echo(f"EMA weights: {config.ema.describe(items)}")
        if dry_run:
            plan = plan_training(config, data, **choices)
            if is_first_rank():
                _print_plan(plan)
            return 0
        display = _display()
        callbacks: list[Callback] = [display]
        if of_run is None:
            assert data_source is not None
            callbacks.append(_remember(out, {**recorded, "source": data_source.source}))
        if audit_every is not None:
            # Without a snapshot there is nothing to audit.
            snapshot_images = min(snapshot_images or audit_every, audit_every)
            if is_first_rank():
                callbacks.append(
                    AuditEvery(
                        data,
                        out,
                        every=audit_every,
                        samples=audit_samples,
                        stop=None if stop_at is None else SequentialTest(stop_at, confidence),
                        flip=xflip,
                        sampler=SamplerConfig(solver=audit_solver),
                        device=device,
                        on_audit=display.audited,
                    )
                )
        if grid:
            callbacks.append(Grids(out, grid))
        if TensorBoard.available() and is_first_rank():
            callbacks.append(TensorBoard(out))
        run = train(
            config,
            data,
            out,
            snapshot_images=snapshot_images,
            keep=keep_all if keep is None else KeepLast(keep),
            resume=resume,
            callbacks=callbacks,
            data_source=data_source,
            **choices,
        )
    if is_first_rank():
        _print_ending(run, config)
    return INTERRUPTED if run.ending == "interrupted" else 0


def _configuration(
    data: ImageSet, source: str, cond: bool, seed: int, options: dict[str, Any]
) -> tuple[TrainingConfig, int, str]:
    """What the options ask for on these images: (configuration, images per epoch, a line about the preset)."""
    from diffmem.data.classes import missing_classes
    from diffmem.training import training_config
    from diffmem.training.configure import items_per_epoch

    resolution = data.image_shape[1]
    parts = parts_of(resolution, **options)
    config = training_config(
        data, length=parts.length, network=parts.network, training=parts.training, conditional=cond, seed=seed
    )
    if (
        cond
        and is_first_rank()
        and data.labels is not None
        and data.labels.ndim == 1
        and (gaps := missing_classes(data.labels))
    ):
        click.echo(f"note: {source}: {gaps}; the model still has inputs for them", err=True)
    return config, items_per_epoch(data, config.xflip), describe_preset(parts.preset, resolution)


def _remember(out: Path, options: dict[str, Any]) -> Callback:
    """A callback that writes down the options of the command, for those that continue the run."""
    from diffmem.atomic_io import atomic_write
    from diffmem.integrity import sealed
    from diffmem.training import Callback

    class Remember(Callback):
        def on_start(self, plan: Plan) -> None:
            atomic_write(out / COMMAND, json.dumps(sealed(options), indent=1) + "\n")

    return Remember()


def _load(data: DatasetSpec) -> ImageSet:
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
        f"about {duration_range(*plan.seconds_range)}: {plan.seconds_per_step:.3g} s per step ({how}), not counting "
        "sampling"
    )
    if plan.seconds > _LONG and plan.device == "cpu":
        click.echo("that is long for a CPU: smaller images (--resize 16) use a network at a fiftieth of the cost")


def _print_ending(run: Run, config: TrainingConfig) -> None:
    made = f"{len(run.snapshots)} snapshot{'' if len(run.snapshots) == 1 else 's'} in {run.out}/snapshots"
    if run.ending == "finished":
        click.echo(f"finished: {run.images:,} images, loss {run.loss:.5g}; {made}")
    elif run.ending == "stopped":
        click.echo(f"stopped after {run.images:,} images: {run.reason}; {made}")
    else:
        click.echo(
            f"diffmem: interrupted after {run.images:,} of {config.images:,} images; saved. Resume with: diffmem train "
            f"--resume --out {run.out}",
            err=True,
        )


def _display() -> Any:
    """A callback that shows the plan, and then loss, images per second and time left: a bar on terminals, else a line
    every ten seconds, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from diffmem.html_report import percent, percent_range
    from diffmem.training import Callback

    class Display(Callback):
        def on_start(self, plan: Plan) -> None:
            _print_plan(plan)
            self.plan, self.shown, self.left, self.ticks = plan, time.monotonic(), TimeLeft(), 0
            console = Console(stderr=True)
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[line]}"))
            self.bar = Progress(*columns, console=console) if console.is_terminal else None
            if self.bar is not None:
                self.bar.start()
                self.task = self.bar.add_task("training", total=plan.images, completed=plan.resumed_at, line="")

        def on_log(self, stats: Stats) -> None:
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

        def on_snapshot(self, snapshot: Snapshot) -> None:
            if self.bar is None:
                click.echo(f"snapshot {snapshot.folder}: loss {snapshot.loss:.4g}", err=True)

        def audited(self, point: Point) -> None:
            line = f"audit after {point.epochs:,.0f} epochs: R_mem {percent(point.ratio)} "
            line += f"({percent_range(point.interval)}), {point.count:,} of {point.total:,} images"
            click.echo(line, err=True) if self.bar is None else self.bar.console.print(line, highlight=False)

        def on_end(self) -> None:
            if self.bar is not None:
                self.bar.stop()

    return Display()
