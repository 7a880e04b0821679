"""Options of the commands that sample images, and of those that write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from diffmem.cli.options import SOLVER, AutoOnOff
from diffmem.errors import InputError


class Seeds(click.ParamType):
    """Whole numbers and ranges of them: 0-9999 or 0,3,5-7."""

    name = "seeds"

    def convert(self, value, parameter, context) -> list[int]:
        from diffmem.evaluation import parse_seeds

        try:
            return value if isinstance(value, list) else parse_seeds(value)
        except InputError as error:
            self.fail(str(error), parameter, context)


def seeds_option(default: str | None, otherwise: str = "") -> Callable[[Callable], Callable]:
    """--seeds. otherwise: what it is where there is no default, for the help."""
    help = "Seeds of the images: 0-9999 or 0,3,5-7." + (f"  [default: {otherwise}]" if otherwise else "")
    return click.option("--seeds", type=Seeds(), default=default, show_default=default is not None, help=help)


def solver_option(name: str = "--solver") -> Callable[[Callable], Callable]:
    """--solver, or the option of that name."""
    return click.option(
        name, type=SOLVER, default="heun", show_default=True,
        help="The sampler. heun: the protocol's, number of function evaluations (NFE) 35 by default; unipc: 14, with "
        "nearly the same verdicts; dpm++: DPM-Solver++(2M), 14.",
    )  # fmt: skip


steps_option = click.option(
    "--steps", type=click.IntRange(min=2), help="Number of steps.  [default: heun 18, others 14]"
)


def batch_option(default: int) -> Callable[[Callable], Callable]:
    """--batch of a sampler, by which images change by rounding at most."""
    return click.option(
        "--batch", type=click.IntRange(min=1), default=default, show_default=True,
        help="Images per batch: those sampled at a time.",
    )  # fmt: skip


def compile_option(variable: str, when: str) -> Callable[[Callable], Callable]:
    """--compile. when: what "auto" goes by, for the help."""
    return click.option(
        "--compile", variable, type=AutoOnOff(), default="auto", show_default=True,
        help=f"Compile the network with torch.compile; auto: {when}.",
    )  # fmt: skip


def class_option(help: str) -> Callable[[Callable], Callable]:
    """--class."""
    return click.option("--class", "class_index", type=click.IntRange(min=0), metavar="K", help=f"The class K: {help}")


device_option = click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")


def folder_option(what: str, **settings) -> Callable[[Callable], Callable]:
    """--out of a command whose output is a folder."""
    return click.option("--out", type=click.Path(path_type=Path), help=f"Output: {what}", **settings)


images_out_option = folder_option(
    "an .npz (images, seeds, labels), a .zip (EDM's layout), or a new folder (PNG, one sub-folder per 1000 seeds)."
)
restart_option = click.option(
    "--restart", is_flag=True, help="Discard what an interrupted run has kept in OUT.partial."
)


def report_option(of: str = "") -> Callable[[Callable], Callable]:
    """--report. of: what it depends on, for the help."""
    return click.option(
        "--report", type=click.Path(path_type=Path),
        help="Folder for the audit's report: report.html and its tables." + (f" {of}" if of else ""),
    )  # fmt: skip
