"""The loss gap: of denoisers whose errors are known, of sets without memorization, and what warns first."""

import json

import numpy as np
import pytest
import torch

from diffmem.cli import main
from diffmem.data import DatasetSpec, ImageSet, load_images
from diffmem.errors import InputError
from diffmem.evaluation import LossGap, LossGapMeter, first_warning, first_warnings, trajectory
from diffmem.evaluation.loss_gap import LevelGap
from diffmem.models import as_denoiser, load
from diffmem.sampling import SamplerConfig
from diffmem.training import TrainingConfig, denoiser_config, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    return load_images("builtin:digits")


def knows(training: ImageSet, up_to: float):
    """A denoiser that knows its training images by heart at noise levels up to `up_to`, and keeps the rest of the noise
    as it is."""
    known = torch.from_numpy(training.images).float().flatten(1) / 127.5 - 1

    def denoise(x, sigma):
        rows = torch.cdist(x.flatten(1), known)
        near = (rows.min(dim=1).values / x[0].numel() ** 0.5 < 1.5 * sigma.flatten()) & (sigma.flatten() <= up_to)
        return torch.where(near[:, None, None, None], known[rows.argmin(dim=1)].view_as(x), x)

    return as_denoiser(denoise, channels=1, resolution=8)


def test_what_is_known_by_heart_shows_where_it_is_known(digits):
    training, unseen = digits.select(slice(0, 12)), digits.select(slice(500, 600))
    meter = LossGapMeter(training, unseen, levels=(0.05, 0.1, 0.2, 1.0))
    gap = meter.measure(knows(training, up_to=0.1))
    assert [level.sigma for level in gap.levels] == [0.05, 0.1, 0.2, 1.0]
    assert [level.relative > 0.99 for level in gap.levels] == [True, True, False, False]
    assert all(level.p < 1e-6 for level in gap.levels[:2])
    for level in gap.levels[2:]:
        assert level.unseen == pytest.approx(level.sigma**2, rel=0.1)  # the noise itself
        assert level.training == pytest.approx(level.unseen, rel=0.1)
        assert level.p > 0.001
    assert LossGap.from_json(gap.to_json()) == gap
    assert meter.measure(knows(training, up_to=0.1)) == gap  # the same noise again


def test_errors_are_those_of_a_plain_loop(digits):
    """Mean squared errors by hand: the same noise for both sets, every image as often."""
    training, unseen = digits.select(slice(0, 3)), digits.select(slice(3, 8))
    meter = LossGapMeter(training, unseen, levels=(0.5,), images=4)
    shrink = as_denoiser(lambda x, sigma: x / (1 + sigma**2), channels=1, resolution=8)
    (level,) = meter.measure(shrink).levels
    for images, found in ((training.images, level.training), (unseen.images[[0, 1, 2, 4]], level.unseen)):
        draws = -(-8 // len(images))
        errors = []
        for number in range(draws * len(images)):
            y = torch.from_numpy(images[number % len(images)]).double() / 127.5 - 1
            x = y + 0.5 * meter._noise[number].double()
            errors.append((x / 1.25 - y).square().mean().item())
        assert found == pytest.approx(np.mean(errors), rel=1e-5)


def test_sets_alike_warn_as_rarely_as_is_said(digits):
    """Small training sets of easy images included: 5 % over all looks and levels."""
    chance = np.random.default_rng(0)
    blank = as_denoiser(lambda x, sigma: x * 0 - 1, channels=1, resolution=8)  # an image's error: how bright it is
    single = runs = 0
    for _ in range(150):
        rows = chance.permutation(len(digits.images))
        sets = [digits.select(np.sort(each)) for each in (rows[:10], rows[10:138])]
        gap = LossGapMeter(*sets, levels=(1.0,)).measure(blank)
        single += gap.levels[0].p < 0.05
        runs += first_warning([gap], looks=5) is not None
    assert 1 <= single <= 16  # 7.5 expected, at most 16 but for 3 in 1,000
    assert runs <= 6


def test_who_warns_first():
    def gap(*p):
        return LossGap(tuple(LevelGap(sigma, 1.0, 2.0, 0.1, each) for sigma, each in zip((0.1, 1.0), p, strict=True)))

    gaps = [gap(0.5, 0.02), gap(0.3, 0.004), gap(0.009, 1e-6), gap(1e-9, 1e-9)]
    assert first_warning(gaps, looks=4) == (1, 1.0)  # 2 levels times 0.004 are below 0.05 / 4
    assert first_warning(gaps, looks=10) == (2, 1.0)
    assert first_warning(gaps[:1], looks=4) is None
    assert first_warnings(gaps, looks=4) == {0.1: 2, 1.0: 1}
    assert first_warnings(gaps[:2], looks=50) == {0.1: None, 1.0: None}


def test_trajectories_with_loss_gaps(digits, tmp_path, capsys):
    """Of a run on ten of the digits: against the rest of its source, and against a holdout."""
    network = denoiser_config(8, 1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    config = TrainingConfig(network, images=64, batch=16, warmup_epochs=0)
    spec = DatasetSpec("builtin:digits", size=10)
    train(config, spec, tmp_path / "run", snapshot_images=32, compile=False)
    options = {"seeds": range(2), "sampler": SamplerConfig(steps=2)}
    found = trajectory(tmp_path / "run", loss_gap=True, **options)
    assert found.gap_warning is None  # it has learned nothing yet
    point = found.points[-1]
    denoiser = load(tmp_path / "run" / "snapshots" / "000000064")
    assert point.gap == LossGapMeter(spec.load(), digits).measure(denoiser)
    with pytest.raises(InputError, match="holdout"):
        trajectory(tmp_path / "run", holdout=digits, **options)
    with pytest.raises(SystemExit) as end:
        main(["trajectory", str(tmp_path / "run"), "--seeds", "0-1", "--holdout", "builtin:digits"])
    assert end.value.code == 0
    assert "loss gap: none is shown" in capsys.readouterr().out
    table = (tmp_path / "run" / "trajectory" / "trajectory.csv").read_text().splitlines()
    assert table[0].endswith("answer,relative_loss_gap,loss_gap_p")
    assert len(table) == 3
    values = json.loads((tmp_path / "run" / "trajectory" / "trajectory.json").read_text())
    assert values["loss_gap"] == {"warning": None, "unseen": 128}
    assert len(values["snapshots"][0]["loss_gap"]) == 8
    whole = tmp_path / "whole"
    train(config, DatasetSpec("builtin:digits"), whole, compile=False)
    with pytest.raises(InputError, match="was trained on all images of its source: pass unseen ones as holdout"):
        trajectory(whole, loss_gap=True, **options)


def test_sets_that_do_not_fit_are_refused(digits):
    few = digits.select(slice(0, 5))
    meter = LossGapMeter(few, digits.select(slice(3, 9)))
    assert meter.left_out == 2
    with pytest.raises(InputError, match=r"1 images.*4 are training images"):
        LossGapMeter(few, digits.select(slice(1, 6)))
    with pytest.raises(InputError, match="noise level"):
        LossGapMeter(few, digits, levels=(0.0,))
    with pytest.raises(InputError, match="unseen images are"):
        LossGapMeter(few, load_images("builtin:patches?n=10"))
    with pytest.raises(InputError, match="not finite"):
        meter.measure(as_denoiser(lambda x, sigma: x * torch.nan, channels=1, resolution=8))
