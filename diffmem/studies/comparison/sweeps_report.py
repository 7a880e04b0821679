"""A sweep for people and scripts: `sweep.html` (one self-contained page), `.json`, `.csv`, `.svg`, and a grid of images
per kind of regularization (`tikhonov.png` …)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffmem.atomic_io import check_output_folder
from diffmem.html_report import template, write_report
from diffmem.plotting import grid, picture_url, plot, svg
from diffmem.studies.comparison.sweeps import SweepPoint, expected_ratio, with_strength

if TYPE_CHECKING:
    from PIL import Image

    from diffmem.studies.comparison.sweeps import Sweep

NAMES = {
    "tikhonov": "Tikhonov: score (ȳ − x)/(σ² + c)",
    "bayes": "Empirical Bayes: weights' sum at least τ",
    "smooth": "Smoothed data: bandwidth h",
}
SYMBOLS = {"tikhonov": "c", "bayes": "ln τ", "smooth": "h"}
COLORS = ("#a3261c", "#3866a8", "#2b6b3f", "#8a5a00")
COLUMNS = ("kind", "strength", "count", "total", "ratio", "low", "high", "expected", "mean_distance")
_COPY, _NONE = (163, 38, 28), (255, 255, 255)  # frames around copies and other images
_LEAST = 32  # pixels that an image takes in a grid


@dataclass(frozen=True)
class Section:
    """One kind of regularization on the page: the points, each with its images as a data URL."""

    kind: str
    name: str
    symbol: str
    half: float | None
    points: tuple[tuple[SweepPoint, float, str], ...]


def write_page(sweep: Sweep, folder: Path) -> Path:
    """Writes the files into `folder` and returns the page's path."""
    check_output_folder(folder)
    drawing = draw([sweep])
    sections = [
        Section(
            kind,
            NAMES[kind],
            SYMBOLS[kind],
            sweep.half(kind),
            tuple((point, sweep.expected(point.variant), picture_url(images_of([point]))) for point in sweep.of(kind)),
        )
        for kind in sweep.kinds
    ]
    page = template("diffmem.studies", "sweep.html.j2").render(sweep=sweep, plot=drawing, sections=sections)
    rows = []
    for point in sweep.points:
        shares = (f"{value:.6g}" for value in (point.ratio, *point.interval, sweep.expected(point.variant)))
        distance = f"{point.mean_distance:.6g}"
        rows.append((point.kind, f"{point.strength:.8g}", point.count, point.total, *shares, distance))
    summary = json.dumps(sweep.to_dict(), indent=1, allow_nan=False)
    return write_report(
        folder, "sweep", page=page, drawing=drawing, summary=summary, columns=COLUMNS, rows=rows,
        pictures={f"{kind}.png": images_of(sweep.of(kind)) for kind in sweep.kinds},
    )  # fmt: skip


def draw(sweeps: Sequence[Sweep], names: Sequence[str] = ()) -> str:
    """R_mem with its intervals against c, ln τ and h, a panel per kind, and what `expected_ratio` says (dashed), as
    SVG.

    Args:
        sweeps: What `sweep` returned. ln τ is drawn in units of d/2, so that sets of images of different size share an
            axis.
        names: Names of several sweeps, to tell them apart.
    """
    from matplotlib.ticker import PercentFormatter

    kinds = [kind for kind in NAMES if any(kind in sweep.kinds for sweep in sweeps)]
    with plot(1.2 + 2.9 * len(kinds), 3.0) as figure:
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for kind, axes in zip(kinds, panels, strict=True):
            for index, sweep in enumerate(sweeps):
                points = sweep.of(kind)
                # ln τ/(−d/2), so that it grows to the left
                scale = -2 / sweep.training.dimension if kind == "bayes" else 1.0
                shown = [point for point in points if kind == "bayes" or point.strength > 0]
                if not shown:
                    continue
                color, at = COLORS[index % len(COLORS)], [scale * point.strength for point in shown]
                low, high = zip(*(point.interval for point in shown), strict=True)
                ratios = np.array([point.ratio for point in shown])
                axes.errorbar(
                    at, ratios, yerr=(ratios - low, np.array(high) - ratios), color=color, marker="o", markersize=3.5,
                    linewidth=1.3, elinewidth=0.8, capsize=2, label=names[index] if names else "R_mem",
                )  # fmt: skip
                ends = (min(at), max(at))
                fine = np.linspace(*ends, 200) if kind == "bayes" else np.geomspace(*ends, 200)
                expected = [
                    expected_ratio(with_strength(kind, value / scale), sweep.spacing, sweep.training.dimension)
                    for value in fine.tolist()
                ]
                axes.plot(fine, expected, color=color, linestyle="--", linewidth=0.9, zorder=1)
            if kind == "bayes":
                axes.invert_xaxis()
                axes.set_xlabel("ln τ / (−d/2)")
            else:
                axes.set_xscale("log")
                axes.set_xlabel(SYMBOLS[kind])
            axes.set_title(NAMES[kind].partition(":")[0], fontsize=9)
        color = "#5b6675" if names else COLORS[0]
        panels[0].plot([], [], color=color, linestyle="--", linewidth=0.9, label="expected R_mem")
        panels[0].set_ylim(-0.03, 1.03)
        panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
        panels[0].set_ylabel("R_mem, share of copies")
        panels[0].legend(loc="lower left", fontsize=7.5)
        return svg(figure)


def images_of(points: Sequence[SweepPoint]) -> Image.Image:
    """The first images of each point, a row per point, copies in a red frame."""
    shown = [point.evaluation for point in points]
    columns = max(len(each.images) for each in shown)
    cells = []
    for each in shown:
        framed = _framed(each.images, each.memorized[each.records.image_rows])
        blank = np.full((columns - len(framed), *framed.shape[1:]), 255, np.uint8)
        cells.append(np.concatenate([framed, blank]))
    return grid(np.concatenate(cells), scale=1, columns=columns)


def _framed(images: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Images (n, C, H, W) uint8, small ones enlarged, as RGB in a frame of two pixels."""
    scale = -(-_LEAST // max(images.shape[2:]))
    large = images.repeat(scale, axis=2).repeat(scale, axis=3)
    large = large.repeat(3, axis=1) if large.shape[1] < 3 else large[:, :3]
    framed = np.empty((len(large), 3, large.shape[2] + 4, large.shape[3] + 4), np.uint8)
    framed[:] = np.where(copies[:, None], _COPY, _NONE).astype(np.uint8)[:, :, None, None]
    framed[:, :, 2:-2, 2:-2] = large
    return framed
