"""`diffmem sample` and `diffmem import-edm`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import click

from diffmem.cli.audit import Source, as_json_asks, print_verdict
from diffmem.cli.distributed import is_first_rank, process_group
from diffmem.cli.options import (
    Checkpoint,
    CommandWithJson,
    debug_option,
    flag_of,
    gate_options,
    holdout_option,
    json_option,
    limits_of,
    reserve_output,
    reserve_report,
    say_notes,
    tell_gate,
    value_range_option,
)
from diffmem.cli.sampling_options import (
    batch_option,
    class_option,
    compile_option,
    device_option,
    images_out_option,
    report_option,
    restart_option,
    seeds_option,
    solver_option,
    steps_option,
)
from diffmem.errors import InputError

if TYPE_CHECKING:
    from diffmem.evaluation import Generated
    from diffmem.training import RunFolder


@click.command("sample", cls=CommandWithJson)
@click.argument("checkpoint", type=Checkpoint())
@seeds_option("0-9999")
@images_out_option
@solver_option()
@steps_option
@click.option(
    "--sigma-min", "--sigma_min", type=click.FloatRange(min=0, min_open=True),
    help="Lowest noise level; clipped to the network's range, as is the highest.  [default: 0.002, unipc 0.02]",
)  # fmt: skip
@click.option(
    "--sigma-max", "--sigma_max", type=click.FloatRange(min=0, min_open=True), default=80.0, show_default=True,
    help="Highest noise level.",
)  # fmt: skip
@click.option(
    "--rho", type=click.FloatRange(min=0, min_open=True),
    help="Exponent of the noise schedule: the higher, the more of its levels are low (not for unipc).  [default: 7]",
)  # fmt: skip
@click.option(
    "--churn", "--S_churn", "S_churn", type=click.FloatRange(min=0), default=0.0, show_default=True,
    help="Total noise added during sampling, spread over the steps (heun only); 0: deterministic.",
)  # fmt: skip
@click.option(
    "--churn-min", "--S_min", "S_min", type=click.FloatRange(min=0), default=0.0, show_default=True,
    help="Lowest noise level with churn",
)  # fmt: skip
@click.option(
    "--churn-max", "--S_max", "S_max", type=click.FloatRange(min=0), default=float("inf"), show_default=True,
    help="Highest noise level with churn.",
)  # fmt: skip
@click.option(
    "--churn-noise", "--S_noise", "S_noise", type=click.FloatRange(min=0), default=1.0, show_default=True,
    help="Factor on the standard deviation of the churn's noise.",
)  # fmt: skip
@class_option("all images are of this class.  [default: drawn per seed]")
@batch_option(64)
@compile_option("compile", "if the run is long enough for it to pay off")
@click.option(
    "--precision", type=click.Choice(["ieee", "tf32", "bf16", "fp16"]),
    help="Precision of matrix products and convolutions in the network. ieee: float32, the protocol's; tf32: TF32 on a "
    "GPU; bf16, fp16: autocast.  [default: ieee]",
)  # fmt: skip
@click.option("--fp16", "half", flag_value="fp16", help="--precision fp16.")
@click.option("--bf16", "half", flag_value="bf16", help="--precision bf16.")
@device_option
@click.option(
    "--audit",
    "training",
    type=Source(),
    metavar="TRAINING",
    help="Training images, or their index, to audit the samples against.",
)
@holdout_option
@value_range_option("those of --audit and --holdout")
@click.option(
    "--flip/--no-flip", default=None,
    help="Also look for mirrored copies.  [default: on if CHECKPOINT is of a run with --xflip]",
)  # fmt: skip
@report_option("With --audit.")
@restart_option
@json_option("a summary", full="with what is said of each image")
@gate_options
@debug_option
def sample_command(
    checkpoint, seeds, out, precision, half, device, training, holdout, flip, value_range, report, restart,
    as_json, fail_above, require_below, max_copies, **settings,
) -> int:  # fmt: skip
    """Sample images from CHECKPOINT: a folder with model.safetensors and config.json, an EDM snapshot (.pkl), a run of
    `diffmem train`, for its newest snapshot, or, as diffusers:FOLDER, a pipeline of diffusers with a UNet2DModel.

    The same seeds give the same images for any --batch and any number of ranks. Finished batches are kept in
    OUT.partial until OUT is written: after an interrupt, the same command resumes from there.

    To save time, use --solver unipc: with NFE 14 it gives the same verdicts of the memorization rule as the protocol's
    NFE 35 on all but a few seeds (measured: 0.4 % differ for a model with R_mem 99.9 %, 2.6 % for one with R_mem 95.4
    %; heun with NFE 143 differs from NFE 35 on as many). For numbers to be compared with published ones, keep the
    default.

    \b
    Examples:
      diffmem sample model/ --out samples.npz                           the protocol: seeds 0-9999, 18 steps of Heun
      diffmem sample model/ --seeds 0-999 --audit training.zip          only the share of copies
      diffmem sample network-snapshot.pkl --class 3 --out cats.zip --audit training.zip --report report
      diffmem sample model/ --out samples.npz --solver unipc            NFE 14 instead of 35
      torchrun --nproc-per-node 8 -m diffmem sample model/ --out samples.npz --batch 512 --fp16
    """
    import torch

    from diffmem.data import ImageSet, load_images
    from diffmem.evaluation import generate
    from diffmem.memorization import is_index
    from diffmem.progress import progress_bars
    from diffmem.sampling import SamplerConfig

    if out is None and training is None:
        raise click.UsageError("nothing to do: give --out, --audit, or both")
    limits = limits_of(fail_above, require_below, max_copies)
    with_audit = [("--holdout", holdout), ("--flip", flip), ("--value-range", value_range), ("--report", report)]
    with_audit += [(flag_of(name), limit) for name, limit in limits.items()]
    for name, value in with_audit:
        if value is not None and training is None:
            raise click.UsageError(f"{name} goes with --audit")
    if restart and out is None:
        raise click.UsageError("--restart goes with --out")
    if precision is not None and half not in (None, precision):
        raise click.UsageError(f"--precision {precision} and --{half} are mutually exclusive")
    try:
        sampler = SamplerConfig(precision=precision or half or "ieee", **settings)
    except InputError as error:
        raise click.UsageError(str(error)) from None
    torch.set_flush_denormal(True)
    checkpoint, run = checkpoint_of(checkpoint)
    if flip is None and training is not None and run is not None:
        flip = run.config.xflip
    reserve_report(report)
    with says_what_is_kept(out), process_group(), progress_bars(is_first_rank()) as progress:
        if is_first_rank():

            def read(source: str | None) -> ImageSet | None:
                return None if source is None else load_images(source, value_range=value_range, progress=progress)

            training, holdout = training if is_index(training) else read(training), read(holdout)
            say_notes([each for each in (training, holdout) if isinstance(each, ImageSet)])
        result = generate(
            checkpoint, seeds, out=out, sampler=sampler, training=training, holdout=holdout, flip=bool(flip),
            device=device, restart=restart, progress=progress,
        )  # fmt: skip
    return print_result(result, report, as_json, limits=limits)


def checkpoint_of(path: Path) -> tuple[Path, RunFolder | None]:
    """The checkpoint that `path` stands for and the run that it belongs to, if any; the newest snapshot of a run is
    named on standard error."""
    from diffmem.training import RunFolder

    if not path.is_dir():
        return path, None
    if not RunFolder.is_one(path):
        return path, RunFolder.around(path)
    run = RunFolder.open(path)
    newest = run.newest()
    if is_first_rank():
        click.echo(f"{path}: a training run; sampling its newest snapshot, {newest}", err=True)
    return newest, run


@contextmanager
def says_what_is_kept(out: Path | None) -> Iterator[None]:
    """Prints, on an interrupt, where the finished images are and how to resume."""
    from diffmem.evaluation import work_folder

    try:
        yield
    except KeyboardInterrupt:
        if out is not None and is_first_rank() and work_folder(out).exists():
            click.echo(f"finished images are kept in {work_folder(out)}; the same command resumes from there", err=True)
        raise


def print_result(
    result: Generated | None,
    report: Path | None,
    as_json: str | None,
    headline: str = "",
    limits: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    """Prints JSON, or a headline and the summary, and saves the audit's report where one is wanted; on the first rank,
    the others have no result. Returns the exit status, which tells what the gate of these limits decided."""
    if result is None:
        return 0
    gate = cast(Any, result.audit).gate(**limits) if limits else None
    if as_json:
        decided = {} if gate is None else {"gate": gate.to_dict()}
        click.echo(json.dumps({**as_json_asks(result, as_json), **decided}, allow_nan=False))
    else:
        if headline:
            click.echo(headline)
        print_summary(result)
    if report is not None:
        page = cast(Any, result.audit).save(report)
        if not as_json:
            click.echo(f"report: {page}")
    return tell_gate(gate)


def print_summary(result: Generated) -> None:
    """What was made and how fast, and the verdict of the audit, on standard output."""
    images = len(result.samples.seeds)
    line = f"{images:,} images, NFE {result.nfe} each"
    if result.new < images:
        line += f", {images - result.new:,} of them from an earlier run"
    if result.new:
        line += f", {result.images_per_second:.3g} images/s"
    click.echo(line + (f": {result.out}" if result.out is not None else ""))
    if result.audit is not None:
        print_verdict(result.audit)


@click.command("import-edm")
@click.argument("snapshot", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@debug_option
def import_edm_command(snapshot: Path, out: Path) -> None:
    """Turn SNAPSHOT, an EDM network-snapshot-*.pkl or training-state-*.pt, into a checkpoint folder OUT.

    Nothing in SNAPSHOT is executed: only its tensors and its description of the network are read; anything else is
    refused.
    """
    from diffmem.models import import_edm, load

    reserve_output(out)
    folder = import_edm(snapshot, out)
    click.echo(f"{folder}: {load(folder).summary()}")
