"""compare: gaps that are known beforehand, the range in which a model has memorized, what is refused."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from edm_snapshots import network, pretended_edm_modules, snapshot
from golden_networks import golden, state_dict

import diffmem
from diffmem.data import ImageSet
from diffmem.errors import InputError
from diffmem.models import Denoiser, save
from diffmem.optimum import OptimalDenoiser
from diffmem.sampling import SamplerConfig
from diffmem.studies.comparison import compare
from diffmem.studies.comparison.gaps import _range
from diffmem.training import TrainingConfig, denoiser_config, train

N = 60
FEW = {"images": 20, "levels": [0.1, 0.5, 2.0], "sampler": SamplerConfig(steps=4, compile="off"), "device": "cpu"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    return diffmem.load_images("builtin:digits")


@pytest.fixture(scope="module")
def training(digits):
    return digits.select(slice(N))


class Changed(OptimalDenoiser):
    """An optimum whose answer is changed by `change(x, D)`."""

    def __init__(self, training, change, labels=False):
        super().__init__(training, labels=labels)
        self.change = change

    def forward(self, x, sigma, labels=None):
        return self.change(x, super().forward(x, sigma, labels))


def test_the_optimum_is_the_optimum(training, digits):
    result = compare(OptimalDenoiser(training, labels=False), training, holdout=digits, **FEW)
    assert all((result.gap(kind).value < 1e-12).all() for kind in ("training", "unseen", "generated"))
    assert result.reference("training").value.min() > 1e-4  # another sample's optimum is not this one
    np.testing.assert_allclose(result.memorization_score.value, result.optimal_score.value)
    assert result.memorization_score.value[0] > 0.999
    assert result.memorized_range.low is None
    assert 0.1 < result.sigma_star == result.highest_possible < 2
    assert result.memorized_range.high_interval[0] <= result.sigma_star <= result.memorized_range.high_interval[1]
    assert result.copies == len(result.gaps["generated"].gap) == 20
    # Training images among the holdout are no unseen images.
    assert "60 of 1,797 images of builtin:digits are training images" in result.notes[0]


def test_a_known_offset_is_the_gap_and_the_batch_does_not_matter(training, digits):
    results = [
        compare(
            Changed(training, lambda x, optimal: optimal + 0.1), training, holdout=digits,
            **{**FEW, "sampler": SamplerConfig(steps=4, batch=batch)},
        )
        for batch in (64, 7)
    ]  # fmt: skip
    for kind in results[0].gaps:
        np.testing.assert_allclose(results[0].gaps[kind].gap, 0.01, rtol=1e-4)
        for name in ("gap", "model_error", "optimum_error"):
            first, second = (getattr(result.gaps[kind], name) for result in results)
            np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-9)


def test_a_denoiser_that_knows_no_training_set(training, digits):
    """D(x) = x: its error is the noise's, the same at all levels and for all images, and it has memorized nothing."""
    result = compare(Changed(training, lambda x, optimal: x), training, holdout=digits, **{**FEW, "images": 150})
    for gaps in result.gaps.values():
        noise = gaps.model_error / result.levels**2
        np.testing.assert_allclose(noise, noise[:, :1] @ np.ones((1, 3)), rtol=1e-6)  # one noise for all levels
        assert noise.mean() == pytest.approx(1, abs=0.1)
    assert (np.abs(result.memorization_score.value) < 0.1).all()
    assert ((result.memorization_score.low < 0) & (result.memorization_score.high > 0)).any()
    assert result.memorized_range is None
    assert "At no noise level" in result.verdict()
    # All training images were asked about, each as often, with noise of its own each time.
    assert len(np.unique(result.gaps["training"].model_error[:, 0])) == len(result.gaps["training"].gap) == 2 * N
    # E = E_opt + gap on training images, where all of them are asked: D_opt is a conditional mean.
    gaps = result.gaps["training"]
    assert (gaps.optimum_error + gaps.gap - gaps.model_error).mean(axis=0) == pytest.approx(np.zeros(3), abs=0.05)


def test_classes_reach_both_denoisers(training):
    same = compare(Changed(training, lambda x, optimal: optimal, labels=None), training, **FEW)
    assert (same.gap("training").value < 1e-12).all()
    assert same.settings["conditional"]
    assert same.memorization_score is None
    assert "without unseen images" in same.verdict()
    # A network that does not heed the class has another optimum.
    blind = compare(_Blind(training), training, **FEW)
    assert blind.gap("training").value.max() > 1e-3


class _Blind(OptimalDenoiser):
    def forward(self, x, sigma, labels=None):
        return super().forward(x, sigma, None)


def test_where_the_score_is_at_least_eight_ninths():
    levels, least = np.array([1.0, math.e, math.e**2, math.e**3]), 8 / 9
    assert _range(levels, np.array([0.1, 0.2, 0.8, 0.88])) is None
    low, high = _range(levels, np.array([least - 0.1, least + 0.1, 0.99, 0.2]))
    assert low == pytest.approx(math.exp(0.5))
    assert high == pytest.approx(math.exp(2 + (0.99 - least) / 0.79))
    assert _range(levels, np.array([0.95, 0.9, least, 0.0])) == (None, pytest.approx(math.e**2))
    ends = _range(levels, np.array([0.97, least - 0.1, 0.96, 0.95]))
    assert ends == (None, pytest.approx(math.exp((0.97 - least) / (0.97 - least + 0.1))))  # around the highest
    assert _range(levels, np.full(4, 0.9)) == (None, None)


def test_runs_know_their_training_set(training, digits, tmp_path):
    small = denoiser_config(8, 1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    config = TrainingConfig(small, images=16, batch=8, warmup_epochs=0, xflip=True)
    train(config, training, tmp_path / "run", snapshot_images=8, device="cpu", compile=False)
    result = compare(tmp_path / "run", training, **FEW)
    assert result.checkpoint.endswith("snapshots/000000016")
    assert len(result.training) == 2 * N  # mirrored images count
    assert np.isfinite(result.gap("generated").value).all()
    for other in (digits.select(slice(N + 1)), digits.select(slice(1, N + 1))):
        with pytest.raises(InputError, match="was trained on"):
            compare(tmp_path / "run" / "snapshots" / "000000008", other, **FEW)


def test_edm_snapshots(tmp_path, monkeypatch):
    """A class-conditional VE network as EDM stores it: its own range of noise levels, and nobody knows its data."""
    config, tensors = golden("ncsnpp-ve-cond")
    edm = pretended_edm_modules(monkeypatch, tmp_path / "executed")
    path = tmp_path / "network-snapshot-000123.pkl"
    stored = network(edm, config["precond"], config["kwargs"], state_dict(tensors))
    path.write_bytes(pickle.dumps(snapshot(edm, stored)))
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 16, 16), dtype=np.uint8)
    result = compare(path, ImageSet(images, labels=np.arange(20) % 10), **{**FEW, "images": 3, "levels": 4})
    assert result.levels[[0, -1]] == pytest.approx([0.02, 80])
    assert result.settings["conditional"]
    assert "is not checked" in result.notes[0]
    # In its class an image has one companion: half of the way to that is a sixth; the whole set lies at a third.
    assert (result.error("training", "optimum").value < 0.2).all()


def test_refusals(training, digits, tmp_path):
    small = denoiser_config(8, 1, label_dim=10, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    checkpoint = save(Denoiser(small), tmp_path / "model")
    unlabeled = digits.select(slice(N, None)).images
    large = np.zeros((9, 1, 16, 16), np.uint8)
    for set_, options, words in (
        (large, {}, "training images are 1x16x16, but the network takes 1x8x8"),
        (training.images.astype(np.float32), {}, "must be uint8"),
        (unlabeled, {}, "training images need class indices"),
        (digits.select(np.flatnonzero(digits.labels != 4)), {}, "no training image of class 4"),
        (training, {"holdout": unlabeled}, "unseen images need class indices"),
        (training, {"holdout": training}, "0 images that are not training images"),
        (training, {"levels": [1000.0, 0.0]}, "positive noise levels"),
        (training, {"images": 1}, "images is 1"),
    ):
        with pytest.raises(InputError, match=words):
            compare(checkpoint, set_, **{**FEW, **options})
    with pytest.raises(InputError, match="outside the network's range"):
        compare(
            save(Denoiser(denoiser_config(8, 1, arch="ddpmpp", precond="vp", model_channels=8, channel_mult=(1,),
                                          num_blocks=1, attn_resolutions=())), tmp_path / "vp"),
            training, **{**FEW, "levels": [1.0, 1000.0]},
        )  # fmt: skip
    with torch.no_grad():
        broken = Denoiser(small)
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match="not finite"):
        compare(broken, training, **FEW)
