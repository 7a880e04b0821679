"""Presets: which one images of a size get, and what its parts amount to."""

import re

import click
import numpy as np
import pytest

from diffmem.cli.training_options import parts_of, training_options
from diffmem.data import DatasetSpec, ImageSet, load_images
from diffmem.errors import InputError
from diffmem.models import PRESETS, Denoiser
from diffmem.studies import Setting
from diffmem.training import (
    EMA,
    TrainingConfig,
    denoiser_config,
    fitting_preset,
    training_config,
    training_parts,
    training_preset,
)
from diffmem.training.configure import OPTIONS


def parts(resolution: int, **asked):
    """What the options amount to where `asked` are given, and no others."""

    @click.command()
    @training_options
    def command(**options):
        pass

    defaults = dict(command.make_context("train", ["--data", "builtin:digits"]).params)
    for name in ("source", "resize", "color", "cond"):
        defaults.pop(name)
    return parts_of(resolution, **{**defaults, **asked})


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


def options_of(command) -> dict[str, click.Option]:
    own = {"source", "resize", "color", "cond", "preset"}
    return {option.name: option for option in command.params if option.name not in own}


def test_the_command_line_has_the_options_of_the_library_and_says_its_defaults():
    @click.command()
    @training_options
    def command(**options):
        pass

    options = options_of(command)
    values = command.make_context("train", ["--data", "builtin:digits"]).params
    assert set(options) == set(OPTIONS) - {"precision"}
    said = {name: re.search(r"\[default: ([^\];]*)", option.help or "") for name, option in options.items()}
    kinds = {"training": TrainingConfig, "ema": EMA}
    for name in options:
        assert values[name] in (None, False), name  # nothing that nobody asked for
        part, field = OPTIONS[name]
        default = getattr(kinds.get(part), field, None)
        if default is not None and default is not False:
            word = said[name][1]
            assert word == default or float(word) == default, name


def test_studies_and_the_command_line_make_one_configuration_of_the_same_options():
    digits = load_images("builtin:digits", limit=40)
    found = parts(8, epochs=3.0, batch=10, lr=1e-3, xflip=True, augment=0.5, skips="8", ema_target=0.5)
    made = training_config(
        digits, length=found.length, network=found.network, training=found.training, conditional=True, seed=2
    )
    data = DatasetSpec("builtin:digits", labels="true")
    assert Setting(data, found.length, found.network, found.training).config(digits, 2) == made
    by_hand = TrainingConfig(
        denoiser_config(
            8, 1, label_dim=10, augment_dim=9, skips=["8"], precond="edm", model_channels=16, channel_mult=(1, 1),
            num_blocks=1, dropout=0.0,
        ),
        images=3 * 40 * 2, batch=10, lr=1e-3, warmup_epochs=20.0, xflip=True, augment=0.5, seed=2,
        ema=EMA("target", target=0.5),
    )  # fmt: skip
    assert made == by_hand
    assert training_config(digits, length={"images": 5}, label_dim=3).denoiser.network.label_dim == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"length": {"steps": 3}}, "length of training is one of images, epochs, duration, not steps"),
        ({"length": {"images": 3, "epochs": 3}}, "give exactly one of images=…"),
        ({"training": {"learning_rate": 3}}, "training has no field learning_rate: there are .*batch"),
        ({"training": {"seed": 3}}, "training has no field seed"),
        ({"training": {"ema": {"decay": 3}}}, "^ema: a field is unknown .*decay"),
        ({"network": {"width": 3}}, "no field width"),
        ({"conditional": True}, "conditional=True needs labels, but there are none"),
    ],
)
def test_mistakes_name_the_parameter(arguments, words):
    images = ImageSet(np.zeros((4, 1, 8, 8), np.uint8))
    with pytest.raises(InputError, match=words):
        training_config(images, **{"length": {"images": 8}, **arguments})
    with pytest.raises(InputError, match="there is no option width: there are arch"):
        training_parts(8, width=3)
