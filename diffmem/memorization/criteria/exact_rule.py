"""The rule that calls a generated image a copy, decided exactly.

A generated image is memorized when d1 / d2 < threshold, strictly, with d1 and d2 its distances to the nearest and
the second nearest training image; threshold 1/3 (Yoon et al. 2023; Gu et al., arXiv 2310.02664). With threshold p/q
and squared distances this is q²·d1² < p²·d2², for uint8 images a comparison of integers. d1 = 0 is memorized whatever
d2 is; the code published with the paper divides, and does not count d1 = d2 = 0, where that is 0/0 (`published_rule`).
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from diffmem.errors import InputError


def parse_threshold(threshold: float | str | Fraction) -> Fraction:
    """The threshold as an exact fraction: "1/3", 0.25, Fraction(1, 3), or 1/3 as a float.

    A float stands for the simplest fraction (denominator up to 10⁶) that rounds to it, so that 1/3 means one third;
    a float that no such fraction rounds to stands for its own binary value.

    Args:
        threshold: On d1/d2.

    Returns:
        The fraction that is meant.

    Raises:
        InputError: Unless 0 < threshold ≤ 1.

    Example:
        >>> parse_threshold(1 / 3), parse_threshold("0.25")
        (Fraction(1, 3), Fraction(1, 4))
    """
    try:
        exact = Fraction(threshold)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise InputError(f"threshold {threshold!r} is not a number or a fraction such as 1/3") from error
    if isinstance(threshold, float):
        simple = exact.limit_denominator(10**6)
        if float(simple) == threshold:
            exact = simple
    if not 0 < exact <= 1:
        raise InputError(f"the threshold on d1/d2 must be above 0 and at most 1, got {threshold}")
    return exact


def published_rule(squared_distances: np.ndarray, threshold: Fraction) -> np.ndarray:
    """`ratio_rule` as the code published with the paper decides it: d1 = d2 = 0, an exact copy of an image that the
    training set holds twice, is 0/0 there and no copy.

    Args:
        squared_distances: As for `ratio_rule`.
        threshold: On d1/d2.

    Returns:
        bool [Q], which images are memorized.
    """
    return ratio_rule(squared_distances, threshold) & (squared_distances[:, 1] > 0)


def ratio_rule(squared_distances: np.ndarray, threshold: Fraction) -> np.ndarray:
    """Which images are memorized: d1 = 0 or d1/d2 < threshold, in integers for integer distances.

    Args:
        squared_distances: [Q, ≥2], squared distances to the two nearest training images, nearest first; int64, or
            float64 for float images.
        threshold: On d1/d2.

    Returns:
        bool [Q].

    Example:
        >>> ratio_rule(np.array([[1, 9], [1, 10], [0, 0]]), Fraction(1, 3))
        array([False,  True,  True])
    """
    first, second = squared_distances[:, 0], squared_distances[:, 1]
    p, q = threshold.numerator**2, threshold.denominator**2
    if np.issubdtype(first.dtype, np.integer):
        largest = max(int(second.max(initial=0)), int(first.max(initial=0)))
        if largest * max(p, q) >= 2**63:  # Python's integers do not overflow
            first, second = first.astype(object), second.astype(object)
    return np.asarray((first == 0) | (first * q < second * p), dtype=bool)
