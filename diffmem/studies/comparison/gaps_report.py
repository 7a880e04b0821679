"""A comparison for people and scripts: `compare.html` (one self-contained page), `.json`, `.csv` and `.svg`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from diffmem.atomic_io import check_output_folder
from diffmem.html_report import template, write_report
from diffmem.plotting import data_url, plot, svg
from diffmem.studies.comparison.gaps import MEMORIZED, Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from diffmem.studies.comparison.gaps import Comparison

COLORS = {"training": "#a3261c", "unseen": "#3866a8", "generated": "#8a5a00"}


@dataclass(frozen=True)
class Panel:
    """One image and what was made of it, as data URLs: `rows` of (what, a picture per noise level)."""

    kind: str
    name: str
    image: str
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def write_page(comparison: Comparison, folder: Path) -> Path:
    """Writes the four files into `folder` and returns the page's path."""
    check_output_folder(folder)
    drawing = draw(comparison)
    columns, rows = _table(comparison)
    page = template("diffmem.studies", "compare.html.j2").render(
        comparison=comparison, plot=drawing, panels=_panels(comparison)
    )
    texts = (["" if math.isnan(value) else f"{value:.6g}" for value in row] for row in rows)
    summary = json.dumps(comparison.to_dict(), indent=1, allow_nan=False)
    return write_report(folder, "compare", page=page, drawing=drawing, summary=summary, columns=columns, rows=texts)


def draw(comparison: Comparison) -> str:
    """The gaps against σ, and, with unseen images, the memorization score and the optimum's, as SVG."""
    with plot(7.2, 5.4 if comparison.memorization_score is not None else 3.2) as figure:
        if comparison.memorization_score is None:
            axes = figure.add_subplot()
        else:
            axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.25, 1))
            _draw_scores(comparison, below)
        sigma = comparison.levels
        for kind in comparison.gaps:
            _band(axes, sigma, comparison.gap(kind), COLORS[kind], f"gap on {kind} images")
        reference = comparison.reference("training")
        if reference is not None:
            label = f"gap of the optimum of {comparison.reference_images:,} unseen images"
            axes.plot(sigma, reference.value, color="#5b6675", linestyle="--", linewidth=1, label=label)
        error = comparison.error("training", "optimum").value
        axes.plot(
            sigma, error, color="#5b6675", linestyle=":", linewidth=1, label="the optimum's error on training images"
        )
        least = min(float(comparison.gap(kind).value.min()) for kind in comparison.gaps)
        axes.set_yscale("log")
        axes.set_ylim(max(least, 1e-9) / 3, 3 * comparison.spread)
        axes.set_xscale("log")
        axes.set_ylabel("squared gap per pixel")
        axes.legend(loc="lower right", fontsize=7.5)
        figure.axes[-1].set_xlabel("noise level σ, images in [−1, 1]")
        return svg(figure)


def draw_scores(comparisons: Sequence[Comparison], names: Sequence[str]) -> str:
    """The memorization scores of several models in one plot, as SVG.

    Args:
        comparisons: What `compare` returned.
        names: Names of the curves.
    """
    with plot(7.2, 3.0) as figure:
        axes = figure.add_subplot()
        colors = ("#a3261c", "#3866a8", "#2b6b3f", "#8a5a00", "#6b3fa0", "#1f8a8a")
        for index, (comparison, name) in enumerate(zip(comparisons, names, strict=True)):
            color = colors[index % len(colors)]
            _band(axes, comparison.levels, comparison.memorization_score, color, name)
            axes.plot(
                comparison.levels,
                cast(Curve, comparison.optimal_score).value,
                color=color,
                linestyle="--",
                linewidth=0.9,
            )
        _score_axes(axes)
        axes.plot([], [], color="#5b6675", linestyle="--", linewidth=0.9, label="the optimum in its place")
        axes.set_xlabel("noise level σ, images in [−1, 1]")
        axes.legend(loc="best", fontsize=7.5)
        return svg(figure)


def _draw_scores(comparison: Comparison, axes: Axes) -> None:
    _band(axes, comparison.levels, comparison.memorization_score, COLORS["training"], "memorization score, 1 − E/E′")
    label = "optimal score: the optimum in the model's place"
    axes.plot(
        comparison.levels,
        cast(Curve, comparison.optimal_score).value,
        color="#5b6675",
        linestyle="--",
        linewidth=1,
        label=label,
    )
    found = comparison.memorized_range
    if found is not None:
        outermost = (comparison.levels[0], comparison.levels[-1])
        ends = [last if end is None else end for last, end in zip(outermost, found[:2], strict=True)]
        axes.axvspan(*ends, color=COLORS["training"], alpha=0.08, linewidth=0, label="memorized range")
        if found.high is not None:
            label = f"σ* = {found.high:.3g}"
            axes.annotate(label, (found.high, 0.3), (-4, 0), textcoords="offset points", ha="right", fontsize=8)
    _score_axes(axes)
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7.5)


def _score_axes(axes: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.axhline(
        MEMORIZED, color="#555", linestyle=":", linewidth=0.8, label="8/9: error a third of that on unseen images"
    )
    axes.set_xscale("log")
    axes.set_ylim(-0.12, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("memorization score")


def _band(axes: Axes, sigma: Any, curve: Curve | None, color: str, label: str) -> None:
    assert curve is not None  # what is drawn is there
    axes.fill_between(sigma, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
    axes.plot(sigma, curve.value, color=color, marker="o", markersize=2.5, linewidth=1.2, label=label)


def _table(comparison: Comparison) -> tuple[list[str], list[list[float]]]:
    """A row per noise level."""
    curves: dict[str, Curve] = {}
    for kind in comparison.gaps:
        curves |= {
            f"{kind}_gap": comparison.gap(kind),
            f"{kind}_relative_gap": comparison.relative_gap(kind),
            f"{kind}_model_error": comparison.error(kind),
            f"{kind}_optimum_error": comparison.error(kind, "optimum"),
        }
        if (reference := comparison.reference(kind)) is not None:
            curves[f"{kind}_reference_gap"] = reference
    if comparison.memorization_score is not None:
        curves |= {
            name: getattr(comparison, name) for name in ("memorization_score", "optimal_score", "normalized_score")
        }
    columns = ["sigma", *(f"{name}{end}" for name in curves for end in ("", "_low", "_high"))]
    values = [comparison.levels, *(part for curve in curves.values() for part in curve)]
    return columns, [[float(value) for value in row] for row in zip(*values, strict=True)]


def _panels(comparison: Comparison) -> list[Panel]:
    panels = []
    for example in comparison.examples:
        made = (("noisy", example.noisy), ("network", example.model), ("optimum", example.optimum))
        rows = tuple((what, tuple(data_url(picture) for picture in pictures)) for what, pictures in made)
        panels.append(Panel(example.kind, example.name, data_url(example.image), rows))
    return panels
