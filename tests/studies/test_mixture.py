"""Mixtures trained on mixtures: the posterior mean, the closed-form losses, what training finds, and trials of them."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from studies.tiny import TINY

from diffmem.data import DatasetSpec
from diffmem.errors import InputError
from diffmem.studies import Setting, Trial, run_trial
from diffmem.studies.mixture import (
    LEVELS,
    Mixture,
    copies,
    data,
    generalizing_loss,
    memorizing_loss,
    posterior_mean,
    sample,
    train_mixture,
)

MIXTURE = Setting(DatasetSpec("none"), {"images": 30_000}, snapshots=1, samples=200, mixture={"share": 1.0})


def test_the_posterior_mean_is_bayes_rule():
    random = np.random.default_rng(0)
    centers, y, std, sigma = random.standard_normal((3, 2)), random.standard_normal(2), 0.4, 0.7
    density = [math.exp(-((y - each) ** 2).sum() / (2 * (std**2 + sigma**2))) for each in centers]
    means = [(sigma**2 * each + std**2 * y) / (std**2 + sigma**2) for each in centers]
    expected = sum(weight * mean for weight, mean in zip(density, means, strict=True)) / sum(density)
    found = posterior_mean(
        torch.from_numpy(y)[None], torch.tensor([[sigma]]), torch.from_numpy(centers), torch.tensor(std)
    )
    assert np.allclose(found[0], expected)


def _loss(samples, centers, std, random, draws=4):
    """The training loss by simulation."""
    losses = []
    for sigma in LEVELS:
        clean = samples.repeat(draws, 1)
        noisy = clean + sigma * torch.randn(clean.shape, generator=random)
        found = posterior_mean(noisy, sigma, centers, torch.tensor(std))
        losses.append(float(((found - clean) / sigma).square().sum(1).mean()))
    return np.array(losses)


def test_closed_forms_are_what_simulation_finds_where_the_posterior_is_sure():
    mixture, random = Mixture(0.5, dimension=300), torch.Generator().manual_seed(0)
    centers, samples = data(mixture, 100, 0)
    found = _loss(samples, centers, 1.0, random)
    assert abs(found.mean() / generalizing_loss(300) - 1) < 0.03
    # One s of the partially memorizing denoiser, at levels below the distance between samples.
    memorized, std = torch.arange(50), 0.4
    low = [place for place, level in enumerate(LEVELS) if level < 0.7]
    distances = torch.cdist(samples, samples[memorized]).min(1).values.square().mean()
    noise = LEVELS.numpy() ** 2
    closed = (300 * std**4 + float(distances) * noise) / (std**2 + noise) ** 2
    assert np.allclose(_loss(samples, samples[memorized], std, random)[low], closed[low], rtol=0.05)
    # The best s is no worse than that one, and with all samples memorized nothing is left.
    assert memorizing_loss(samples, memorized) <= closed.mean()
    assert memorizing_loss(samples, torch.arange(100)) < 1e-2 * generalizing_loss(300)


def test_data_are_nested_and_repetitions_differ():
    mixture = Mixture(0.5)
    centers, samples = data(mixture, 50, 1)
    assert torch.equal(data(mixture, 20, 1)[1], samples[:20])
    assert not torch.equal(data(mixture, 50, 2)[1], samples)
    assert torch.allclose(centers.norm(dim=1), torch.tensor(math.sqrt(30)))
    nearest = torch.cdist(samples, centers).min(1).values.square().mean()
    assert abs(float(nearest) - 30) < 4  # variance 1


def test_samples_of_untouched_mixtures_are_copies_or_new():
    samples = data(Mixture(1.0), 60, 0)[1]
    random = torch.Generator().manual_seed(0)
    assert copies(sample(samples, torch.tensor(0.01), 100, random), samples).all()
    assert not copies(sample(samples, torch.tensor(1.0), 100, random), samples).any()
    assert copies(torch.tensor([[0.0], [1.0], [1.3]]), torch.tensor([[0.0], [4.0]])).tolist() == [True, False, False]


def test_training_copies_with_as_many_centers_as_samples_and_generalizes_with_few():
    many = train_mixture(Mixture(1.0), 40, 0, 60_000, 200)
    few = train_mixture(Mixture(0.2), 40, 0, 60_000, 200)
    assert (many.count / many.total, few.count / few.total) == (pytest.approx(1, abs=0.1), pytest.approx(0, abs=0.1))
    assert few.result.std > 0.5 > many.result.std
    assert few.result.loss < few.result.memorizing  # training leaves where it starts
    again = train_mixture(Mixture(0.2), 40, 0, 60_000, 200)
    assert (again.count, again.result) == (few.count, few.result)


def test_a_trial_of_a_mixture_is_a_trial(tmp_path):
    trial = Trial(MIXTURE, 30, 1)
    assert Setting.from_json(MIXTURE.to_json()) == MIXTURE
    result = run_trial(trial, tmp_path / "run")
    assert run_trial(trial, tmp_path / "run") == result  # read
    assert (result.count / result.total, result.parameters) == (pytest.approx(1, abs=0.2), 30 * 30 + 1)
    assert (result.images, result.epochs, result.mixture.components) == (30_000, 1000, 30)
    with pytest.raises(InputError, match="run the study crossover instead"):
        run_trial(dataclasses.replace(trial, at_least=0.9), tmp_path / "test")


def test_other_trials_keep_their_keys():
    assert Setting.from_json({k: v for k, v in TINY.to_json().items() if k != "mixture"}) == TINY
    assert Trial(TINY, 20).key == "9caf4aad958820f1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mixture": {"share": 1.5}}, "share must be above 0 and at most 1"),
        ({"mixture": {"parts": 5}}, "its fields are share, dimension, clusters, lr, not parts"),
        ({"level_off": 1.0, "snapshots": 4}, "goes with neither level_off"),
        ({"criterion": "authenticity"}, "a criterion other than ratio"),
    ],
)
def test_mistakes_are_named(change, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(MIXTURE, **change)
