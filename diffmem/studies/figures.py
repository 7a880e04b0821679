"""The figures of studies and of searches for EMM, as SVG."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmem.html_report import level
from diffmem.plotting import plot, svg
from diffmem.studies.analysis import CONTRARY, EQUIVALENT, HOLDS, UNDECIDED
from diffmem.studies.findings import Findings
from diffmem.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from diffmem.studies.emm import EMM

COLORS = ("#3866a8", "#a3261c", "#2b6b3f", "#8a5a00", "#6b3fa0", "#1f8a8a", "#b0457b", "#555555", "#9aa021", "#d0742a")
_VERDICTS = {HOLDS: "#2b6b3f", CONTRARY: "#a3261c", EQUIVALENT: "#1f8a8a", UNDECIDED: "#777777"}
_FARTHEST = 12.0  # in logit R_mem: what reaches further ends in an arrow


def draw_verdicts(found: Sequence[Findings]) -> str:
    """Every question's difference in logit R_mem with its 95 % interval and the simultaneous one; the margin of
    equivalence is shaded. Empty where fewer than two questions have one."""
    rows = [
        (answer, answer.estimate.logit, answer.interval("logit"), answer.simultaneous("logit"))
        for each in found
        for answer in each.answers
        if answer.estimate is not None and answer.estimate.logit is not None
    ]
    if len(rows) < 2:
        return ""
    with plot(8.6, 0.8 + 0.36 * len(rows)) as figure:
        axes = figure.add_subplot()
        margins = {answer.question.margin for answer, *_ in rows}
        if len(margins) == 1:
            margin = margins.pop()
            axes.axvspan(-margin, margin, color="#000", alpha=0.06, linewidth=0)
        axes.axvline(0, color="#555", linewidth=0.8)
        shown = [end for _, _, inner, _ in rows if inner is not None for end in inner]
        reach = min(_FARTHEST, 1.15 * max(map(abs, shown)))
        for place, (answer, effect, inner, outer) in enumerate(rows):
            color = _VERDICTS.get(answer.verdict, "#777777")
            for ends, width in ((outer, 0.9), (inner, 2.6)):
                if ends is not None:
                    axes.plot(np.clip(ends, -reach, reach), [place, place], color=color, linewidth=width)
            if outer is not None:
                for end, marker in ((outer[0], "<"), (outer[1], ">")):
                    if abs(end) > reach:
                        axes.plot([math.copysign(reach, end)], [place], marker, color=color, markersize=4)
            filled = color if answer.decided else "white"
            middle = float(np.clip(effect.estimate, -reach, reach))
            axes.plot([middle], [place], "o", color=color, markersize=5, markerfacecolor=filled)
            axes.annotate(
                answer.verdict, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=color
            )
        names = [printable(textwrap.shorten(answer.question.text, 75, placeholder=" …")) for answer, *_ in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(-1.04 * reach, 1.04 * reach)
        axes.set_xlabel("difference in logit R_mem (95 %; thin: simultaneous, for all questions)")
        return svg(figure)


def draw_emm(emm: EMM) -> str:
    """R_mem of every run, the curve that they suggest with its 95 % band, and EMM, as SVG."""
    from matplotlib.ticker import PercentFormatter

    tried = [result.size for result in emm.results]
    low, high = emm.interval
    sizes = np.geomspace(min([*tried, low]) / 1.3, max([*tried, high]) * 1.3, 80)
    band = emm.posterior.curve(sizes)
    with plot(7.2, 4.0) as figure:
        axes = figure.add_subplot()
        axes.fill_between(sizes, band[:, 0], band[:, 2], color="#3866a8", alpha=0.18, linewidth=0)
        axes.plot(sizes, band[:, 1], color="#3866a8", linewidth=1.3, label="expected R_mem, with its 95 % band")
        for censored, marker, label in ((False, "o", "run"), (True, "^", "run ended early: at least this")):
            shown = [result for result in emm.results if result.censored == censored]
            if shown:
                axes.plot(
                    [result.size for result in shown], [result.r_mem for result in shown], marker, color="#1c2430",
                    markersize=4.5, alpha=0.7, label=label,
                )  # fmt: skip
        axes.axvspan(low, high, color="#a3261c", alpha=0.15, linewidth=0, label="EMM, 95 % interval")
        axes.axvline(emm.size, color="#a3261c", linewidth=1.2)
        label = f"R_mem {level(1 - emm.search.zeta)}, at EMM"
        axes.axhline(1 - emm.search.zeta, color="#555", linestyle="--", linewidth=0.8, label=label)
        axes.set_xscale("log")
        _plain_ticks(axes, sizes[[0, -1]])
        axes.set_ylim(-0.03, 1.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("training images N")
        axes.set_ylabel("R_mem")
        figure.legend(loc="outside upper left", ncols=3)
        return svg(figure)


def draw_study(found: Findings, numbers: Mapping[str, Any]) -> str:
    """The study's figure, ours beside the paper's where there is one, as SVG."""
    paper = None if found.study.published is None else numbers.get(found.study.published)
    with plot(8.6 if paper else 5.2, 3.3) as figure:
        panels = figure.subplots(1, 2 if paper else 1, sharey=True, squeeze=False)[0]
        (_curves if found.study.axis == "size" else _levels)(panels[0], found)
        panels[0].set_title("our runs", fontsize=9)
        panels[0].set_ylabel("R_mem")
        if paper:
            _published_curves(panels[1], paper)
            panels[1].set_title("the paper (CIFAR-10)", fontsize=9)
        return svg(figure)


def draw_lengths(found: Findings) -> str:
    """R_mem of every run over its length in epochs, a panel per size, as SVG; a mark where it leveled off. Empty where
    the audits are too few to show that."""
    sizes = [
        size
        for size in found.sizes
        if any(len(result.snapshots) > 2 for cell in found.cells if cell.size == size for result in cell.runs)
    ]
    if not sizes:
        return ""
    with plot(8.6, 2.8 * math.ceil(len(sizes) / 4)) as figure:
        panels = figure.subplots(math.ceil(len(sizes) / 4), min(len(sizes), 4), sharey=True, squeeze=False).flat
        for axes, size in zip(panels, sizes, strict=False):
            for position, variant in enumerate(found.study.variants):
                cell = found.cell(variant.name, size)
                for index, result in enumerate([] if cell is None else cell.runs):
                    color = COLORS[position % len(COLORS)]
                    epochs = [audited.epochs for audited in result.snapshots]
                    shares = [audited.ratio for audited in result.snapshots]
                    label = printable(variant.name) if index == 0 else None
                    axes.plot(
                        epochs, shares, color=color, linewidth=0.9, alpha=0.7, marker=".", markersize=3, label=label
                    )
                    if (end := result.level.epochs) is not None:
                        axes.plot([end], [shares[epochs.index(end)]], "o", color=color, markersize=5, fillstyle="none")
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            ticks = [digit * 10**power for power in range(0, 8) for digit in (1, 2, 5)]
            _plain_ticks(axes, (low, high), [tick for tick in ticks if low <= tick <= high])
            axes.set_title(f"N = {size:,}", fontsize=9)
            axes.set_xlabel("epochs", fontsize=8)
        _finish(panels[0])
        panels[0].set_ylabel("R_mem")
        return svg(figure)


def _curves(axes: Axes, found: Findings) -> None:
    """R_mem over N, a curve per variant, and where each EMM lies."""
    for position, variant in enumerate(found.study.variants):
        cells = [cell for cell in found.cells if cell.variant.name == variant.name]
        if not cells:
            continue
        color = COLORS[position % len(COLORS)]
        _points(axes, [cell.size for cell in cells], cells, color, printable(variant.name))
        if found.study.read_at is not None:
            label = "highest of each run" if position == 0 else None
            highest = [cell.highest for cell in cells]
            axes.plot([cell.size for cell in cells], highest, ":", color=color, linewidth=1.2, label=label)
        if variant.name in found.emm:
            size, (low, high) = found.emm[variant.name]
            axes.plot([low, high], [-0.02 - 0.025 * position] * 2, color=color, linewidth=1.5, clip_on=False)
            axes.plot([size], [-0.02 - 0.025 * position], "|", color=color, markersize=7, clip_on=False)
    axes.axhline(0.9, color="#555", linestyle="--", linewidth=0.8, label="90 %, R_mem at EMM")
    axes.set_xscale("log")
    _plain_ticks(axes, found.sizes, found.sizes if len(found.sizes) <= 8 else None)
    axes.set_xlabel("training images N (bars below: EMM, 95 %)")
    _finish(axes)


def _levels(axes: Axes, found: Findings) -> None:
    """R_mem over the factor, a curve per size."""
    places = {variant.name: position for position, variant in enumerate(found.study.variants)}
    for position, size in enumerate(found.sizes):
        cells = [cell for cell in found.cells if cell.size == size]
        color = COLORS[position % len(COLORS)]
        across = [places[cell.variant.name] for cell in cells]
        _points(axes, across, cells, color, f"N = {size:,}")
        if found.study.read_at is not None:
            label = "highest of each run" if position == 0 else None
            axes.plot(across, [cell.highest for cell in cells], ":", color=color, linewidth=1.2, label=label)
    axes.set_xticks(
        list(places.values()), [printable(name) for name in places], fontsize=8, rotation=20 if len(places) > 5 else 0
    )
    axes.set_xlabel(printable(found.study.factor))
    _finish(axes)


def _points(axes: Axes, x: Sequence[float], cells: Sequence[Any], color: str, label: str) -> None:
    """Means with their intervals, and the single runs where there are several."""
    middle = [cell.r_mem for cell in cells]
    below = [max(0.0, cell.r_mem - cell.interval[0]) for cell in cells]
    above = [max(0.0, cell.interval[1] - cell.r_mem) for cell in cells]
    axes.errorbar(
        x, middle, yerr=(below, above), color=color, marker="o", markersize=3.5, linewidth=1.2, elinewidth=0.8,
        capsize=2, label=label,
    )  # fmt: skip
    runs = [(place, result.r_mem) for place, cell in zip(x, cells, strict=True) if len(cell.results) > 1
            for result in cell.results]  # fmt: skip
    if runs:
        known = "single runs" in axes.get_legend_handles_labels()[1]
        axes.plot(
            *zip(*runs, strict=True), "_", color=color, markersize=7, alpha=0.6, label=None if known else "single runs"
        )


def _published_curves(axes: Axes, paper: Mapping[str, Any]) -> None:
    for position, (name, points) in enumerate(paper["series"].items()):
        numeric = all(key.replace(".", "", 1).isdigit() for key in points) and "kept" not in name
        x = [float(key) for key in points] if numeric else list(points)
        axes.plot(
            x, [value / 100 for value in points.values()], marker="s", markersize=3.5, linewidth=1.2,
            color=COLORS[position % len(COLORS)], label=name,
        )  # fmt: skip
    if paper["log"]:
        axes.set_xscale("log")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(paper["x"])
    _finish(axes)


def _finish(axes: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(min(axes.get_ylim()[0], -0.03), 1.05)
    axes.legend(fontsize=8)


def _plain_ticks(axes: Axes, sizes: Any, ticks: Sequence[float] | None = None) -> None:
    """Sizes as people write them, not as powers of ten, at `ticks` or at round numbers."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

    low, high = min(sizes), max(sizes)
    steps = [digit * 10**power for power in range(0, 8) for digit in (1, 2, 3, 5, 7)]
    if ticks is None:
        ticks = [step for step in steps if low * 0.95 <= step <= high * 1.05]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
