"""`diffmem optimum`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from diffmem.cli.comparison import print_comparison, print_sweep
from diffmem.cli.distributed import is_first_rank, process_group, ranks
from diffmem.cli.options import (
    SOLVER,
    CommandWithJson,
    Source,
    debug_option,
    gate_options,
    json_option,
    limits_of,
    reading,
    reading_options,
    reserve_report,
    say_notes,
)
from diffmem.cli.sample import Seeds, print_result, says_what_is_kept
from diffmem.cli.training_options import POSITIVE
from diffmem.errors import InputError

if TYPE_CHECKING:
    from diffmem.data import ImageSet

DEFAULT_SEEDS = range(1000)


class Variant(click.ParamType):
    name = "kind:value"

    def convert(self, value, parameter, context):
        from diffmem.optimum import parse_regularization

        try:
            return parse_regularization(value) if isinstance(value, str) else value
        except InputError as error:
            self.fail(str(error), parameter, context)


class Variants(click.ParamType):
    name = "kind[:values]"

    def convert(self, value, parameter, context):
        from diffmem.studies.comparison import parse_sweep

        try:
            return parse_sweep(value) if isinstance(value, str) else value
        except InputError as error:
            self.fail(str(error), parameter, context)


_GATE = ("fail_above", "require_below", "max_copies")

# What each of the command's three uses has no use for, by parameter.
_NOT_WITH = {
    "--compare": ("variants", "out", "cond", "regularization", "subset", "class_index", "audit", "restart", *_GATE),
    "--sweep": ("out", "regularization", "subset", "audit", "holdout", "restart", "images", "levels", *_GATE),
    "sampling": ("images", "levels"),
}


@click.command("optimum", cls=CommandWithJson)
@click.argument("source", type=Source())
@click.option(
    "--compare", "checkpoint", type=click.Path(exists=True, path_type=Path), metavar="CHECKPOINT",
    help="How close is this trained network to the optimum? A checkpoint that `diffmem sample` reads, or a run.",
)  # fmt: skip
@click.option(
    "--sweep", "variants", type=Variants(), multiple=True,
    help="R_mem against the strength of a regularization: tikhonov, bayes or smooth, at strengths chosen from the "
    "data, or at yours: smooth:0.03,0.1,0.3. May be given several times.",
)  # fmt: skip
@click.option("--size", type=POSITIVE, metavar="N", help="A subset of N images of SOURCE, as many of each class.")
@click.option("--resize", type=POSITIVE, metavar="R", help="Bring all images to R x R, antialiased.")
@reading_options("source", "holdout")
@click.option("--cond", is_flag=True, help="The class-conditional optimum, by the labels of SOURCE.")
@click.option(
    "--seeds",
    type=Seeds(),
    help="Which images: 0-999 or 0,3,5-7.  [default: 0-999; with --compare as many as --images]",
)
@click.option(
    "--out", type=click.Path(path_type=Path),
    help="Write an .npz (images, seeds, labels), a .zip (EDM's layout), or a new folder (PNG).",
)  # fmt: skip
@click.option(
    "--solver", type=SOLVER, default="heun", show_default=True,
    help="See `diffmem sample`.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(min=2), help="Noise levels.  [default: heun 18, others 14]")
@click.option(
    "--regularize", "regularization", type=Variant(),
    help="tikhonov:C, bayes:TAU or smooth:H, for images in [-1, 1]. TAU may be written exp(-1500): on the way to a "
    "copy of d values, the sum it bounds is about exp(-d/2).",
)  # fmt: skip
@click.option("--subset", type=POSITIVE, metavar="M", help="Another random subset of M images at each noise level.")
@click.option(
    "--tolerance", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=1e-5, show_default=True,
    help="Relative error of the denoiser.",
)  # fmt: skip
@click.option(
    "--class", "class_index", type=click.IntRange(min=0), metavar="K", help="With --cond: all images of this class."
)
@click.option("--batch", type=POSITIVE, default=256, show_default=True, help="Images at a time.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
@click.option("--audit", is_flag=True, help="Audit the images against SOURCE as they come.")
@click.option(
    "--holdout", type=Source(),
    help="Real images the model has not seen, for --audit and --compare; with --compare those of SOURCE are left out.",
)  # fmt: skip
@click.option(
    "--images", type=click.IntRange(min=2), default=256, show_default=True,
    help="With --compare: how many noisy training and unseen images, at most.",
)  # fmt: skip
@click.option(
    "--levels", type=click.IntRange(min=2), default=24, show_default=True, help="With --compare: noise levels."
)
@click.option(
    "--report", type=click.Path(path_type=Path),
    help="A folder for the report of --audit, --compare or --sweep; a sweep keeps what is finished there and goes on.",
)  # fmt: skip
@click.option("--restart", is_flag=True, help="Forget what an interrupted run has kept in OUT.partial.")
@json_option
@gate_options
@debug_option
@click.pass_context
def optimum_command(
    context, source, checkpoint, variants, size, resize, color, alpha, key, layout, skip_bad, cond, seeds, out, solver,
    steps, regularization, subset, tolerance, class_index, batch, device, audit, holdout, images, levels, report,
    restart, as_json, fail_above, require_below, max_copies,
) -> int:  # fmt: skip
    """Sample from the theoretical optimum of the training set SOURCE: the denoiser that training tends to, in closed
    form. What it makes are copies, unless it is regularized.

    Runs are kept and resumed as those of `diffmem sample`; the same seeds mean the same latents.

    --compare measures the squared gap between a trained network and the optimum of its training set, by noise level, on
    training, generated and (with --holdout) unseen images, and tells at which noise levels the network has become its
    training set: where its rms error on training images is at most a third of that on unseen ones.

    --sweep shows how the copies vanish as the optimum is regularized.

    \b
    Examples:
      diffmem optimum cifar10-train.zip --seeds 0-255 --audit                 all copies
      diffmem optimum builtin:digits --regularize tikhonov:0.1 --audit        fewer
      diffmem optimum builtin:digits --size 100 --out copies.npz --cond
      diffmem optimum builtin:digits --sweep tikhonov --sweep smooth:0.03,0.1,0.3 --report sweep
      diffmem optimum builtin:digits --size 100 --compare run --holdout builtin:digits --report compare
    """
    import torch

    from diffmem.data import DatasetSpec
    from diffmem.evaluation import generate
    from diffmem.optimum import OptimalDenoiser
    from diffmem.progress import progress_bars
    from diffmem.sampling import SamplerConfig
    from diffmem.studies.comparison import compare, sweep

    use = "--compare" if checkpoint is not None else "--sweep" if variants else "sampling"
    _check_use(context, use)
    settings = SamplerConfig(solver=solver, steps=steps, class_index=class_index, batch=batch, compile="off")
    torch.set_flush_denormal(True)
    reserve_report(report)
    with says_what_is_kept(out), process_group(), progress_bars(is_first_rank()) as progress:
        given = {"color": color, "alpha": alpha, "key": key, "layout": layout, "skip_bad": skip_bad}
        training = DatasetSpec(source, size, resize, **reading("source", **given)).load(progress)
        say_notes([training], is_first_rank())
        if holdout is not None:
            holdout = DatasetSpec(holdout, None, resize, **reading("holdout", **given)).load(progress)
            say_notes([holdout], is_first_rank())
        if cond:
            _check_classes(training, class_index)
        if use == "--compare":
            result = compare(
                checkpoint, training, holdout=holdout, images=images, seeds=seeds, levels=levels, settings=settings,
                tolerance=tolerance, device=device, progress=progress,
            )  # fmt: skip
            tell = print_comparison
        elif use == "--sweep":
            result = sweep(
                training, [variant for group in variants for variant in group], report, seeds=seeds or DEFAULT_SEEDS,
                labels=cond, tolerance=tolerance, settings=settings, device=device,
                progress=progress,
            )  # fmt: skip
            tell = print_sweep
        else:
            denoiser = OptimalDenoiser(
                training, tolerance=tolerance, labels=cond, device=device,
                regularization=regularization, subset=subset,
            )  # fmt: skip
            result = generate(
                denoiser, seeds or DEFAULT_SEEDS, out=out, settings=settings, training=training if audit else None,
                holdout=holdout, restart=restart, progress=progress,
            )  # fmt: skip
            limits = limits_of(fail_above, require_below, max_copies)
            tell = partial(print_result, headline=denoiser.summary(), limits=limits)
    return tell(result, report, as_json) or 0


def _check_classes(training: ImageSet, class_index: int | None) -> None:
    """Raises InputError where the class-conditional optimum cannot be sampled: each seed draws one of all classes."""
    from diffmem.data.classes import class_indices, missing_classes

    labels = class_indices(training, "--cond")
    if class_index is not None and class_index not in labels:
        raise InputError(f"{training.source}: no image has class {class_index}, the --class that is to be sampled")
    if class_index is None and (gaps := missing_classes(labels)):
        raise InputError(
            f"{training.source}: {gaps}, and the optimum of a class without images is not defined: number the classes"
            " from 0 with labels='consecutive', or choose one with --class"
        )


def _check_use(context: click.Context, use: str) -> None:
    """Raises UsageError for options that do not go together."""
    given = {
        parameter.name: parameter.opts[0]
        for parameter in context.command.params
        if context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    }
    for name in _NOT_WITH[use]:
        if name in given:
            what = "goes with --compare" if use == "sampling" else f"does not go with {use}"
            raise click.UsageError(f"{given[name]} {what}")
    if use == "sampling":
        if "out" not in given and "audit" not in given:
            raise click.UsageError("nothing to do: give --out, --audit, --compare or --sweep")
        for name in ("holdout", "report", *_GATE):
            if name in given and "audit" not in given:
                raise click.UsageError(f"{given[name]} goes with --audit")
        if "restart" in given and "out" not in given:
            raise click.UsageError("--restart goes with --out")
    elif ranks() > 1:
        raise click.UsageError(f"{use} runs in one process, without torchrun")
    if use == "--sweep" and "report" not in given:
        raise click.UsageError("--sweep needs a folder to keep its results in: --report")
    if "class_index" in given and "cond" not in given:
        raise click.UsageError("--class goes with --cond")
