"""Spurious images: between copying and generalizing there are some that a model repeats and never saw.

Pham et al. 2025 (arXiv 2505.21777): as N grows at fixed training, memorized images give way to spurious ones,
attractors that mix training images, and these to generalized ones. The shares are those of `diffmem.studies.watch`,
with distances in pixels in place of LPIPS, at lengths of training at which all runs were audited.

In a repetition, at one length, N_m is where the memorized share falls below one half, N_g where the generalized share
rises above it (both interpolated on logits along ln N; a share that does not pass one half between the sizes passes it
at the end that lies nearer), and N_s where the spurious share is highest (the vertex of a parabola of its logarithm
through the highest point and its neighbors). A repetition's values are means over the lengths at which the smallest N
is mostly memorized and the largest mostly generalized; the phases then lie at other places between the sizes each
time, and the grid matters less. Without such a length it is the last one.

Verdict. The law says three things, each tested by Student's t over repetitions, one-sided at 5 %: N_s lies above N_m,
N_s lies below N_g, and the spurious share there is above those at the smallest and the largest N. It holds where all
three are shown, and is contrary where there are spurious images (at their peak more than at one of the ends) and the
peak is shown to lie elsewhere (each side at half of 5 %). No place is taken to be known better than the grid's step at
the peak allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from diffmem.studies.laws.finding import Estimate, LawFinding, Test, mean_of, tested
from diffmem.studies.measure import Result

SOURCE = "Pham et al. 2025 (arXiv 2505.21777)"
TEXT = "between copying and generalizing the share of spurious images has its peak"
_OVER, _UNDER = "peak of the spurious share over N_m", "N_g over the peak of the spurious share"
_RISE = "rise of the spurious share"
_LEAST = 0.002  # added to a share before its logarithm is taken
Shares = Mapping[int, tuple[float, float, float]]  # by N: memorized, spurious, generalized


@dataclass(frozen=True)
class Phases:
    """One repetition, all of it in ln N but the last two.

    Attributes:
        repetition: Which.
        memorized: Where the memorized share falls below one half.
        peak: Where the spurious share is highest.
        generalized: Where the generalized share rises above one half.
        height: The spurious share at the size where it is highest.
        rise: By how much that is above the higher one of those at the smallest and the largest size.
        swing: By how much above the lower one.
        step: From the highest point to its neighbors, on average, in ln N.
        lengths: Of how many lengths these are means.
    """

    repetition: int
    memorized: float
    peak: float
    generalized: float
    height: float
    rise: float
    swing: float
    step: float
    lengths: int = 1


def phases(repetition: int, shares: Shares) -> Phases | None:
    """Where the phases meet; None with fewer than three sizes.

    Args:
        repetition: Which repetition.
        shares: Its shares, by size.
    """
    sizes = sorted(shares)
    if len(sizes) < 3:
        return None
    x = np.log(sizes)
    memorized, spurious, generalized = np.array([shares[size] for size in sizes]).T
    at = int(spurious.argmax())
    height, ends = float(spurious[at]), (float(spurious[0]), float(spurious[-1]))
    places = _falls(x, memorized), _vertex(x, spurious, at), _falls(x, 1 - generalized)
    step = float(np.diff(x[max(0, at - 1) : at + 2]).mean())
    return Phases(repetition, *places, height, height - max(ends), height - min(ends), step)


def _falls(x: np.ndarray, share: np.ndarray) -> float:
    """Where a share falls below one half for good."""
    above = np.flatnonzero(share >= 0.5)
    if not len(above):
        return float(x[0])
    last = int(above[-1])
    if last == len(x) - 1:
        return float(x[-1])
    left, right = (math.log(each / (1 - each)) for each in np.clip(share[last : last + 2], 1e-3, 1 - 1e-3))
    return float(x[last] + (x[last + 1] - x[last]) * left / (left - right))


def _vertex(x: np.ndarray, share: np.ndarray, at: int) -> float:
    """Where the parabola of log shares through the highest point and its neighbors is highest; at an end, there."""
    if at in (0, len(x) - 1):
        return float(x[at])
    a, b, _ = np.polyfit(x[at - 1 : at + 2], np.log(share[at - 1 : at + 2] + _LEAST), 2)
    return float(np.clip(-b / (2 * a), x[at - 1], x[at + 1])) if a < 0 else float(x[at])


def shares_at(results: Sequence[Result], images: int) -> dict[int, dict[int, tuple[float, float, float]]]:
    """By repetition and size, the shares at the first audit after so many images; runs without one are left out."""
    found: dict[int, dict[int, tuple[float, float, float]]] = {}
    for result in results:
        for each in result.snapshots:
            if each.images >= images and each.watched is not None:
                found.setdefault(result.repetition, {})[result.size] = each.watched.shares
                break
    return found


def common_lengths(results: Sequence[Result]) -> list[int]:
    """Images seen at the audits that all runs have."""
    return sorted(set.intersection(*({each.images for each in result.snapshots} for result in results)))


def mean_phases(repetition: int, by_length: Sequence[Shares]) -> Phases | None:
    """Where the phases meet on average; None with fewer than three sizes.

    Args:
        repetition: Which repetition.
        by_length: Its shares by size, for every length that all runs have.
    """
    inside = [each for each in by_length if each and each[min(each)][0] >= 0.5 and each[max(each)][2] >= 0.5]
    found = [each for shares in inside or by_length[-1:] if (each := phases(repetition, shares)) is not None]
    if not found:
        return None
    names = ("memorized", "peak", "generalized", "height", "rise", "swing", "step")
    means = {name: float(np.mean([getattr(each, name) for each in found])) for name in names}
    return Phases(repetition, **means, lengths=len(found))


def judge(results: Sequence[Result]) -> LawFinding:
    """What the runs say of the law.

    Args:
        results: Runs of one setting, of several sizes.
    """
    results = [result for result in results if result.snapshots[-1].watched is not None]
    lengths = common_lengths(results) if results else []
    images = lengths[-1] if lengths else 0
    shares = shares_at(results, images)
    sizes = max((set(each) for each in shares.values()), key=len, default=set())
    at = [shares_at(results, length) for length in lengths]
    found = [
        mean_phases(repetition, [each[repetition] for each in at]) for repetition, own in sorted(shares.items())
        if set(own) == sizes
    ]  # fmt: skip
    known = [each for each in found if each is not None]
    notes, estimates, test = [], [], Test(TEXT)
    if results:
        notes.append(f"The figure shows the shares after {images:,} images seen.")
    if len(known) > 1:
        fewest = min(each.lengths for each in known)
        step = float(np.mean([each.step for each in known])) / math.sqrt(12 * fewest)
        samples = min(each.total for result in results for each in result.snapshots)
        noise = math.sqrt(2 * 0.25 / samples / fewest)
        parts = {
            _OVER: ([each.peak - each.memorized for each in known], step),
            _UNDER: ([each.generalized - each.peak for each in known], step),
            _RISE: ([each.rise for each in known], noise),
        }
        above = {}
        for name, (values, least) in parts.items():
            mean = mean_of(values, least)
            above[name] = mean.p_above
            ends = mean.interval()
            basis = f"{len(known)} repetitions"
            if name == _RISE:
                estimates.append(Estimate(name, mean.estimate, ends, f"{basis}, shares"))
            else:
                factor = math.exp(min(ends[0], 50.0)), math.exp(min(ends[1], 50.0))
                estimates.append(Estimate(name, math.exp(mean.estimate), factor, f"{basis}, a factor of N"))
        elsewhere = min(1.0, 2 * min(1 - above[_OVER], 1 - above[_UNDER]))
        some = mean_of([each.swing for each in known], noise).p_above
        shown = "; ".join(f"{each.name}: {each.figures}" for each in estimates)
        test = tested(TEXT, max(above.values()), max(elsewhere, some), f"{shown}; asked: above 1, 1 and 0")
    elif results:
        notes.append("A verdict takes two repetitions with three sizes each.")
    details = {
        "images": images,
        "shares": {f"{rep}": {f"{size}": list(each[size]) for size in sorted(each)} for rep, each in shares.items()},
        "phases": [asdict(each) for each in known],
    }
    return LawFinding("spurious", SOURCE, (test,), tuple(estimates), tuple(notes), details)
