"""Onset: the training time until copies appear grows in proportion to N.

Bonnaire et al. 2025 (arXiv 2505.17638) and Favero et al. 2025 (arXiv 2505.16959): at fixed batch the time τ_mem at
which a diffusion model begins to copy grows as N, while the time τ_gen at which it generates well does not depend on N;
between the two it generalizes.

τ_mem here is the images seen when R_mem first reaches a level: 10 %, and 50 % beside. It is interpolated between two
audits, on logit R_mem along log time, with R_mem made monotone first (isotonic regression: else the first high estimate
of many would be taken for the onset). Runs that never get there are censored. The exponent b of τ = a·N^b has an
interval of Student's t over runs (`regression`).

Verdict. The law is b = 1. It holds where b is shown to lie within 0.8 … 1.25 (two one-sided tests at 5 %), and is
contrary where b is shown to lie outside. Over a factor of 16 in N these exponents make τ grow by 9 and by 32 instead of
16: within a factor of two of proportional, which also is what the published curves show.

τ_gen is the images seen when the error on unseen images, averaged over noise levels in its logarithm, comes to 5 %
above the median of the runs' lowest errors. Runs that never get there do not generalize, copying sets in before: of
such small N the law says nothing, and they are left out. That the exponent is within ±0.25 of 0 is the other half of
the law.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from diffmem.html_report import level as words
from diffmem.studies.laws.finding import Estimate, LawFinding, Test, figures, tested
from diffmem.studies.laws.regression import Exponent, Time, exponent
from diffmem.studies.measure import Result
from diffmem.text import counted

LEVELS = (0.1, 0.5)
MARGIN = 0.8, 1.25
GENERAL_MARGIN = -0.25, 0.25
_ABOVE = math.log(1.05)
SOURCE = "Bonnaire et al. 2025 (arXiv 2505.17638), Favero et al. 2025 (arXiv 2505.16959)"
TEXT = "the training time until copies appear grows about in proportion to N"
TEXT_GENERAL = "the time until unseen images are denoised well hardly depends on N"


def onset(lengths: Sequence[float], counts: Sequence[int], totals: Sequence[int], level: float) -> Time:
    """When R_mem first reaches a level, as a `Time` without a run.

    Args:
        lengths: Images seen at each audit, ascending.
        counts: Copies.
        totals: Images.
        level: The level, a share.
    """
    from sklearn.isotonic import isotonic_regression

    seen = np.array(totals, dtype=np.float64)
    shares = isotonic_regression(np.array(counts) / seen, sample_weight=seen)
    reached = np.flatnonzero(shares >= level)
    if not len(reached):
        return Time(0, 0, math.log(lengths[-1]), math.inf)
    after = int(reached[0])
    if after == 0:
        return Time(0, 0, -math.inf, math.log(lengths[0]))
    smooth = (shares * seen + 0.5) / (seen + 1)
    below, above = (smooth[after + step] for step in (-1, 0))
    logits = [math.log(each / (1 - each)) for each in (below, above)]
    start, step = math.log(lengths[after - 1]), math.log(lengths[after] / lengths[after - 1])
    rise = logits[1] - logits[0]
    part = min(1.0, max(0.0, (math.log(level / (1 - level)) - logits[0]) / rise))
    noise = [1 / (seen[after + at] * each * (1 - each)) for at, each in ((-1, below), (0, above))]
    error = step / rise * math.sqrt((1 - part) ** 2 * noise[0] + part**2 * noise[1])
    at = start + part * step
    return Time(0, 0, at, at, min(error, step))


def falls_to(lengths: Sequence[float], values: Sequence[float], level: float) -> Time:
    """When values first fall to a level, interpolated along log time.

    Args:
        lengths: Images seen at each audit, ascending.
        values: What falls.
        level: To what.
    """
    below = [place for place, value in enumerate(values) if value <= level]
    if not below:
        return Time(0, 0, math.log(lengths[-1]), math.inf)
    if below[0] == 0:
        return Time(0, 0, -math.inf, math.log(lengths[0]))
    before, after = values[below[0] - 1], values[below[0]]
    start, step = math.log(lengths[below[0] - 1]), math.log(lengths[below[0]] / lengths[below[0] - 1])
    at = start + step * (before - level) / (before - after)
    return Time(0, 0, at, at)


def onsets(results: Sequence[Result], level: float) -> list[Time]:
    """The onset of every run."""
    found = []
    for result in results:
        lengths, counts, totals = (
            [getattr(each, name) for each in result.snapshots] for name in ("images", "count", "total")
        )
        time = onset(lengths, counts, totals, level)
        found.append(replace(time, size=result.size, repetition=result.repetition))
    return found


def generalizations(results: Sequence[Result]) -> list[Time]:
    """τ_gen of every run whose snapshots tell the error on unseen images, and that comes to the level."""
    curves = {}
    for result in results:
        errors = [each.watched for each in result.snapshots]
        if errors and None not in errors:
            curves[result.key] = [
                float(np.mean([math.log(unseen) for _, _, unseen, _, _ in each.gap]))
                for each in errors
                if each is not None
            ]
    if not curves:
        return []
    level = float(np.median([min(curve) for curve in curves.values()])) + _ABOVE
    found = []
    for result in results:
        if result.key in curves and min(curves[result.key]) <= level:
            time = falls_to([each.images for each in result.snapshots], curves[result.key], level)
            found.append(replace(time, size=result.size, repetition=result.repetition))
    return found


def judge(results: Sequence[Result]) -> LawFinding:
    """What the runs say of the law.

    Args:
        results: Runs of one setting, of several sizes.
    """
    times = {level: onsets(results, level) for level in LEVELS}
    found = {level: exponent(each) for level, each in times.items()}
    generalized = generalizations(results)
    general = exponent(generalized)
    tests = [
        _test(TEXT, found[LEVELS[0]], MARGIN, f"exponent at R_mem {words(LEVELS[0])}"),
        _test(TEXT_GENERAL, general, GENERAL_MARGIN, "exponent"),
    ]
    estimates = [_estimate(f"exponent of the onset at R_mem {words(level)}", found[level]) for level in LEVELS]
    estimates.append(_estimate("exponent of the generalization time", general))
    notes = []
    for level in LEVELS:
        early = sum(not math.isfinite(time.low) for time in times[level])
        late = sum(not math.isfinite(time.high) for time in times[level])
        if early or late:
            notes.append(
                f"R_mem {words(level)}: {late} of {len(times[level])} runs ended before their onset, {early} were past "
                "it at their first audit; they enter as censored."
            )
    if generalized and (never := len(results) - len(generalized)):
        smallest = min(time.size for time in generalized)
        notes.append(
            f"{counted(never, 'run')} of {len(results)} never denoised unseen images well, and tell nothing of the "
            f"time until they are; from N = {smallest:,} on some do."
        )
    if generalized:
        notes.append(
            "Denoised well: within 5 % of the median of the runs' lowest errors. A first level, the highest of these "
            "errors, could not be measured: runs of few images, which never generalize, set it above all first errors."
        )
    return LawFinding(
        "onset", SOURCE, tuple(tests), tuple(each for each in estimates if each is not None), tuple(notes),
        {
            "onsets": {f"{level:g}": [_as_json(time) for time in each] for level, each in times.items()},
            "slopes": {f"{level:g}": None if each is None else each.slopes() for level, each in found.items()},
            "margin": list(MARGIN),
        },
    )  # fmt: skip


def _test(text: str, found: Exponent | None, margin: tuple[float, float], name: str) -> Test:
    if found is None:
        return Test(text)
    asked = f"{margin[0]:g} to {margin[1]:g}".replace("-", "−")
    basis = f"{name}: {figures(found.estimate, found.interval())}; asked: {asked}"
    return tested(text, found.p_within(*margin), found.p_beyond(*margin), basis)


def _estimate(name: str, found: Exponent | None) -> Estimate | None:
    if found is None:
        return None
    runs = f"{len(found.times)} runs" + (f", {found.censored} of them censored" if found.censored else "")
    return Estimate(name, found.estimate, found.interval(), f"{runs}, {counted(found.freedom, 'degree')} of freedom")


def _as_json(time: Time) -> Mapping[str, float | int | None]:
    low, high = (None if not math.isfinite(end) else math.exp(end) for end in (time.low, time.high))
    return {"size": time.size, "repetition": time.repetition, "low": low, "high": high, "error": time.error}
