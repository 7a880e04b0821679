"""Losses: the golden values, the draws behind them, Tikhonov's optimum."""

from pathlib import Path

import pytest
import torch
from numerics import assert_close
from safetensors.torch import load_file

from diffmem.errors import InputError
from diffmem.models import EDM, IDDPM, VE, VP
from diffmem.training import denoising_loss
from diffmem.training.losses import Draws, noise_level

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "losses.safetensors")


def shrink(x, sigma, labels=None, augment_labels=None):
    return x / (1 + sigma**2)


@pytest.mark.parametrize(("name", "preconditioning"), [("vp", VP()), ("ve", VE()), ("edm", EDM())])
def test_golden(name, preconditioning):
    generator = torch.Generator().manual_seed(11)
    loss = denoising_loss(shrink, GOLDEN["images"], preconditioning, generator=generator)
    assert_close("losses of the protocol", loss, GOLDEN[name])


def test_noise_stays_in_the_range_of_the_network():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for preconditioning in (VP(), VE()):
        levels = sorted(noise_level(preconditioning, ends).tolist())
        assert levels == pytest.approx([preconditioning.sigma_min, preconditioning.sigma_max], rel=1e-9)
    with pytest.raises(InputError, match="sampling only"):
        noise_level(IDDPM(), ends)


def test_tikhonov_has_the_optimum_of_the_paper():
    """For λ = 1/σ² and one training image y the minimizer over D is the score (y − x)/(σ² + c)."""
    y, noise = torch.tensor(0.7).double(), torch.tensor(1.3).double()
    level = torch.tensor(0.4).double()
    sigma, c = noise_level(VP(), level), 0.05
    score = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def denoiser(x, sigma, labels, augment_labels):
        return x + sigma**2 * score

    def gradient(value):
        with torch.no_grad():
            score.fill_(value)
        loss = denoising_loss(denoiser, y, VP(), draws=Draws(level, noise), tikhonov=c)
        return torch.autograd.grad(loss, score)[0].item()

    best = (-sigma * noise / (sigma**2 + c)).item()
    assert gradient(best) == pytest.approx(0, abs=1e-9)
    assert gradient(best - 0.1) < 0 < gradient(best + 0.1)
