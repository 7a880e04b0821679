"""Thresholds from a holdout set, p-values, false discoveries: what they promise, they keep."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diffmem.errors import InputError
from diffmem.memorization.calibration import Calibration, false_discovery_rates, images_needed, smallest_alarms

scores = st.lists(st.integers(0, 6).map(float), min_size=20, max_size=40)  # with many ties


@given(scores, st.lists(st.integers(-1, 7).map(float), max_size=8), st.sampled_from([0.05, 0.1, 0.3, 1 / 3]))
def test_p_values_and_threshold_are_one_decision(holdout, some, alarms):
    calibration = Calibration(np.array(holdout), alarms)
    some = np.array(some)
    p_values = calibration.p_values(some)
    n = len(holdout)
    by_hand = np.array([Fraction(1 + sum(h <= s for h in holdout), n + 1) for s in some], object)
    assert np.array_equal(p_values, by_hand.astype(float))
    assert np.array_equal(calibration.copies(some), by_hand <= Fraction(alarms).limit_denominator(100))


@given(scores, st.sampled_from([0.05, 0.1, 0.3]))
@settings(max_examples=30)
def test_p_values_are_super_uniform_under_exchangeability(everything, alarms):
    """Each image in turn is the one that is tested against the others: exactly the probability over permutations."""
    everything = np.array(everything)
    n = len(everything)
    p_values = [Calibration(np.delete(everything, i), alarms).p_values(everything[i : i + 1])[0] for i in range(n)]
    for level in np.arange(1, n + 1) / n:
        assert np.mean(np.array(p_values) <= level + 1e-12) <= level + 1e-12
    wrong = [bool(Calibration(np.delete(everything, i), alarms).copies(everything[i : i + 1])[0]) for i in range(n)]
    assert np.mean(wrong) <= alarms


def test_without_ties_every_share_is_reached_exactly():
    everything = np.random.default_rng(0).permutation(100) / 7
    wrong = [Calibration(np.delete(everything, i), 0.07).copies(everything[i : i + 1])[0] for i in range(100)]
    assert np.mean(wrong) == 0.07


@pytest.mark.parametrize("alarms", [0.01, 0.05, 0.001, 1 / 3, 0.5, 0.003])
def test_the_least_number_of_images(alarms):
    enough = images_needed(alarms)
    Calibration(np.arange(float(enough)), alarms)
    with pytest.raises(InputError, match=f"too few for alarms=.*give {enough:,} or more"):
        Calibration(np.arange(enough - 1.0), alarms)


@given(st.integers(1, 5000))
def test_the_least_share_that_is_advised_works(images):
    assert images_needed(float(smallest_alarms(images))) <= images


def test_the_interval_of_alarms():
    calibration = Calibration(np.arange(999.0), 0.01)
    low, high = calibration.alarm_interval
    np.testing.assert_allclose((low, high), stats.beta(10, 990).ppf([0.025, 0.975]), rtol=1e-9)
    # The share of alarms of a threshold drawn again and again lies within it as often as it says.
    rng = np.random.default_rng(1)
    drawn = np.sort(rng.random((2000, 999)))[:, 9]  # uniform scores: the share of alarms is the threshold itself
    inside = np.mean((drawn >= low) & (drawn <= high))
    assert abs(inside - 0.95) < 0.02


@given(st.lists(st.integers(1, 50).map(lambda k: k / 50), min_size=1, max_size=30), st.sampled_from([0.05, 0.1, 0.5]))
def test_discoveries_are_those_of_the_step_up(p_values, rate):
    p_values = np.array(p_values)
    count = len(p_values)
    ordered = np.sort(p_values)
    passing = [
        j
        for j in range(1, count + 1)
        if Fraction(ordered[j - 1]).limit_denominator(50) * count <= Fraction(rate).limit_denominator(100) * j
    ]
    limit = ordered[passing[-1] - 1] if passing else -1
    q_values = false_discovery_rates(p_values)
    assert np.array_equal(q_values <= rate * (1 + 1e-12), p_values <= limit)
    np.testing.assert_allclose(q_values, stats.false_discovery_control(p_values), rtol=1e-12)


def test_false_discoveries_stay_below_the_rate():
    """200 batches of 90 images that are not copies and 10 that are, one holdout set for each batch."""
    rng = np.random.default_rng(2)
    rates = []
    for _ in range(200):
        calibration = Calibration(rng.normal(size=999), 0.01)
        some = np.concatenate([rng.normal(size=90), rng.normal(-6, 1, 10)])
        found = false_discovery_rates(calibration.p_values(some)) <= 0.1
        rates.append(found[:90].sum() / max(1, found.sum()))
    assert np.mean(rates) <= 0.1 + 3 * np.std(rates) / np.sqrt(200)
    assert np.mean(rates) > 0.04  # and not by finding nothing


@pytest.mark.parametrize("alarms", [0, 1, -0.1, float("nan"), "many", None])
def test_shares_that_are_none(alarms):
    with pytest.raises(InputError, match="alarms must be a share"):
        Calibration(np.arange(100.0), alarms)


def test_scores_that_are_none():
    with pytest.raises(InputError, match="1 of 100 scores are NaN"):
        Calibration(np.array([*range(99), np.nan]), 0.05)
    assert false_discovery_rates(np.zeros(0)).shape == (0,)
