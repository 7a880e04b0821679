"""OptimalDenoiser: the formula, classes, regularized variants, and that sampling from it copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numerics import assert_close

import diffmem
from diffmem.errors import InputError
from diffmem.evaluation import generate
from diffmem.optimum import EmpiricalBayes, OptimalDenoiser, Smoothed, Tikhonov, parse_regularization
from diffmem.optimum import denoiser as denoiser_module
from diffmem.sampling import (
    SamplerConfig,
    clip_range,
    sample,
    sample_general,
    sigmas_vp,
    vp_betas,
    vp_sigma,
)


@pytest.fixture(scope="module")
def digits():
    return diffmem.load_images("builtin:digits")


def direct(images: np.ndarray, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The formula as it stands in the papers."""
    y = torch.from_numpy(images).double().flatten(1) / 127.5 - 1
    logits = -(x.double().flatten(1)[:, None] - y).square().sum(dim=2) / (2 * sigma**2)
    return (torch.softmax(logits, dim=1) @ y).reshape(x.shape)


@pytest.mark.parametrize("sigma", [80.0, 3.0, 0.3, 0.01, 0.002])
def test_is_the_posterior_mean(digits, sigma):
    denoiser = OptimalDenoiser(digits, labels=False)
    x = torch.from_numpy(digits.images[:5]).double() / 127.5 - 1
    x = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = direct(digits.images, x, sigma)
    assert_close("the optimal denoiser", denoiser(x, sigma), expected)
    assert_close("the optimal denoiser", sigma**2 * denoiser.score(x, sigma), expected - x)
    assert denoiser(x.float(), torch.tensor(sigma)).dtype == torch.float32
    weights = denoiser.weights(x, sigma, left_out=0.01)
    for query in range(5):
        assert 0.99 <= float(weights.weights[query].sum()) <= 1
        assert 1 - float(weights.weights[query].sum()) <= float(weights.left_out[query]) <= 0.0101
    if sigma <= 0.01:
        assert [indices.tolist() for indices in weights.indices] == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("copied", [True, False])
def test_classes(digits, copied, monkeypatch):
    if not copied:  # as sets are that memory would not hold twice
        monkeypatch.setattr(denoiser_module, "COPIED_BYTES", 0)
    denoiser = OptimalDenoiser(digits)
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([3, 0, 3, 9, 0, 7])
    result = denoiser(x, 0.7, labels)
    for query, label in enumerate(labels.tolist()):
        own = digits.images[digits.labels == label]
        assert_close("the optimal denoiser, few images", result[[query]], direct(own, x[[query]], 0.7))
    torch.testing.assert_close(denoiser(x, 0.7, torch.eye(10)[labels]), result)
    assert_close("the optimal denoiser, few images", denoiser(x, 0.7), direct(digits.images, x, 0.7))
    index = denoiser.weights(x, 0.2, labels).indices
    assert all(int(digits.labels[index[query][0]]) == label for query, label in enumerate(labels.tolist()))


@pytest.mark.parametrize("solver", ["heun", "unipc", "dpm++"])
def test_sampling_copies_whatever_the_batch(digits, solver):
    denoiser = OptimalDenoiser(digits)
    images = sample(denoiser, range(24), solver=solver, batch=24).images
    assert torch.equal(sample(denoiser, range(24), solver=solver, batch=7).images, images)
    assert diffmem.audit(images.numpy(), digits).ratio == 1


def test_the_general_sampler_copies_too(digits):
    latents = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoiser = OptimalDenoiser(digits, labels=False)
    betas = vp_betas(*clip_range(denoiser, vp_sigma(1e-3), vp_sigma(1.0)))
    sigmas = sigmas_vp(100, *betas)
    images = sample_general(denoiser, latents * sigmas[0], sigmas, schedule="vp", scaling="vp", betas=betas)
    pixels = ((images + 1) * 127.5).round().clip(0, 255).to(torch.uint8)
    assert diffmem.audit(pixels.numpy(), digits).ratio == 1


def test_an_interrupted_run_goes_on(digits, tmp_path, monkeypatch):
    sampler = SamplerConfig(batch=4, compile="off")
    generate(OptimalDenoiser(digits), range(12), out=tmp_path / "whole.npz", sampler=sampler)
    calls = []

    class Interrupted(OptimalDenoiser):
        def forward(self, *arguments):
            calls.append(len(arguments[0]))
            if len(calls) == 50:  # in the second batch
                raise KeyboardInterrupt
            return super().forward(*arguments)

    with pytest.raises(KeyboardInterrupt):
        generate(Interrupted(digits), range(12), out=tmp_path / "parts.npz", sampler=sampler)
    done = len(calls)
    generate(Interrupted(digits), range(12), out=tmp_path / "parts.npz", sampler=sampler)
    assert len(calls) - done == 2 * 35  # the first batch is not made again
    assert (tmp_path / "parts.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_regularized_formulas(digits):
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma, c, h, log_tau = 0.5, 0.2, 0.3, -100.0
    y = torch.from_numpy(digits.images).double().flatten(1) / 127.5 - 1
    p = (-(x.flatten(1)[:, None] - y).square().sum(dim=2) / (2 * sigma**2)).exp()
    difference = ((p @ y) - p.sum(dim=1)[:, None] * x.flatten(1)) / sigma**2
    scores = {
        Tikhonov(c): (direct(digits.images, x, sigma) - x) / (sigma**2 + c),
        Smoothed(h): (direct(digits.images, x, (sigma**2 + h**2) ** 0.5) - x) / (sigma**2 + h**2),
        EmpiricalBayes(log_tau): (difference / p.sum(dim=1).clamp(min=np.exp(log_tau))[:, None]).reshape(x.shape),
    }
    for variant, expected in scores.items():
        denoiser = OptimalDenoiser(digits, labels=False, regularization=variant)
        assert_close("the score", denoiser.score(x, sigma), expected)
    exact = OptimalDenoiser(digits, labels=False)
    assert exact.fingerprint != denoiser.fingerprint
    assert (
        diffmem.audit(
            sample(OptimalDenoiser(digits, regularization=Tikhonov(1.0)), range(16)).images.numpy(), digits
        ).ratio
        == 0
    )


def test_parsing():
    assert parse_regularization("tikhonov:0.5") == Tikhonov(0.5)
    assert parse_regularization("smooth:1e-2") == Smoothed(0.01)
    assert parse_regularization("bayes:exp(-1500)") == EmpiricalBayes(-1500)
    assert parse_regularization("bayes:1").log_tau == 0
    for text in ("tikhonov", "tikhonov:-1", "bayes:0", "bayes:exp(x)", "smooth:inf", "ridge:1"):
        with pytest.raises(InputError):
            parse_regularization(text)


def test_subsets_depend_on_the_noise_level_only(digits):
    denoiser = OptimalDenoiser(digits, labels=False, subset=20)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = denoiser(x, torch.tensor([0.5, 0.5, 2.0, 0.5]))
    torch.testing.assert_close(denoiser(x[3:], 0.5), together[3:])
    pixels = torch.from_numpy(digits.images[torch.sort(denoiser._subset(0.5, 0, 1797)).values]).numpy()
    assert_close("the optimal denoiser, few images", together[:2], direct(pixels, x[:2], 0.5))
    assert not torch.equal(denoiser._subset(0.5, 0, 1797), denoiser._subset(0.6, 0, 1797))


def test_bad_arguments(digits):
    denoiser = OptimalDenoiser(digits)
    x = torch.zeros(2, 1, 8, 8)
    for arguments in (
        (x[:, :, :4], 1.0), (x, 0.0), (x, torch.ones(3)), (x, 1.0, torch.tensor([1, 10])),
        (x * torch.nan, 1.0), (x, 1.0, torch.full((2, 10), 0.5)),
    ):  # fmt: skip
        with pytest.raises(InputError):
            denoiser(*arguments)
    for options in ({"labels": np.zeros(3, int)}, {"tolerance": 0}, {"subset": 5000}):
        with pytest.raises(InputError):
            OptimalDenoiser(digits, **options)
    with pytest.raises(InputError, match="cannot be compiled"):
        sample(denoiser, [0], compile=True)
