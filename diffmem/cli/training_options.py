"""The options that say what is trained and how, shared by the commands that train.

They have no defaults of their own: `diffmem.training.training_parts`, which knows them by the same names, has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from diffmem.cli.options import Color, Source, resize_option

if TYPE_CHECKING:
    from diffmem.training import TrainingParts


class Numbers(click.ParamType):
    """Whole numbers, separated by commas."""

    name = "n,n,…"

    def convert(self, value, parameter, context) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers like 2,2,2", parameter, context)


POSITIVE = click.IntRange(min=1)
NUMBER, SHARE = click.FloatRange(min=0), click.FloatRange(0, 1)

_DATA: dict[str, Any] = {"type": Source(), "help": "The training images; see `diffmem audit`."}
_OPTIONS = [
    # The training set.
    resize_option(),
    click.option("--color", type=Color(), help="Convert all images to gray or to RGB."),
    click.option("--cond", is_flag=True, help="Class-conditional, on the labels of the data."),
    click.option("--xflip", is_flag=True, help="Double the training set with horizontally mirrored images."),
    click.option(
        "--window",
        type=SHARE,
        help="Size of the shuffle window as a fraction of the set; 0: the same order every epoch.  [default: 0]",
    ),
    click.option("--augment", type=SHARE, help="Probability of EDM's non-leaking augmentations.  [default: 0]"),
    # The network.
    click.option(
        "--preset",
        help="A network with its training settings: protocol, small_16, small_8, or one of diffmem.models.PRESETS; "
        "other options override parts of it.  [default: by image size; protocol above 24x24, and with --arch]",
    ),
    click.option("--arch", type=click.Choice(["ddpmpp", "ncsnpp", "adm"]), help="Architecture. [default: ddpmpp]"),
    click.option(
        "--precond",
        type=click.Choice(["vp", "ve", "edm"]),
        help="Preconditioning. [default: vp, ve, edm of the architectures; edm of the small presets]",
    ),
    click.option(
        "--num-channels", "--cbase", "model_channels", type=POSITIVE, help="Width: number of channels at multiplier 1."
    ),
    click.option("--channel-mult", "--cres", type=Numbers(), help="Width multipliers per resolution."),
    click.option("--num-blocks", type=POSITIVE, help="Depth: number of residual blocks per resolution."),
    click.option("--embedding", type=click.Choice(["positional", "fourier"]), help="Embedding of the noise level."),
    click.option("--attn-resolutions", type=Numbers(), help="Resolutions with self-attention."),
    click.option(
        "--skips",
        metavar="LIST",
        help='Enabled skip connections: resolutions or single ones, as in "32,16.0", or "none".',
    ),
    click.option("--dropout", type=SHARE, help="Dropout probability."),
    # Training.
    click.option("--images", type=POSITIVE, help="Training length in images seen."),
    click.option("--epochs", type=NUMBER, help="Training length in epochs."),
    click.option("--duration", type=NUMBER, help="Training length in the paper's unit of 20 epochs."),
    click.option(
        "--batch",
        type=POSITIVE,
        help="Images per batch: those of a step, over all processes. [default: 512; small presets 64]",
    ),
    click.option("--optimizer", type=click.Choice(["adam", "adamw", "sgd"]), help="Optimizer. [default: adam]"),
    click.option("--lr", type=NUMBER, help="Learning rate. [default: 2e-4; small_16 1e-3, small_8 3e-3]"),
    click.option("--warmup-epochs", type=NUMBER, help="Epochs of linear warm-up.  [default: 200; small presets 20]"),
    click.option(
        "--weight-decay",
        type=NUMBER,
        help="Weight decay: an L2 penalty in adam and sgd, decoupled in adamw.  [default: 0]",
    ),
    click.option("--momentum", type=NUMBER, help="Momentum of sgd.  [default: 0]"),
    click.option(
        "--ema-rule",
        type=click.Choice(["by-size", "compensated", "constant", "target"]),
        help="Rule of the EMA weights. [default: compensated; target with --ema-target and small presets]",
    ),
    click.option("--ema-target", type=SHARE, help="Final decay of --ema-rule target."),
    click.option(
        "--ema-halflife",
        type=POSITIVE,
        help="Half-life of the EMA weights in images.  [default: 500000]",
    ),
    click.option(
        "--ema-protocol",
        type=click.Choice(["paper", "published"]),
        help="Half-life of the EMA weights by training-set size: as in the paper, or rounded down to whole thousands "
        "of images as in its published code (no averaging below 100 training images).  [default: paper]",
    ),
    click.option("--tikhonov", type=NUMBER, help="Tikhonov regularization of the score.  [default: 0]"),
]


def training_options(command: Callable) -> Callable:
    """Gives a command all of them; see `parts_of` for what they amount to."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return click.option("--data", "source", required=True, **_DATA)(command)


def resumable_training_options(command: Callable) -> Callable:
    """The same, for a command that may know the training images from a run."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return click.option("--data", "source", **_DATA)(command)


def parts_of(resolution: int, *, skips: str | None, **options: Any) -> TrainingParts:
    """The parts of a training run on images of that size that the options, by name, ask for."""
    from diffmem.training import training_parts

    names = None if skips is None else [name for name in skips.split(",") if name not in ("", "none")]
    return training_parts(resolution, skips=names, **options)


def describe_preset(name: str, resolution: int) -> str:
    """One line: which preset was chosen, and how to choose another."""
    from diffmem.training import training_preset

    other = "" if name == "protocol" else "; --preset protocol is the paper's"
    return f"preset {name} for {resolution}x{resolution}: {training_preset(name).description}{other}"
