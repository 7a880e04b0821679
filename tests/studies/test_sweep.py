"""sweep: from all copies to none, what is kept and added to, what is expected, how strengths are chosen."""

from __future__ import annotations

import numpy as np
import pytest

import diffmem
from diffmem.errors import InputError
from diffmem.evaluation import evaluator
from diffmem.optimum import EmpiricalBayes, Smoothed, Tikhonov
from diffmem.sampling import SamplerConfig
from diffmem.studies.comparison import parse_sweep, sweep
from diffmem.studies.comparison.sweeps import chosen_variants, expected_ratio

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"labels": False, "sampler": SamplerConfig(steps=8, batch=8), "device": "cpu"}


@pytest.fixture(scope="module")
def digits():
    return diffmem.load_images("builtin:digits").select(slice(200))


@pytest.fixture
def sampled(monkeypatch):
    """The seeds that were sampled, in order."""
    original, seeds = evaluator.sample_batches, []

    def sample_batches(denoiser, asked, **settings):
        for made in original(denoiser, asked, **settings):
            seeds.extend(made.seeds.tolist())
            yield made

    monkeypatch.setattr(evaluator, "sample_batches", sample_batches)
    return seeds


def test_from_copies_to_none_and_on_from_what_is_kept(digits, tmp_path, sampled):
    variants = [Tikhonov(1.0), Tikhonov(0.0)]
    first = sweep(digits, variants, tmp_path, seeds=range(12), **FAST)
    assert [(str(point.variant), point.count, point.total) for point in first.points] == [
        ("tikhonov:0", 12, 12),
        ("tikhonov:1", 0, 12),
    ]
    assert sampled == 2 * list(range(12))
    sampled.clear()
    more = sweep(digits, [*variants, Smoothed(1.0)], tmp_path, seeds=range(4, 20), **FAST)
    assert sampled == [*range(12, 20), *range(12, 20), *range(4, 20)]
    again = sweep(digits, variants, tmp_path / "again", seeds=range(4, 20), **FAST)
    for kept, fresh in zip(more.points, again.points, strict=False):
        np.testing.assert_array_equal(kept.evaluation.seeds, fresh.evaluation.seeds)
        np.testing.assert_array_equal(kept.evaluation.ratios, fresh.evaluation.ratios)
    # Another training set in the same folder is another sweep.
    sampled.clear()
    sweep(digits.select(slice(100)), variants[:1], tmp_path, seeds=range(4), **FAST)
    assert sampled == [0, 1, 2, 3]


def test_damaged_points_are_named(digits, tmp_path):
    sweep(digits, [Tikhonov(0.1)], tmp_path, seeds=range(2), **FAST)
    (path,) = (tmp_path / "points").glob("*/block-*.npz")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"tikhonov_0\.1-.*not a complete.*delete it"):
        sweep(digits, [Tikhonov(0.1)], tmp_path, seeds=range(2), **FAST)


def test_half_and_expectation(digits, tmp_path):
    result = sweep(digits, ["tikhonov"], tmp_path, seeds=range(40), **{**FAST, "sampler": SamplerConfig(batch=40)})
    assert len(result.points) == 9
    assert result.points[0].ratio == 1
    assert result.points[-1].ratio == 0
    # Half of the copies are gone near where the spacing of the images says.
    expected = np.median(result.spacing) ** 2 / (8 * digits.dimension)
    assert expected / 2.5 < result.half("tikhonov") < 2.5 * expected
    assert result.expected(Tikhonov(expected * 1e-3)) == 1 == result.expected(Smoothed(0.0))
    assert result.expected(Tikhonov(expected * 1e3)) == 0
    draws = np.random.default_rng(0).chisquare(64, 20_000) / 2
    assert expected_ratio(EmpiricalBayes(-30.0), result.spacing, 64) == pytest.approx((draws < 30).mean(), abs=0.02)


def test_texts():
    assert parse_sweep("smooth:0.1, 0.2") == [Smoothed(0.1), Smoothed(0.2)]
    assert parse_sweep("bayes:exp(-40),1") == [EmpiricalBayes(-40), EmpiricalBayes(0)]
    assert parse_sweep("bayes") == ["bayes"]
    for text in ("ridge", "tikhonov:", "tikhonov:1,,2", "smooth:-1"):
        with pytest.raises(InputError):
            parse_sweep(text)
    with pytest.raises(InputError, match="duplicates"):
        chosen_variants("smooth", np.zeros(5), 64)
    chosen = chosen_variants("bayes", np.ones(5), 3072)
    assert min(variant.log_tau for variant in chosen) < -1536 < max(variant.log_tau for variant in chosen)
