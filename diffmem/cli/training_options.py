"""The options that say what is trained and how, shared by the commands that train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import click

from diffmem.cli.audit import Source


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

_OPTIONS = [
    click.option("--data", "source", type=Source(), required=True, help="The training images; see `diffmem audit`."),
    # The training set.
    click.option("--resize", type=POSITIVE, metavar="R", help="Bring all images to R x R, antialiased."),
    click.option("--color", type=click.Choice(["grey", "rgb"]), help="Convert all images to grey or to RGB."),
    click.option("--cond", is_flag=True, help="Train a class-conditional model on the labels of the data."),
    click.option("--xflip", is_flag=True, help="Mirrored images count as images too."),
    click.option(
        "--window",
        type=SHARE,
        default=0.0,
        show_default=True,
        help="Share of the set over which the order keeps mixing; 0: the same order every epoch.",
    ),
    click.option(
        "--augment", type=SHARE, default=0.0, show_default=True, help="Probability of EDM's non-leaking augmentations."
    ),
    # The network.
    click.option("--preset", help="A network and preconditioning by name; the options below change parts of it."),
    click.option("--arch", type=click.Choice(["ddpmpp", "ncsnpp", "adm"]), default="ddpmpp", show_default=True),
    click.option(
        "--precond", type=click.Choice(["vp", "ve", "edm"]), help="[default: vp, ve, edm of the architectures]"
    ),
    click.option("--num-channels", "--cbase", "model_channels", type=POSITIVE, help="Width: channels at multiplier 1."),
    click.option("--channel-mult", "--cres", type=Numbers(), help="Width multipliers per resolution."),
    click.option("--num-blocks", type=POSITIVE, help="Depth: residual blocks per resolution."),
    click.option("--embedding", type=click.Choice(["positional", "fourier"]), help="Of the noise level."),
    click.option("--attn-resolutions", type=Numbers(), help="Resolutions with self-attention."),
    click.option(
        "--skips",
        metavar="LIST",
        help='Enabled skip connections: resolutions or single ones, as in "32,16.0", or "none".',
    ),
    click.option("--dropout", type=SHARE),
    # Training.
    click.option("--images", type=POSITIVE, help="Length of training in images seen."),
    click.option("--epochs", type=NUMBER, help="Length of training in epochs."),
    click.option("--duration", type=NUMBER, help="Length of training in the paper's unit, 20 epochs."),
    click.option("--batch", type=POSITIVE, default=512, show_default=True, help="Images per step, over all processes."),
    click.option("--optimizer", type=click.Choice(["adam", "adamw", "sgd"]), default="adam", show_default=True),
    click.option("--lr", type=NUMBER, default=2e-4, show_default=True, help="Learning rate."),
    click.option("--warmup-epochs", type=NUMBER, default=200.0, show_default=True, help="Of a linear warm-up."),
    click.option("--weight-decay", type=NUMBER, default=0.0, show_default=True),
    click.option("--momentum", type=NUMBER, default=0.0, show_default=True, help="Of sgd."),
    click.option(
        "--ema-rule",
        type=click.Choice(["by-size", "compensated", "constant", "target"]),
        help="How the averaged weights follow. [default: compensated, or target with --ema-target]",
    ),
    click.option("--ema-target", type=SHARE, help="The decay at which the rule target ends."),
    click.option(
        "--ema-halflife",
        type=POSITIVE,
        default=500_000,
        show_default=True,
        help="Half-life of the averaged weights in images.",
    ),
    click.option(
        "--ema-protocol",
        type=click.Choice(["paper", "published"]),
        default="paper",
        show_default=True,
        help="Half-life by training-set size as in the paper, or floored to whole thousands of images as in its "
        "published code: none at all below 100 training images.",
    ),
    click.option("--tikhonov", type=NUMBER, default=0.0, show_default=True, help="Regularization of the score."),
]


def training_options(command: Callable) -> Callable:
    """Gives a command all of them; see `training_parts` for what they amount to."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class TrainingParts(NamedTuple):
    """What the options amount to: arguments of `diffmem.training.denoiser_config` (but those that follow from the
    images), fields of `TrainingConfig` (`ema` as those of `EMA`), and of `images_of`."""

    network: dict[str, Any]
    training: dict[str, Any]
    length: dict[str, float]


def training_parts(
    *, window, augment, xflip, preset, arch, precond, skips, images, epochs, duration, batch, optimizer, lr,
    warmup_epochs, weight_decay, momentum, ema_rule, ema_target, ema_halflife, ema_protocol, tikhonov,
    **network,
) -> TrainingParts:  # fmt: skip
    """The parts of a training run that options, by name, ask for."""
    chosen = {"arch": arch, "precond": precond, "preset_name": preset, **network}
    if skips is not None:
        chosen["skips"] = [name for name in skips.split(",") if name not in ("", "none")]
    rule = ema_rule or ("compensated" if ema_target is None else "target")
    training = {
        "batch": batch,
        "optimizer": optimizer,
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "warmup_epochs": warmup_epochs,
        "ema": {"rule": rule, "halflife_images": ema_halflife, "target": ema_target},
        "window": window,
        "xflip": xflip,
        "augment": augment,
        "tikhonov": tikhonov,
    }
    if ema_protocol != "paper":  # the keys of runs made before there was a choice stay
        training["ema"]["protocol"] = ema_protocol
    length = {"images": images, "epochs": epochs, "duration": duration}
    return TrainingParts(
        {name: value for name, value in chosen.items() if value is not None},
        training,
        {name: value for name, value in length.items() if value is not None},
    )
