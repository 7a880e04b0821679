"""Disjoint halves: two networks trained on few images each copy their own, on many they generate the same images.

Kadkhodaie et al. 2024, "Generalization in diffusion models arises from geometry-adaptive harmonic representations"
(arXiv 2310.02557). At every N two networks are trained alike on N images each, none of them common, from other first
weights, and sampled from the same latents. `diffmem.evaluation.agreement` says how alike their images of one seed are,
how alike each is to the training image most like it, and how alike images of different seeds are, all as the median
cosine with mean levels removed.

The margin is the first of these minus the second, averaged over both networks: below 0 where they copy, above 0 where
they agree more with each other than with what they were trained on. N* is where it is 0, interpolated along ln N and
made monotone first (isotonic regression).

Verdict. The law holds where the mean margin at the largest N is above 0 (Student's t over repetitions, two-sided at
5 %), and is contrary where it is below; the other test says the reverse of the smallest N. N* has an interval of
Student's t over repetitions, in ln N; there is none where a repetition has no crossing among its sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from diffmem.evaluation import Agreement
from diffmem.studies.analysis import Effect
from diffmem.studies.laws.crossover import over_repetitions, rises_through_zero
from diffmem.studies.laws.finding import Estimate, LawFinding, Test, figures, tested
from diffmem.studies.measure import Result

SOURCE = "Kadkhodaie et al. 2024 (arXiv 2310.02557)"
TEXT = "trained on disjoint halves of many images, two networks agree more with each other than with their images"
TEXT_COPY = "on few images each of them is nearer to its own"


def margins(results: Sequence[Result]) -> dict[int, dict[int, Agreement]]:
    """What was found by repetition and by size, ascending."""
    found: dict[int, dict[int, Agreement]] = {}
    for result in sorted(results, key=lambda each: (each.repetition, each.size)):
        if result.agreement is not None:
            found.setdefault(result.repetition, {})[result.size] = result.agreement
    return found


def overtaking(by_size: dict[int, Agreement]) -> float:
    """ln N* of one repetition; infinite where the networks never agree, −infinite where they always do."""
    from sklearn.isotonic import isotonic_regression

    sizes = sorted(by_size)
    rising = isotonic_regression([by_size[size].margin for size in sizes])
    return rises_through_zero([math.log(size) for size in sizes], list(rising))


def judge(results: Sequence[Result]) -> LawFinding:
    """What the runs say of the law.

    Args:
        results: Runs of pairs, of several sizes and repetitions.
    """
    found = margins(results)
    sizes = sorted({size for by_size in found.values() for size in by_size})
    estimates: list[Estimate] = []
    tests = [Test(TEXT), Test(TEXT_COPY)]
    if len(sizes) > 1:
        tests = [
            _test(TEXT, found, sizes[-1], 1.0),
            _test(TEXT_COPY, found, sizes[0], -1.0),
        ]
        complete = [overtaking(by_size) for by_size in found.values() if len(by_size) == len(sizes)]
        if (at := over_repetitions(complete)) is not None:
            low, high = (math.exp(end) for end in at.interval())
            estimates.append(
                Estimate("N* per half", math.exp(at.estimate), (low, high), f"{len(complete)} repetitions")
            )
    for size in sizes:
        for name, words in (
            ("between", "cosine of both networks"),
            ("nearest", "cosine to the training image most alike"),
            ("chance", "cosine of different seeds"),
        ):
            if (mean := _mean(found, size, name)) is not None:
                basis = f"{mean.freedom + 1:.0f} repetitions"
                low, high = (min(1.0, max(-1.0, end)) for end in mean.interval())  # what a cosine can be
                estimates.append(Estimate(f"{words}, N = {size:,}", mean.estimate, (low, high), basis))
    pairs = [
        {"repetition": repetition, "size": size, **asdict(each)}
        for repetition, by_size in found.items()
        for size, each in by_size.items()
    ]
    notes = ("N is that of either half. R_mem counts the copies of both networks, each among its own images.",)
    return LawFinding("halves", SOURCE, tuple(tests), tuple(estimates), notes, {"pairs": pairs})


def value_of(found: Agreement, name: str) -> float:
    """A number of an agreement; `nearest` is the mean of both networks."""
    return sum(found.nearest) / 2 if name == "nearest" else float(getattr(found, name))


def _mean(found: dict[int, dict[int, Agreement]], size: int, name: str) -> Effect | None:
    return over_repetitions([value_of(by_size[size], name) for by_size in found.values() if size in by_size])


def _test(text: str, found: dict[int, dict[int, Agreement]], size: int, sign: float) -> Test:
    """That at a size networks agree more with each other (sign 1) or with their own images (−1)."""
    mean = _mean(found, size, "margin")
    if mean is None:
        return Test(text)
    holds = sign * mean.estimate > 0
    difference = f"difference of the cosines at N = {size:,}: {figures(mean.estimate, mean.interval())}"
    basis = f"{difference}; asked: {'above' if sign > 0 else 'below'} 0"
    return tested(text, mean.p_difference if holds else 1.0, 1.0 if holds else mean.p_difference, basis)
