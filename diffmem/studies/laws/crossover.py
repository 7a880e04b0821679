"""Crossover: a mixture of M components trained on N samples generalizes for small M, and memorizes beyond M ≈ 4N/5.

Buchanan et al. 2025, "On the Edge of Memorization in Diffusion Models" (arXiv 2508.17689): of denoisers that are
mixtures (`diffmem.studies.mixture`), trained on samples of a mixture, the share of copies by the ratio rule rises from
near 0 to near 1 as M goes to N; it is explained by the losses of two denoisers crossing, the data's own posterior mean
and one that has memorized M of the samples; and the crossing, under the weighting of noise levels that fits the
trained models best, lies near M = 4N/5.

M* here is where R_mem of the trained models reaches 50 %: interpolated over M/N on logit R_mem, made monotone first
(isotonic regression). Runs of one repetition share their samples, whose first N are the smaller sets; so the unit is
the repetition: the mean of its M*/N over the sizes, with an interval of Student's t over repetitions.

Verdict. The law holds where M*/N is shown to lie within 0.8 ± 0.1 (two one-sided tests at 5 %), and is contrary where
it is shown to lie outside. The other test is the explanation with all levels weighted alike, as in training: that there
the losses cross within 0.8 ± 0.1, too. Both are known in closed form (`diffmem.studies.mixture`), that of the
memorizing denoiser with its best s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from diffmem.studies.analysis import Effect
from diffmem.studies.laws.finding import Estimate, LawFinding, Test, figures, mean_of, tested
from diffmem.studies.measure import Result
from diffmem.studies.mixture import LEVELS

LAW, MARGIN = 0.8, 0.1
_NOISE = LEVELS.double().numpy() ** 2
# d (1 − M/N) / σ² against d / (1 + σ²), both averaged over the levels.
SMALL_STD_CROSSING = 1 - float((1 / (1 + _NOISE)).mean() / (1 / _NOISE).mean())
SOURCE = "Buchanan et al. 2025 (arXiv 2508.17689)"
TEXT = "mixtures of M components trained on N samples begin to copy them near M = 4N/5"
TEXT_LOSS = "the losses of the memorizing and of the generalizing denoiser cross there, with all noise levels alike"


def crossing(shares: Sequence[float], counts: Sequence[int], totals: Sequence[int]) -> float:
    """M/N at which R_mem reaches 50 %; infinite where it never does, −infinite where it always has.

    Args:
        shares: M/N, ascending.
        counts: Copies.
        totals: Samples.
    """
    from sklearn.isotonic import isotonic_regression

    seen = np.array(totals, dtype=np.float64)
    smooth = isotonic_regression((np.array(counts) + 0.5) / (seen + 1), sample_weight=seen)
    return rises_through_zero(shares, [math.log(each / (1 - each)) for each in smooth])


def rises_through_zero(x: Sequence[float], rising: Sequence[float]) -> float:
    """Where values that rise through 0 are 0, interpolated between two of them; infinite where they stay below,
    −infinite where the first one is not below.

    Args:
        x: Where, ascending.
        rising: The values.
    """
    above = next((place for place, value in enumerate(rising) if value >= 0), None)
    if above is None:
        return math.inf
    if above == 0:
        return -math.inf
    before, after = rising[above - 1], rising[above]
    return x[above - 1] + (x[above] - x[above - 1]) * -before / (after - before)


def share_of(result: Result) -> float:
    """M/N of a run."""
    assert result.mixture is not None
    return result.mixture.components / result.size


def crossings(results: Sequence[Result]) -> dict[int, dict[int, float]]:
    """M*/N of the trained models, by repetition and by size."""

    def trained(runs: Sequence[Result]) -> float:
        return crossing([share_of(run) for run in runs], [run.count for run in runs], [run.total for run in runs])

    return _by_place(results, trained)


def loss_crossings(results: Sequence[Result]) -> dict[int, dict[int, float]]:
    """M/N from which the memorizing denoiser's loss is the lower one, by repetition and by size."""

    def closed(runs: Sequence[Result]) -> float:
        found = [run.mixture for run in runs if run.mixture is not None]
        return rises_through_zero(
            [share_of(run) for run in runs], [each.generalizing - each.memorizing for each in found]
        )

    return _by_place(results, closed)


def _by_place(results: Sequence[Result], of: Callable[[Sequence[Result]], float]) -> dict[int, dict[int, float]]:
    """What a function says of the runs, by M/N, of each repetition and size that has two or more."""
    places: dict[tuple[int, int], list[Result]] = {}
    for result in results:
        if result.mixture is not None:
            places.setdefault((result.repetition, result.size), []).append(result)
    found: dict[int, dict[int, float]] = {}
    for (repetition, size), runs in sorted(places.items()):
        if len(runs) > 1:
            found.setdefault(repetition, {})[size] = of(sorted(runs, key=share_of))
    return found


def over_repetitions(values: Sequence[float]) -> Effect | None:
    """Their mean with its error; None of fewer than two, or where one is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return mean_of(values)


def judge(results: Sequence[Result]) -> LawFinding:
    """What the runs say of the law.

    Args:
        results: Runs of mixtures, of several M/N, sizes and repetitions.
    """
    own, losses = crossings(results), loss_crossings(results)
    shares = sorted({share_of(result) for result in results if result.mixture is not None})
    tests: list[Test] = []
    estimates: list[Estimate | None] = []
    notes: list[str] = []
    for text, name, each in (
        (TEXT, "M*/N of trained models", own),
        (TEXT_LOSS, "M/N at which the losses cross", losses),
    ):
        values = [value for by_size in each.values() for value in by_size.values()]
        tests.append(_test(text, _mean({key: _bounded(by_size, shares) for key, by_size in each.items()})))
        if outside := sum(not math.isfinite(value) for value in values):
            below = sum(value == -math.inf for value in values)
            notes.append(
                f"{name}: outside of the M/N tried in {outside} of {len(values)}, below them in {below}; in the test "
                "they count as the first or last of these."
            )
        estimates.append(_estimate(f"{name}, mean of all N", _mean(each)))
        for size in sorted({size for by_size in each.values() for size in by_size}):
            one = over_repetitions([by_size[size] for by_size in each.values() if size in by_size])
            estimates.append(_estimate(f"{name}, N = {size:,}", one))
    notes.append(
        f"With s → 0, as in the paper's approximation, the losses cross at M/N = {SMALL_STD_CROSSING:.4f}, all levels "
        "alike: the paper fits the weighting of the levels that puts the crossing where trained models begin to copy."
    )
    return LawFinding(
        "crossover", SOURCE, tuple(tests), tuple(each for each in estimates if each is not None), tuple(notes),
        {"crossings": _as_json(own), "loss_crossings": _as_json(losses), "law": [LAW - MARGIN, LAW + MARGIN]},
    )  # fmt: skip


def _bounded(by_size: Mapping[int, float], shares: Sequence[float]) -> dict[int, float]:
    return {size: min(max(value, shares[0]), shares[-1]) for size, value in by_size.items()}


def _mean(found: Mapping[int, Mapping[int, float]]) -> Effect | None:
    """Over the repetitions that have all sizes, of the means over the sizes."""
    sizes = {size for by_size in found.values() for size in by_size}
    return over_repetitions([float(np.mean(list(each.values()))) for each in found.values() if set(each) == sizes])


def _test(text: str, found: Effect | None) -> Test:
    if found is None:
        return Test(text)
    off = Effect(found.estimate - LAW, found.error, found.freedom)
    asked = f"asked: {LAW - MARGIN:.2g} to {LAW + MARGIN:.2g}"
    basis = f"M/N, mean of all N: {figures(found.estimate, found.interval())}; {asked}"
    return tested(text, off.p_equivalence(MARGIN), off.p_beyond(MARGIN), basis)


def _estimate(name: str, found: Effect | None) -> Estimate | None:
    if found is None:
        return None
    return Estimate(name, found.estimate, found.interval(), f"{found.freedom + 1:.0f} repetitions")


def _as_json(found: Mapping[int, Mapping[int, float]]) -> list[dict[str, float | None]]:
    return [
        {"repetition": repetition, "size": size, "share": value if math.isfinite(value) else None}
        for repetition, by_size in found.items()
        for size, value in by_size.items()
    ]
