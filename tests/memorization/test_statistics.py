"""The interval against its defining equation and its promised coverage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmem.memorization import wilson_interval

Z = 1.959963984540054


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
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
