"""`diffmem optimum`."""

from __future__ import annotations

from pathlib import Path

import click

from diffmem.cli.distributed import is_first_rank, process_group
from diffmem.cli.options import Source, debug_option
from diffmem.cli.sample import Seeds, print_result, says_what_is_kept
from diffmem.cli.training_options import POSITIVE
from diffmem.errors import InputError


class Variant(click.ParamType):
    name = "kind:value"

    def convert(self, value, parameter, context):
        from diffmem.optimum import parse_regularization

        try:
            return parse_regularization(value) if isinstance(value, str) else value
        except InputError as error:
            self.fail(str(error), parameter, context)


@click.command("optimum")
@click.argument("source", type=Source())
@click.option("--size", type=POSITIVE, metavar="N", help="A subset of N images of SOURCE, as many of each class.")
@click.option("--resize", type=POSITIVE, metavar="R", help="Bring all images to R x R, antialiased.")
@click.option("--color", type=click.Choice(["grey", "rgb"]), help="Convert all images to grey or to RGB.")
@click.option("--cond", is_flag=True, help="The class-conditional optimum, by the labels of SOURCE.")
@click.option("--seeds", type=Seeds(), default="0-999", show_default=True, help="Which images: 0-999 or 0,3,5-7.")
@click.option(
    "--out", type=click.Path(path_type=Path),
    help="Write an .npz (images, seeds, labels), a .zip (EDM's layout), or a new folder (PNG).",
)  # fmt: skip
@click.option(
    "--solver", type=click.Choice(["heun", "unipc", "dpm++"]), default="heun", show_default=True,
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
@click.option("--holdout", type=Source(), help="Real images that are not in SOURCE, for --audit.")
@click.option("--report", type=click.Path(path_type=Path), help="With --audit: a folder for the report.")
@click.option("--restart", is_flag=True, help="Forget what an interrupted run has kept in OUT.partial.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print a summary as JSON on standard output and nothing else there."
)
@debug_option
def optimum_command(
    source, size, resize, color, cond, seeds, out, solver, steps, regularization, subset, tolerance, class_index, batch,
    device, audit, holdout, report, restart, as_json,
) -> None:  # fmt: skip
    """Sample from the theoretical optimum of the training set SOURCE: the denoiser that training tends to, in closed
    form. What it makes are copies, unless it is regularized.

    Runs are kept and resumed as those of `diffmem sample`; the same seeds mean the same latents.

    \b
    Examples:
      diffmem optimum cifar10-train.zip --seeds 0-255 --audit                 all copies
      diffmem optimum builtin:digits --regularize tikhonov:0.1 --audit        fewer
      diffmem optimum builtin:digits --size 100 --out copies.npz --cond
    """
    import torch

    from diffmem.generation import SampleSettings, generate
    from diffmem.optimum import OptimalDenoiser
    from diffmem.progress import progress_bars
    from diffmem.training import DataSource
    from diffmem.whole import check_output_folder

    if out is None and not audit:
        raise click.UsageError("nothing to do: give --out, --audit, or both")
    for name, value in (("--holdout", holdout), ("--report", report)):
        if value is not None and not audit:
            raise click.UsageError(f"{name} goes with --audit")
    if restart and out is None:
        raise click.UsageError("--restart goes with --out")
    if class_index is not None and not cond:
        raise click.UsageError("--class goes with --cond")
    settings = SampleSettings(solver=solver, steps=steps, class_index=class_index, batch=batch, compile="off")
    torch.set_flush_denormal(True)
    if report is not None and is_first_rank():
        check_output_folder(report)
    with says_what_is_kept(out), process_group(), progress_bars(is_first_rank()) as progress:
        training = DataSource(source, size, resize, color).load(progress)
        for note in training.notes if is_first_rank() else ():
            click.echo(f"note: {note}", err=True)
        if cond and training.labels is None:
            raise InputError(f"{source}: --cond needs labels, and there are none")
        denoiser = OptimalDenoiser(
            training, tolerance=tolerance, labels=None if cond else False, device=device,
            regularization=regularization, subset=subset,
        )  # fmt: skip
        result = generate(
            denoiser, seeds, out=out, settings=settings, training=training if audit else None, holdout=holdout,
            restart=restart, progress=progress,
        )  # fmt: skip
    print_result(result, report, as_json, headline=denoiser.summary())
