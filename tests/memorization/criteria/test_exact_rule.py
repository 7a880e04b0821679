"""The rule is decided exactly: integers against Python's fractions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmem.errors import InputError
from diffmem.memorization import parse_threshold, ratio_rule

# Up to the largest squared distance of an image of a hundred thousand values.
squared = st.integers(0, 100_000 * 255**2)


@given(
    st.lists(st.tuples(squared, squared).map(sorted), min_size=1),
    st.fractions(Fraction(1, 10**6), 1, max_denominator=10**6),
)
def test_rule_equals_exact_arithmetic(pairs, threshold):
    expected = [first == 0 or first < threshold**2 * second for first, second in pairs]
    assert ratio_rule(np.array(pairs, np.int64), threshold).tolist() == expected


@given(st.integers(1, 10**8))
def test_rule_is_strict_at_the_threshold(first):
    pairs = np.array([[first, 9 * first - 1], [first, 9 * first], [first, 9 * first + 1]], np.int64)
    assert ratio_rule(pairs, Fraction(1, 3)).tolist() == [False, False, True]


def test_exact_copy_of_a_duplicated_image_is_memorized():
    assert ratio_rule(np.zeros((1, 2), np.int64), Fraction(1, 3)).tolist() == [True]
    assert ratio_rule(np.zeros((1, 2), np.float64), Fraction(1, 3)).tolist() == [True]


@pytest.mark.parametrize(
    ("given_as", "exact"),
    [(1 / 3, Fraction(1, 3)), ("1/3", Fraction(1, 3)), (0.5, Fraction(1, 2)), (0.3, Fraction(3, 10)), (1, Fraction(1)),
     (Fraction(2, 7), Fraction(2, 7)), ("0.25", Fraction(1, 4))],
)  # fmt: skip
def test_threshold_means_what_was_written(given_as, exact):
    assert parse_threshold(given_as) == exact


@pytest.mark.parametrize("nonsense", [0, -1, 1.5, "third", "1/0", float("nan"), float("inf"), None])
def test_bad_thresholds(nonsense):
    with pytest.raises(InputError, match="threshold"):
        parse_threshold(nonsense)
