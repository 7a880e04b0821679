"""Numbers of examples for Hypothesis: a test with one of its own is shortened by a profile that is shorter yet."""

from hypothesis import settings


def at_most(count: int) -> int:
    return min(count, settings().max_examples)
