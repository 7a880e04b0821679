"""`diffmem optimum`: sample, compare, sweep."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import click

from diffmem.cli.comparison import print_comparison, print_sweep
from diffmem.cli.distributed import is_first_rank, process_group, ranks
from diffmem.cli.options import (
    Checkpoint,
    CommandWithJson,
    Source,
    debug_option,
    flag_of,
    gate_options,
    holdout_option,
    json_option,
    limits_of,
    moved_option,
    reading,
    reading_options,
    reserve_report,
    resize_option,
    say_notes,
    size_option,
)
from diffmem.cli.sample import print_result, says_what_is_kept
from diffmem.cli.sampling_options import (
    batch_option,
    class_option,
    device_option,
    folder_option,
    images_out_option,
    report_option,
    restart_option,
    seeds_option,
    solver_option,
    steps_option,
)
from diffmem.cli.training_options import POSITIVE
from diffmem.errors import InputError

if TYPE_CHECKING:
    from diffmem.data import ImageSet
    from diffmem.progress import Progress


class Variant(click.ParamType):
    """A regularization with its strength."""

    name = "kind:value"

    def convert(self, value, parameter, context):
        from diffmem.optimum import parse_regularization

        try:
            return parse_regularization(value) if isinstance(value, str) else value
        except InputError as error:
            self.fail(str(error), parameter, context)


class Variants(click.ParamType):
    """A kind of regularization, with strengths or without."""

    name = "kind[:values]"

    def convert(self, value, parameter, context):
        from diffmem.studies.comparison import parse_sweep

        try:
            return parse_sweep(value) if isinstance(value, str) else value
        except InputError as error:
            self.fail(str(error), parameter, context)


class _Subcommands(click.Group):
    """Points from the options of the former single command to the subcommands."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        words = [word for word in args if not word.startswith("-")]
        if words and words[0] not in self.commands:
            given = {word.partition("=")[0] for word in args}
            use = "sample SOURCE"
            if "--compare" in given:
                use = "compare SOURCE CHECKPOINT"
            elif "--sweep" in given:
                use = "sweep SOURCE tikhonov smooth:0.03,0.1 … --out FOLDER"
            raise click.UsageError(
                f"{words[0]!r} is not one of the subcommands sample, compare, sweep: write `diffmem optimum {use} …`",
                context,
            )
        return super().parse_args(context, args)


_SHARED = [
    click.argument("source", type=Source()),
    size_option(": of SOURCE"),
    resize_option(),
    solver_option(),
    steps_option,
    click.option(
        "--tolerance", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=1e-5, show_default=True,
        help="Relative error allowed for the optimal denoiser.",
    ),
    batch_option(256),
    device_option,
]  # fmt: skip


def _shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the optimum and its sampler, shared by all three."""
    for option in reversed(_SHARED):
        command = cast(Any, option)(command)
    return command


_cond_option = click.option(
    "--cond", is_flag=True, help="Class-conditional, on the labels of the data: the optimum of each class of SOURCE."
)
_class_option = class_option("all images are of this class. With --cond.")


@click.group("optimum", cls=_Subcommands)
@debug_option
def optimum_command() -> None:
    """The theoretical optimum of a training set: the closed-form denoiser that minimizes the training loss.

    Unless it is regularized, it can only generate copies.

    \b
    Examples:
      diffmem optimum sample builtin:digits --seeds 0-255                     all copies
      diffmem optimum sweep builtin:digits tikhonov smooth --out sweep        when copying stops
      diffmem optimum compare builtin:digits run --holdout builtin:digits     how close a network is
    """


@optimum_command.command("sample", cls=CommandWithJson, short_help="Sample it, and audit the images.")
@_shared_options
@reading_options("source", "holdout")
@_cond_option
@_class_option
@seeds_option("0-999")
@click.option(
    "--regularize", "regularization", type=Variant(),
    help="tikhonov:C, bayes:TAU or smooth:H, for images in [-1, 1]. TAU may be written exp(-1500): the sum it bounds "
    "from below is about exp(-d/2) for images of d values.",
)  # fmt: skip
@click.option("--subset", type=POSITIVE, metavar="M", help="Another random subset of M images at each noise level.")
@images_out_option
@click.option("--no-audit", is_flag=True, help="Only write the images; do not audit them against SOURCE.")
@moved_option("--audit", "the images are always audited against SOURCE; remove it", flag=True)
@holdout_option
@report_option()
@restart_option
@json_option("a summary", full="with what is said of each image")
@gate_options
@debug_option
def sample_command(
    source, size, resize, solver, steps, tolerance, batch, device, cond, class_index, seeds, regularization, subset,
    out, no_audit, holdout, report, restart, as_json, fail_above, require_below, max_copies, **given,
) -> int:  # fmt: skip
    """Sample from the optimum of the training set SOURCE, and audit the images against SOURCE as they come.

    Runs resume as those of `diffmem sample` do; the same seeds give the same latents.

    \b
    Examples:
      diffmem optimum sample cifar10-train.zip --seeds 0-255                    all copies
      diffmem optimum sample builtin:digits --regularize tikhonov:0.1           fewer
      diffmem optimum sample builtin:digits --size 100 --out copies.npz --cond
    """
    from diffmem.evaluation import generate
    from diffmem.optimum import OptimalDenoiser
    from diffmem.progress import progress_bars

    limits = limits_of(fail_above, require_below, max_copies)
    of_audit = {"holdout": holdout, "report": report, **limits}
    for name, value in of_audit.items():
        if no_audit and value is not None:
            raise click.UsageError(f"{flag_of(name)} does not go with --no-audit")
    if no_audit and out is None:
        raise click.UsageError("nothing to do: give --out, or remove --no-audit")
    if restart and out is None:
        raise click.UsageError("--restart goes with --out")
    _check_class(class_index, cond)
    sampler = _sampler(solver, steps, batch, class_index)
    reserve_report(report)
    with says_what_is_kept(out), process_group(), progress_bars(is_first_rank()) as progress:
        training, unseen = _sets(source, holdout, size, resize, given, progress)
        if cond:
            _check_classes(training, class_index)
        denoiser = OptimalDenoiser(
            training, tolerance=tolerance, labels=cond, device=device, regularization=regularization, subset=subset
        )  # fmt: skip
        result = generate(
            denoiser, seeds, out=out, sampler=sampler, training=None if no_audit else training, holdout=unseen,
            restart=restart, progress=progress,
        )  # fmt: skip
    return print_result(result, report, as_json, headline=denoiser.summary(), limits=limits)


@optimum_command.command("compare", cls=CommandWithJson, short_help="How close is a network to it?")
@_shared_options
@click.argument("checkpoint", type=Checkpoint())
@reading_options("source", "holdout")
@seeds_option(None, otherwise="as many as --noisy-images")
@holdout_option
@moved_option("--report", "the output folder of a comparison is --out")
@moved_option("--images", "use --noisy-images; --images is the length of training")
@click.option(
    "--noisy-images", "images", type=click.IntRange(min=2), default=256, show_default=True, metavar="N",
    help="Maximum number of training images, and of unseen images, that noise is added to.",
)  # fmt: skip
@click.option(
    "--levels", type=click.IntRange(min=2), default=24, show_default=True, help="Number of noise levels to compare at."
)
@folder_option("a folder for compare.html, .json, .csv and .svg.")
@json_option("the comparison")
@debug_option
def compare_command(
    source, checkpoint, size, resize, solver, steps, tolerance, batch, device, seeds, holdout, images, levels, out,
    as_json, **given,
) -> None:  # fmt: skip
    """How close is the network CHECKPOINT to the optimum of its training set SOURCE?

    CHECKPOINT is what `diffmem sample` reads. Measures the squared gap between network and optimum by noise level, on
    training, generated and (with --holdout) unseen images, and finds the noise levels at which the network has
    memorized its training set: those where its rms error on training images is at most a third of that on unseen ones.

    \b
    Examples:
      diffmem optimum compare training.zip run/ --holdout unseen.zip --out compare
      diffmem optimum compare builtin:digits run/ --size 100 --holdout builtin:digits
    """
    from diffmem.progress import progress_bars
    from diffmem.studies.comparison import compare

    _one_process("compare")
    sampler = _sampler(solver, steps, batch)
    reserve_report(out)
    with progress_bars() as progress:
        training, unseen = _sets(source, holdout, size, resize, given, progress)
        result = compare(
            checkpoint, training, holdout=unseen, images=images, seeds=seeds, levels=levels, sampler=sampler,
            tolerance=tolerance, device=device, progress=progress,
        )  # fmt: skip
    print_comparison(result, out, as_json)


@optimum_command.command("sweep", cls=CommandWithJson, short_help="R_mem against the strength of regularization.")
@_shared_options
@click.argument("variants", type=Variants(), nargs=-1, required=True, metavar="KIND[:VALUES]…")
@reading_options()
@_cond_option
@_class_option
@seeds_option("0-999")
@folder_option("a folder for sweep.html and its tables; finished points are kept there.", required=True)
@moved_option("--report", "the output folder of a sweep is --out")
@json_option("the points of the sweep")
@debug_option
def sweep_command(
    source, variants, size, resize, solver, steps, tolerance, batch, device, cond, class_index, seeds, out, as_json,
    **given,
) -> None:  # fmt: skip
    """Measure R_mem against the strength of regularization of the optimum of SOURCE.

    KIND is tikhonov, bayes or smooth, at strengths chosen from the data, or given by you: smooth:0.03,0.1,0.3. The same
    command resumes an interrupted sweep in OUT, and further seeds or strengths cost only themselves.

    \b
    Examples:
      diffmem optimum sweep builtin:digits tikhonov smooth:0.03,0.1,0.3 --out sweep
      diffmem optimum sweep cifar10-train.zip tikhonov bayes smooth --seeds 0-255 --out sweep
    """
    from diffmem.progress import progress_bars
    from diffmem.studies.comparison import sweep

    _one_process("sweep")
    _check_class(class_index, cond)
    sampler = _sampler(solver, steps, batch, class_index)
    reserve_report(out)
    with progress_bars() as progress:
        training, _ = _sets(source, None, size, resize, given, progress)
        if cond:
            _check_classes(training, class_index)
        result = sweep(
            training, [variant for group in variants for variant in group], out, seeds=seeds, labels=cond,
            tolerance=tolerance, sampler=sampler, device=device, progress=progress,
        )  # fmt: skip
    print_sweep(result, out, as_json)


def _sampler(solver: str, steps: int | None, batch: int, class_index: int | None = None):
    """The sampler's configuration; what is computed from here on treats denormal numbers as zeros."""
    import torch

    from diffmem.sampling import SamplerConfig

    torch.set_flush_denormal(True)
    return SamplerConfig(solver=solver, steps=steps, class_index=class_index, batch=batch, compile="off")


def _sets(
    source: str, holdout: str | None, size: int | None, resize: int | None, given: dict, progress: Progress
) -> tuple[ImageSet, ImageSet | None]:
    """The training images and the unseen ones; `given` says how they are read."""
    from diffmem.data import DatasetSpec

    training = DatasetSpec(source, size, resize, **reading("source", **given)).load(progress)
    unseen = (
        None if holdout is None else DatasetSpec(holdout, None, resize, **reading("holdout", **given)).load(progress)
    )
    say_notes([training, unseen], is_first_rank())
    return training, unseen


def _one_process(name: str) -> None:
    if ranks() > 1:
        raise click.UsageError(f"{name} runs in one process, without torchrun")


def _check_class(class_index: int | None, cond: bool) -> None:
    if class_index is not None and not cond:
        raise click.UsageError("--class goes with --cond")


def _check_classes(training: ImageSet, class_index: int | None) -> None:
    """Raises InputError where the class-conditional optimum cannot be sampled: each seed draws one of all classes."""
    from diffmem.data.classes import class_indices, missing_classes

    labels = class_indices(training, "--cond")
    if class_index is not None and class_index not in labels:
        raise InputError(f"{training.source}: no image has class {class_index}, which --class asks for")
    if class_index is None and (gaps := missing_classes(labels)):
        raise InputError(
            f"{training.source}: {gaps}, and the optimum of a class without images is undefined: number the classes"
            " from 0 with labels='consecutive', or choose one with --class"
        )
