"""Intervals against their defining equations and their promised coverage; answers sought at any time."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import betaln, xlog1py, xlogy
from scipy.stats import beta

from diffmem.errors import InputError
from diffmem.memorization import (
    CopyRate,
    SequentialTest,
    anytime_interval,
    exact_interval,
    highest_interval,
    wilson_interval,
)

Z = 1.959963984540054


CASES = st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(CASES)
def test_ends_solve_the_score_equation(case):
    count, total = case
    share = count / total
    low, high = wilson_interval(count, total)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if 0 < end < 1:  # |p̂ − p| = z √(p(1 − p)/n)
            assert abs(share - end) == pytest.approx(Z * np.sqrt(end * (1 - end) / total), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9])
def test_covers_on_average(share):
    """Averaged over nearby shares (single ones oscillate), the stated 95 % is met within two points."""
    random = np.random.default_rng(0)
    true = random.uniform(share * 0.8, min(1, share * 1.1), 4000)
    counts = random.binomial(1000, true)
    intervals = np.array([wilson_interval(int(count), 1000) for count in counts])
    covered = (intervals[:, 0] <= true) & (true <= intervals[:, 1])
    assert 0.93 <= covered.mean() <= 0.975


@given(CASES, st.floats(0.5, 0.999))
def test_anytime_ends_solve_their_equation(case, confidence):
    count, total = case
    low, high = anytime_interval(count, total, confidence)
    assert 0 <= low <= count / total <= high <= 1
    evidence = betaln(count + 0.5, total - count + 0.5) - betaln(0.5, 0.5)
    for end in (low, high):
        if 1e-6 < end < 1 - 1e-6:
            likelihood = xlogy(count, end) + xlog1py(total - count, -end)
            assert np.exp(evidence - likelihood) == pytest.approx(1 / (1 - confidence), rel=0.02)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_looking_often_does_not_break_the_promise(share):
    """Of 600 sequences, each looked at 25 times, at most 5 % (plus three standard errors) ever exclude the truth;
    Wilson's interval, which promises this for one look only, does so far more often."""
    random = np.random.default_rng(1)
    looks = np.arange(20, 520, 20)
    counts = (random.random((600, 500)) < share).cumsum(axis=1)[:, looks - 1]

    def ever_missed(interval) -> float:
        found = {(k, n): interval(int(k), int(n)) for n, column in zip(looks, counts.T, strict=True) for k in {*column}}
        missed = [
            any(not found[k, n][0] <= share <= found[k, n][1] for k, n in zip(row, looks, strict=True))
            for row in counts
        ]
        return np.mean(missed)

    assert ever_missed(anytime_interval) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 600)
    if share == 0.5:
        assert ever_missed(wilson_interval) > 0.15


def test_answers():
    question = SequentialTest(at_least=0.9)
    assert question.answer(0, 0) is None
    assert question.answer(60, 60) is True
    assert question.answer(10, 20) is False
    assert question.answer(180, 200) is None
    # Of 200 seeds in all, the rest cannot change these.
    assert question.answer(180, 200, of=200) is True
    assert question.answer(179, 200, of=200) is False
    assert question.answer(159, 180, of=200) is False
    assert question.answer(162, 181, of=200) is None
    assert question.shared_among(5).confidence == pytest.approx(0.99)
    for values in ((1.1, 0.95), (0.0, 0.95), (0.9, 1.0)):
        with pytest.raises(InputError, match="both must lie between"):
            SequentialTest(*values)


@given(CASES, st.floats(0.5, 0.9999))
def test_exact_ends_are_quantiles_of_the_beta_distribution(case, confidence):
    count, total = case
    low, high = exact_interval(count, total, confidence)
    side = (1 - confidence) / 2
    assert low == pytest.approx(beta.ppf(side, count, total - count + 1) if count else 0, rel=1e-6, abs=1e-11)
    assert high == pytest.approx(beta.isf(side, count + 1, total - count) if count < total else 1, rel=1e-6, abs=1e-11)


SHARES = {
    "all equal": lambda k: np.full(k, 0.5),
    "all rare": lambda k: np.full(k, 0.01),
    "rising": lambda k: np.linspace(0.05, 0.9, k),
    "rising to a plateau": lambda k: np.minimum(np.linspace(0.3, 1.5, k), 0.9),
}


@pytest.mark.parametrize("same_seeds", [False, True])
@pytest.mark.parametrize("snapshots", [1, 5, 20, 100])
def test_the_interval_of_the_highest_share_covers(snapshots, same_seeds):
    """Of 120 trajectories of each kind, 95 % (less two standard errors) have intervals that hold the highest share,
    whether the snapshots are sampled from the same seeds or not."""
    random = np.random.default_rng(snapshots)
    for shares in (make(snapshots) for make in SHARES.values()):
        covered = 0
        for _ in range(120):
            if same_seeds:
                counts = (random.random(64)[:, None] < shares).sum(axis=0)
            else:
                counts = random.binomial(64, shares)
            low, high = highest_interval([(int(count), 64) for count in counts])
            covered += low <= shares.max() <= high
        assert covered >= 120 * 0.91


def test_the_interval_of_one_estimate_does_not_cover_the_highest_share():
    random = np.random.default_rng(0)
    highest = random.binomial(64, 0.5, (500, 20)).max(axis=1)
    assert np.mean([wilson_interval(int(count), 64)[0] <= 0.5 for count in highest]) < 0.65


def test_the_interval_of_the_highest_share_is_no_wider_than_need_be():
    assert highest_interval([(40, 64)]) == exact_interval(40, 64)
    low, high = highest_interval([(count, 64) for count in (0, 10, 40, 40, 39)])
    assert high == exact_interval(40, 64)[1]  # the upper end need hold for one share only
    assert low == exact_interval(40, 64, 1 - 0.05 / 5)[0]
    # Which snapshots there are may depend on what was seen: both ends then hold for all that there could be.
    assert highest_interval([(40, 64)], looks=5) == exact_interval(40, 64, 1 - 0.05 / 5)
    assert highest_interval([(40, 64)], anytime=True) == anytime_interval(40, 64)
    # A snapshot with few images may have the highest share.
    assert highest_interval([(90, 100), (3, 4)])[1] == exact_interval(3, 4)[1]
    with pytest.raises(InputError, match="none given"):
        highest_interval([])


def snapshots_of(shares, seeds, correlation, random) -> np.ndarray:
    """Verdicts about the same seeds for every snapshot, bool [snapshots, seeds]: a seed whose image is a copy at one of
    them is so at the others more often than not."""
    own = random.normal(size=(len(shares), seeds))
    latent = math.sqrt(correlation) * random.normal(size=seeds) + math.sqrt(1 - correlation) * own
    return latent < np.array([NormalDist().inv_cdf(share) for share in shares])[:, None]


def test_verdicts_narrow_the_interval_of_the_highest_share_which_still_covers():
    random = np.random.default_rng(3)
    for shares in (np.full(8, 0.9), 0.9 * (1 - np.exp(-np.arange(1, 9))), np.full(8, 0.03)):
        covered = 0
        for index in range(30):
            verdicts = snapshots_of(shares, 200, 0.9, random)
            counts = [(int(each.sum()), 200) for each in verdicts]
            found = highest_interval(counts, verdicts=list(verdicts))
            covered += found[0] <= shares.max() <= found[1]
            if index < 2:
                bound = highest_interval(counts)
                assert bound[0] < found[0]
                assert found[1] == bound[1]
        assert covered >= 27


def test_verdicts_of_snapshots_that_agree_say_what_one_says():
    verdicts = np.random.default_rng(0).random(500) < 0.8
    counts = [(int(verdicts.sum()), 500)] * 20
    low, _ = highest_interval(counts, verdicts=[verdicts] * 20)
    # A twentieth of the error goes to leaving out what is clearly lower, of which there is nothing here.
    assert low == pytest.approx(exact_interval(*counts[0], 0.955)[0], abs=3e-3)
    assert low > highest_interval(counts)[0]
    # What could be looked at, and answers that end sampling, are not known from verdicts.
    assert highest_interval(counts, looks=20, verdicts=[verdicts] * 20) == highest_interval(counts, looks=20)
    with pytest.raises(InputError, match="same seeds"):
        highest_interval([(3, 4), (2, 5)], verdicts=[np.arange(4) < 3, np.arange(5) < 2])
    with pytest.raises(InputError, match="same seeds"):
        highest_interval([(3, 4)], verdicts=[np.arange(4) < 2])


@pytest.mark.parametrize("growth", [0.0, 0.15])
def test_the_interval_covers_where_answers_end_snapshots_and_runs(growth):
    """A run of six snapshots at most that ends with the first whose R_mem is found to be at least 0.6, each sampled in
    batches of 20 until that is known."""
    random, covered = np.random.default_rng(2), 0
    question = SequentialTest(0.6).shared_among(6)
    for _ in range(150):
        shares, counts = 0.6 + growth * (np.arange(6) - 3), []
        for share in shares:
            hits = (random.random(200) < share).cumsum()[19::20]
            total, answer = next(
                ((20 * n, a) for n, hit in enumerate(hits, 1) if (a := question.answer(int(hit), 20 * n)) is not None),
                (200, None),
            )
            counts.append((int(hits[total // 20 - 1]), total))
            if answer:
                break
        low, high = highest_interval(counts, looks=6, anytime=True)
        covered += low <= shares[: len(counts)].max() <= high
    assert covered >= 150 * 0.95


def test_a_rate_reports_its_share_and_intervals():
    rate = CopyRate.of(np.arange(400) < 3)
    assert (rate.count, rate.total, rate.ratio) == (3, 400, 3 / 400)
    assert rate.interval == wilson_interval(3, 400)
    assert rate.exact_interval == exact_interval(3, 400)
    assert rate.anytime_interval == anytime_interval(3, 400)
    assert rate.to_dict() == {"count": 3, "total": 400, "ratio": 3 / 400, "interval": list(rate.interval)}
    assert str(rate) == "3 of 400: 0.75 % (95 % interval 0.26 % to 2.18 %)"
    nothing = CopyRate(0, 0)
    assert str(nothing) == "no images"
    assert math.isnan(nothing.ratio)
    assert nothing.anytime_interval == (0, 1)
    with pytest.raises(InputError, match="no interval for 0 of 0"):
        _ = nothing.interval
    for wrong in ((-1, 3), (4, 3)):
        with pytest.raises(InputError, match="no rate"):
            CopyRate(*wrong)
