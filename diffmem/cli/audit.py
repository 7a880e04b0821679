"""`diffmem audit`."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffmem.cli.distributed import is_first_rank, process_group, ranks
from diffmem.cli.options import (
    CommandWithJson,
    Source,
    center_crop_option,
    debug_option,
    gate_options,
    holdout_option,
    in_own_options,
    json_option,
    limits_of,
    ranges_by_set,
    reading,
    reading_options,
    reserve_report,
    resize_option,
    say_notes,
    tell_gate,
    value_range_option,
)
from diffmem.cli.sampling_options import device_option, folder_option
from diffmem.errors import InputError
from diffmem.text import printable

if TYPE_CHECKING:
    from diffmem.evaluation import Generated
    from diffmem.memorization import Audit, Gate


class Threshold(click.ParamType):
    name = "fraction"

    def convert(self, value, parameter, context) -> Fraction:
        from diffmem.memorization import parse_threshold

        try:
            return parse_threshold(value)
        except InputError as error:
            self.fail(str(error), parameter, context)


@click.command("audit", cls=CommandWithJson)
@click.argument("generated", type=Source())
@click.argument("training", type=Source())
@holdout_option
@click.option("--threshold", type=Threshold(), default="1/3", show_default=True, help="A copy has d1/d2 below this.")
@click.option(
    "--duplicates", type=click.Choice(["collapse", "keep"]), default="collapse", show_default=True,
    help="Take the second neighbor among the images that are no duplicates of the first, or leave duplicates in (the "
    "paper's rule).",
)  # fmt: skip
@click.option(
    "--duplicate-radius", type=click.FloatRange(min=0), default=0.0, show_default=True,
    help="Training images within this distance (rms, gray levels) of the nearest one are duplicates of it.",
)  # fmt: skip
@click.option("--flip", is_flag=True, help="Look for mirrored copies too (models trained with horizontal flips).")
@resize_option()
@center_crop_option
@click.option(
    "--split-grid", is_flag=True,
    help="GENERATED are sheets of images in a grid: cut them into images of the training images' size.",
)  # fmt: skip
@value_range_option("of all sets, or of one alone: generated=-1,1, training=0,1, holdout=0,1", multiple=True)
@reading_options("generated", "training", "holdout")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N images: of GENERATED.")
@click.option(
    "--cache", is_flag=True, help="Keep a packed copy beside each source, so that the next run starts at once."
)
@click.option(
    "--index", default="exact", show_default=True, metavar="NAME",
    help="How neighbors are searched: exact, or by FAISS, on GPUs where it has them: flat, ivf, ivf1024, hnsw, or one "
    "of its factory strings. What FAISS misses is measured on a sample and reported.",
)  # fmt: skip
@device_option
@folder_option("a folder for report.html, samples.csv and report.json.")
@json_option("a summary", full="with what is said of each image")
@gate_options
@debug_option
def audit_command(
    generated, training, holdout, threshold, duplicates, duplicate_radius, flip,
    resize, center_crop, split_grid, value_range, limit, cache, index, device, out, as_json,
    fail_above, require_below, max_copies, **options,
) -> int:  # fmt: skip
    """Which of the GENERATED images are copies of TRAINING images?

    GENERATED and TRAINING are folders, zips, .npz, .npy, .pt or .safetensors files, CIFAR-10's
    cifar-10-python.tar.gz, data sets saved by Hugging Face datasets, or builtin:digits and builtin:patches.
    Pictures are turned as their EXIF orientation says, in every format; a note counts them. Pictures deeper
    than 8 bits per channel are refused, but for 16-bit gray that 8 bits hold exactly.

    A gate ends the command with status 0 (passed), 3 (closed) or 4 (undecided, also where the audit carries
    warnings); 1 and 2 stay errors.

    \b
    Examples:
      diffmem audit samples/ cifar10-train.zip --holdout cifar10-test.zip --out report
      diffmem audit samples.npz training.zip --json | jq .ratio
      diffmem audit samples.zip training.zip --require-below 0.01    a gate for a pipeline
      diffmem audit samples.zip training.zip --index ivf             FAISS, for sets too large to search exactly
      torchrun --nproc-per-node 8 -m diffmem audit samples.zip training.zip    one shard of the training set per GPU
    """
    import torch

    from diffmem.data import load_images
    from diffmem.memorization import audit
    from diffmem.progress import progress_bars
    from diffmem.search import ShardedIndex

    if split_grid and (resize or center_crop):
        raise click.UsageError("--split-grid cuts at the training images' size: leave --resize and --center-crop out")
    torch.set_flush_denormal(True)
    if index != "exact" and ranks() > 1:
        raise click.UsageError("--index: FAISS searches in one process, on all GPUs it sees: leave torchrun out")
    limits = limits_of(fail_above, require_below, max_copies)
    reserve_report(out)
    with process_group() as distributed, progress_bars(is_first_rank()) as progress:
        ranges = ranges_by_set(value_range)

        def load(name: str, source: str, first: int | None = None):
            given = {**reading(name, **options), "value_range": ranges.get(name)}
            given |= {"resize": resize, "center_crop": center_crop, "cache": cache}
            images = load_images(source, limit=first, progress=progress, **given)
            say_notes([images], is_first_rank())
            return images

        generated, training = load("generated", generated, limit), load("training", training)
        result = audit(
            generated,
            training,
            threshold=threshold,
            duplicates=duplicates,
            duplicate_radius=duplicate_radius,
            holdout=None if holdout is None else load("holdout", holdout),
            split_grid=split_grid,
            flip=flip,
            device=device,
            index=ShardedIndex(training, device=device) if distributed else index,
            progress=progress,
        )
    if not is_first_rank():
        return 0
    gate = result.gate(**limits) if limits else None
    tell_audit(result, out, as_json, gate)
    return tell_gate(gate)


def tell_audit(result: Audit, out: Path | None, as_json: str | None, gate: Gate | None) -> None:
    """Prints the verdict, or JSON, and saves the report where one is wanted: after that, lest a full disk hide both."""
    if as_json:
        decided = {} if gate is None else {"gate": gate.to_dict()}
        click.echo(json.dumps({**as_json_asks(result, as_json), **decided}))
        for warning in result.warnings:
            click.echo(f"warning: {printable(in_own_options(warning))}", err=True)
    else:
        print_verdict(result)
    if out is not None:
        page = result.save(out)
        if not as_json:
            click.echo(f"report: {page}")


def as_json_asks(result: Audit | Generated, kind: str) -> dict[str, Any]:
    """All that is known, or a summary."""
    return result.to_dict() if kind == "full" else result.summary()


def print_verdict(result: Audit) -> None:
    """A short verdict that a person understands, on standard output."""
    from diffmem.html_report import percent, percent_range

    click.echo(f"{result.verdict()}.")
    for warning in result.warnings:
        click.echo(f"  warning: {in_own_options(warning)}")
    left_in = f"{result.raw_count:,} ({percent(result.raw_ratio)})"
    published = f"{result.published_count:,} ({percent(result.published_ratio)})"
    click.echo(f"  duplicates left in: {left_in}; as the paper's code counts, where 0/0 is no copy: {published}")
    if (search := result.settings["search"])["method"] == "faiss":
        recalls = f"{percent(search['recall_nearest'])} and {percent(search['recall_second'])}"
        sample = f"measured on {search['recall_sample']:,} images"
        click.echo(f"  FAISS ({search['index']}): recall of the nearest and second nearest {recalls}, {sample}")
    if result.holdout is not None:
        alarms = f"{result.holdout.count:,} of {result.holdout.total:,} ({percent(result.holdout.ratio)}"
        click.echo(
            f"  false alarms on unseen real images: {alarms}, interval {percent_range(result.holdout.interval)})"
        )
        if left_out := result.holdout.left_out:
            first = f"{left_out[0].name} is {left_out[0].training_name}"
            click.echo(
                f"  left out of the holdout set, since they are training images: {len(left_out):,} ({printable(first)})"
            )
        for warning in result.holdout.warnings:
            click.echo(f"  warning about the holdout set: {in_own_options(warning)}")
    click.echo(f"  mean distance to the nearest training image: {result.mean_rms:.3f} gray levels rms")
    if result.duplicates:
        click.echo(f"  duplicates in the training set: {len(result.duplicates):,} groups")
    for which in ("generated", "training"):
        if skipped := result.settings[which]["skipped"]:
            first = f"{skipped[0]['name']}: {skipped[0]['reason']}"
            click.echo(f"  {which} files skipped: {len(skipped):,} (the first: {printable(first)})")
    if result.sources:
        most = ", ".join(f"{printable(source.name)} ({source.count})" for source in result.sources[:3])
        click.echo(f"  copied most often: {most}")
