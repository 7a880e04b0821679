"""The figure of each law, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmem.evaluation import LossGap
from diffmem.html_report import level as words
from diffmem.plotting import plot, svg
from diffmem.studies.laws.crossover import LAW, MARGIN, crossings, share_of
from diffmem.studies.laws.early_warning import lead
from diffmem.studies.laws.finding import LawFinding, figures
from diffmem.studies.laws.halves import margins, value_of
from diffmem.studies.laws.onset import LEVELS, generalizations, onsets
from diffmem.studies.laws.regression import Time, exponent
from diffmem.studies.laws.spurious import phases, shares_at
from diffmem.studies.measure import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#3866a8", "#2b6b3f", "#8a5a00", "#a3261c", "#6b3fa0", "#1f8a8a", "#b0457b", "#555555")
_RED, _BLUE, _GREEN = "#a3261c", "#3866a8", "#2b6b3f"


def draw_law(found: LawFinding, results: Sequence[Result]) -> str:
    """The figure of a law.

    Args:
        found: What the runs say of it.
        results: The runs.
    """
    draw: dict[str, Callable[[Figure, LawFinding, Sequence[Result]], None]] = {
        "onset": _onset,
        "early-warning": _early_warning,
        "spurious": _spurious,
        "crossover": _crossover,
        "halves": _halves,
    }
    with plot(8.6, 3.5) as figure:
        draw[found.name](figure, found, [result for result in results if result.snapshots])
        return svg(figure)


def _by_size(results: Sequence[Result]) -> list[tuple[int, str, list[Result]]]:
    """(N, a color, its runs)."""
    sizes = sorted({result.size for result in results})
    colors = {size: COLORS[place % len(COLORS)] for place, size in enumerate(sizes)}
    return [(size, colors[size], [result for result in results if result.size == size]) for size in sizes]


def _curves(axes: Axes, results: Sequence[Result]) -> None:
    """R_mem of every run over images seen."""
    for size, color, runs in _by_size(results):
        for number, run in enumerate(runs):
            axes.plot(
                [each.images for each in run.snapshots], [each.ratio for each in run.snapshots], color=color,
                linewidth=1.0, marker=".", markersize=3, label=None if number else f"N = {size:,}",
            )  # fmt: skip
    _time_axis(axes, "x")
    axes.set_xlabel("images seen in training")


def _time_axis(axes: Axes, which: str) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())


def _percent(axes: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(-0.03, 1.05)


def _size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("training images N")


def _onset(figure: Figure, found: LawFinding, results: Sequence[Result]) -> None:
    """R_mem over training time, and its onset over N with the power law and the proportional one."""
    left, right = figure.subplots(1, 2)
    _curves(left, results)
    for level in LEVELS:
        left.axhline(level, color="#555", linestyle="--", linewidth=0.8)
    _percent(left)
    left.set_ylabel("R_mem")
    left.legend(fontsize=8)
    sizes = sorted({result.size for result in results})
    drawn: list[tuple[str, str, str, list[Time]]] = [
        (f"onset, R_mem {words(level)}", color, marker, onsets(results, level))
        for level, color, marker in zip(LEVELS, (_RED, _BLUE), "os", strict=True)
    ]
    drawn.append(("denoised well", _GREEN, "D", generalizations(results)))
    for label, color, marker, times in drawn:
        _times(right, times, color, marker, label)
    if (fit := exponent(drawn[0][3])) is not None:
        middle = math.exp(np.mean(np.log(sizes)))
        at = fit.estimate * math.log(middle) + np.mean(list(fit.intercepts.values()))
        label = "proportional to N"
        right.plot(
            sizes,
            [math.exp(at) * size / middle for size in sizes],
            color="#999",
            linestyle=":",
            linewidth=1.0,
            label=label,
        )
    _size_axis(right, sizes)
    _time_axis(right, "y")
    right.set_ylabel("images seen")
    right.set_ylim(top=8 * right.get_ylim()[1])  # of a logarithmic axis: above all times, for the legend
    right.legend(fontsize=7.5, loc="upper left")


def _times(axes: Axes, times: Sequence[Time], color: str, marker: str, label: str) -> None:
    """The times of runs, those that are bounds as arrows, and their power law."""
    known = [time for time in times if time.known]
    if (fit := exponent(times)) is not None:
        label += f": exponent {figures(fit.estimate, fit.interval())}"
        sizes = np.array(sorted({time.size for time in fit.times}), dtype=float)
        at = np.mean(list(fit.intercepts.values()))
        axes.plot(sizes, np.exp(at + fit.estimate * np.log(sizes)), color=color, linewidth=1.0)
    axes.plot(
        [time.size for time in known], [time.value for time in known], marker, color=color, markersize=4, alpha=0.75,
        label=label,
    )  # fmt: skip
    for arrow, bounds in (
        ("^", [time for time in times if not math.isfinite(time.high)]),
        ("v", [time for time in times if not math.isfinite(time.low)]),
    ):
        axes.plot(
            [time.size for time in bounds], [time.value for time in bounds], arrow, color=color, markersize=6,
            fillstyle="none",
        )  # fmt: skip


def _early_warning(figure: Figure, found: LawFinding, results: Sequence[Result]) -> None:
    """The relative gap and R_mem over training time, and by noise level how long before the copies each shows it."""
    from matplotlib.ticker import StrMethodFormatter

    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.25, 1)})
    for size, color, runs in _by_size(results):
        for number, run in enumerate(runs):
            watched = [each for each in run.snapshots if each.watched is not None]
            gaps = [LossGap.from_json(each.watched.gap).relative for each in watched if each.watched is not None]
            images = [each.images for each in watched]
            name = None if number else f"N = {size:,}"
            left.plot(images, gaps, color=color, linewidth=1.2, label=name)
            left.plot(images, [each.ratio for each in watched], color=color, linewidth=1.0, linestyle=":")
    _time_axis(left, "x")
    left.set_xlabel("images seen in training")
    _percent(left)
    left.set_ylabel("relative loss gap (lines), R_mem (dots)")
    left.legend(fontsize=8)
    leads = [each for each in map(lead, results) if each is not None]
    sigmas = sorted({sigma for each in leads for sigma in each.levels})
    for size, color, _ in _by_size(results):
        own = [each for each in leads if each.size == size and each.copies is not None]
        if own:
            factors = [_mean_factor([(each.copies, each.levels.get(sigma)) for each in own]) for sigma in sigmas]
            right.plot(sigmas, factors, marker="o", markersize=3.5, linewidth=1.0, color=color, label=f"N = {size:,}")
    right.axhline(1.0, color="#555", linestyle="--", linewidth=0.8)
    right.set_xscale("log")
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    right.set_xlabel("noise level σ")
    right.set_ylabel("lead over the first copies, factor of time")
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=8)


def _mean_factor(pairs: Sequence[tuple[Any, Any]]) -> float:
    """The geometric mean of copies / gap; NaN where a run lacks one."""
    if any(None in pair for pair in pairs):
        return math.nan
    return math.exp(sum(math.log(copies / gap) for copies, gap in pairs) / len(pairs))


def _spurious(figure: Figure, found: LawFinding, results: Sequence[Result]) -> None:
    """The shares of the three phases over N, and where they meet."""
    (axes,) = figure.subplots(1, 1, squeeze=False)[0]
    shares = shares_at(results, found.details["images"])
    sizes = sorted({size for each in shares.values() for size in each})
    for place, (name, color) in enumerate((("memorized", _RED), ("spurious", "#8a5a00"), ("generalized", _BLUE))):
        means = [np.mean([each[size][place] for each in shares.values() if size in each]) for size in sizes]
        axes.plot(sizes, means, color=color, linewidth=1.4, marker="o", markersize=4, label=name)
        for each in shares.values():
            own = sorted(each)
            axes.plot(own, [each[size][place] for size in own], "_", color=color, markersize=8, alpha=0.6)
    known = [met for rep, own in sorted(shares.items()) if (met := phases(rep, own)) is not None]
    if known:
        ends = [math.exp(np.mean([getattr(each, name) for each in known])) for name in ("memorized", "generalized")]
        if ends[0] < ends[1]:
            axes.axvspan(*ends, color="#8a5a00", alpha=0.1, linewidth=0, label="between the two halves")
    axes.axhline(0.5, color="#555", linestyle="--", linewidth=0.8)
    if sizes:
        _size_axis(axes, sizes)
    _percent(axes)
    axes.set_ylabel(f"share of images after {found.details['images']:,} seen")
    axes.legend(fontsize=8)


def _crossover(figure: Figure, found: LawFinding, results: Sequence[Result]) -> None:
    """R_mem and the losses over M/N."""
    left, right = figure.subplots(1, 2)
    for size, color, runs in _by_size(results):
        shares = sorted({share_of(run) for run in runs})
        means = [np.mean([run.r_mem for run in runs if share_of(run) == share]) for share in shares]
        left.plot(shares, means, color=color, linewidth=1.3, label=f"N = {size:,}")
        left.plot([share_of(run) for run in runs], [run.r_mem for run in runs], "_", color=color, alpha=0.6)
        at = [own[size] for own in crossings(results).values() if math.isfinite(own.get(size, math.inf))]
        left.plot(at, [0.5] * len(at), "|", color=color, markersize=9)
        for style, name in (("-", "loss"), ("--", "memorizing")):
            losses = [
                np.mean([getattr(run.mixture, name) for run in runs if run.mixture and share_of(run) == share])
                for share in shares
            ]
            label = f"{'trained' if name == 'loss' else 'memorizing'}, N = {size:,}"
            right.plot(shares, losses, style, color=color, linewidth=1.2, label=label)
    left.axvspan(LAW - MARGIN, LAW + MARGIN, color="#555", alpha=0.1, linewidth=0, label="0.8 ± 0.1")
    left.axhline(0.5, color="#555", linestyle="--", linewidth=0.8)
    _percent(left)
    left.set_ylabel("R_mem of trained models")
    left.legend(fontsize=8)
    right.axhline(np.mean([run.mixture.generalizing for run in results if run.mixture]), color="#1c2430",
                  linewidth=1.0, linestyle=":", label="generalizing")  # fmt: skip
    right.set_ylabel("loss, mean of all levels")
    right.set_ylim(bottom=0)
    right.legend(fontsize=7.5)
    for axes in (left, right):
        axes.set_xlabel("components M / samples N")


def _halves(figure: Figure, found: LawFinding, results: Sequence[Result]) -> None:
    """The cosines and R_mem over N."""
    left, right = figure.subplots(1, 2)
    own = margins(results)
    sizes = sorted({result.size for result in results})
    for name, color, label in (
        ("between", _BLUE, "both networks, same seed"),
        ("nearest", _RED, "training image most alike"),
        ("chance", "#777", "both networks, different seeds"),
    ):
        values = [[value_of(each[size], name) for each in own.values() if size in each] for size in sizes]
        left.plot(sizes, [np.mean(each) for each in values], color=color, linewidth=1.3, marker="o", markersize=3.5,
                  label=label)  # fmt: skip
        for size, each in zip(sizes, values, strict=True):
            left.plot([size] * len(each), each, "_", color=color, markersize=8, alpha=0.6)
    star = [each for each in found.estimates if each.name.startswith("N*")]
    if star:
        left.axvspan(*star[0].interval, color="#555", alpha=0.1, linewidth=0, label="N*, 95 %")
    left.set_ylabel("median cosine, mean level removed")
    left.legend(fontsize=7.5)
    right.plot(sizes, [np.mean([run.r_mem for run in results if run.size == size]) for size in sizes], color=_RED)
    right.plot([run.size for run in results], [run.r_mem for run in results], "_", color=_RED, markersize=8)
    _percent(right)
    right.set_ylabel("R_mem of both")
    for axes in (left, right):
        _size_axis(axes, sizes)
        axes.set_xlabel("training images N, of each half")
    left.set_xlim(sizes[0] / 1.2, sizes[-1] * 1.2)
