"""Presets: which one images of a size get, and what its parts amount to."""

import click
import pytest

from diffmem.cli.training_options import training_options, training_parts
from diffmem.errors import InputError
from diffmem.models import PRESETS, Denoiser
from diffmem.training import EMA, TrainingConfig, denoiser_config, fitting_preset, training_preset


def parts(resolution: int, **asked):
    """What the options amount to where `asked` are given, and no others."""

    @click.command()
    @training_options
    def command(**options):
        pass

    defaults = dict(command.make_context("train", ["--data", "builtin:digits"]).params)
    for name in ("source", "resize", "color", "cond"):
        defaults.pop(name)
    return training_parts(resolution, **{**defaults, **asked})


def config(found, resolution: int, channels: int) -> TrainingConfig:
    training = {**found.training, "ema": EMA(**found.training["ema"])}
    return TrainingConfig(denoiser_config(resolution, channels, **found.network), images=1000, **training)


@pytest.mark.parametrize(("resolution", "most"), [(8, 100_000), (16, 1_000_000)])
def test_small_images_get_a_network_that_a_cpu_trains(resolution, most):
    found = parts(resolution)
    made = config(found, resolution, 3)
    assert found.preset == fitting_preset(resolution) != "protocol"
    assert sum(parameter.numel() for parameter in Denoiser(made.denoiser).parameters()) < most
    assert made.batch == 64


def test_the_protocol_is_one_option_away_and_stays_the_default_of_its_own_images():
    asked, default = parts(8, preset="protocol"), parts(32)
    assert default.preset == "protocol"
    assert asked.training == default.training
    made = config(default, 32, 3)
    assert (made.batch, made.lr, made.warmup_epochs, made.ema) == (512, 2e-4, 200.0, EMA())
    assert made.denoiser == PRESETS["ddpmpp_cifar10"]
    assert parts(8, arch="ncsnpp").preset == "protocol"


def test_options_change_parts_of_a_preset():
    found = parts(8, batch=32, lr=1e-4, model_channels=8, ema_halflife=1000)
    made = config(found, 8, 1)
    assert (made.batch, made.lr, made.warmup_epochs) == (32, 1e-4, 20.0)
    assert made.ema == EMA("compensated", halflife_images=1000)
    assert made.denoiser.network.model_channels == 8
    assert made.denoiser.network.num_blocks == 1


def test_unknown_preset_names_all():
    with pytest.raises(InputError, match=r"no preset 'big'; choose from protocol, small_8, small_16, ddpmpp_cifar10"):
        training_preset("big")
