"""Intervals against their defining equations and their promised coverage; answers sought at any time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import betaln, xlog1py, xlogy

from diffmem.errors import InputError
from diffmem.memorization import Question, anytime_interval, wilson_interval

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
    question = Question(at_least=0.9)
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
        with pytest.raises(InputError, match="both lie between"):
            Question(*values)
