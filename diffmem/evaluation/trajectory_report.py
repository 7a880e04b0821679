"""A trajectory for people and scripts: `trajectory.html` (one self-contained page), `.json`, `.csv` and `.svg`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from diffmem.atomic_io import check_output_folder
from diffmem.html_report import level, template, write_report
from diffmem.plotting import data_url, plot, svg

if TYPE_CHECKING:
    from diffmem.evaluation.trajectories import Trajectory

GALLERY = 24  # first copies shown
COLUMNS = ("images", "epochs", "loss", "count", "total", "ratio", "low", "high", "answer")
GAP_COLUMNS = ("relative_loss_gap", "loss_gap_p")  # over all noise levels


@dataclass(frozen=True)
class FirstCopy:
    """A copy at the first snapshot that shows it: the images as data URLs."""

    epochs: float
    seed: int
    ratio: float
    generated: str
    training: str
    name: str


def write_page(trajectory: Trajectory, folder: Path) -> Path:
    """Writes the four files into `folder` and returns the page's path."""
    check_output_folder(folder)
    drawing = draw([trajectory])
    page = template("diffmem.evaluation", "trajectory.html.j2").render(
        trajectory=trajectory, plot=drawing, copies=first_copies(trajectory), onset=trajectory.onset()
    )
    rows = []
    for point in trajectory.points:
        low, high = point.interval
        numbers = (f"{point.epochs:.6g}", f"{point.loss:.6g}", point.count, point.total)
        answer = "" if point.answer is None else str(point.answer).lower()
        row = (point.images, *numbers, f"{point.ratio:.6g}", f"{low:.6g}", f"{high:.6g}", answer)
        rows.append(row if point.gap is None else (*row, f"{point.gap.relative:.6g}", f"{point.gap.p:.6g}"))
    columns = COLUMNS if trajectory.points[0].gap is None else (*COLUMNS, *GAP_COLUMNS)
    summary = json.dumps(trajectory.to_dict(), indent=1)
    return write_report(folder, "trajectory", page=page, drawing=drawing, summary=summary, columns=columns, rows=rows)


def draw(trajectories: Sequence[Trajectory], names: Sequence[str] = ()) -> str:
    """R_mem with its intervals, and the training loss, as SVG: of one run against epochs; of several against the images
    seen, the measure of what they cost.

    Args:
        trajectories: What `trajectory` returned.
        names: Names of several runs, to tell them apart.
    """
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    along = attrgetter("images" if names else "epochs")
    colors = ("#a3261c", "#3866a8", "#2b6b3f", "#8a5a00")
    with plot(7.2, 3.4) as figure:
        axes = figure.add_subplot()
        losses = axes.twinx()
        losses.spines["right"].set_visible(True)
        for index, one in enumerate(trajectories):
            color = colors[index % len(colors)]
            label = names[index] if names else "R_mem, with 95 % intervals"
            seen, ratios = [along(point) for point in one.points], [point.ratio for point in one.points]
            ends = [p.interval for p in one.points]
            below = [ratio - low for ratio, (low, _) in zip(ratios, ends, strict=True)]
            above = [high - ratio for ratio, (_, high) in zip(ratios, ends, strict=True)]
            axes.errorbar(
                seen, ratios, yerr=(below, above), color=color, marker="o", markersize=3.5, linewidth=1.3,
                elinewidth=0.8, capsize=2, label=label, zorder=3,
            )  # fmt: skip
            if one.points[0].gap is not None:
                gaps = [0.0 if point.gap is None else point.gap.relative for point in one.points]
                shown = None if names else "relative loss gap"
                axes.plot(seen, gaps, color="#2b6b3f", linestyle="--", linewidth=1.2, label=shown, zorder=2)
            # The first epochs' losses are large: they would flatten all that follows.
            lines = [line for line in one.losses if line.epochs >= 0.02 * one.losses[-1].epochs]
            losses.plot(
                [along(line) for line in lines], [line.loss for line in lines], linewidth=0.7, zorder=1,
                color=color if names else "#8a94a0", alpha=0.45 if names else 1.0,
                label=None if names else "training loss",
            )  # fmt: skip
            if one.test is not None and index == 0:
                asked = f"R_mem {level(one.test.at_least)}, tested for"
                axes.axhline(one.test.at_least, color="#555", linestyle="--", linewidth=0.8, label=asked)
        if names:
            losses.plot([], [], linewidth=0.7, color="#5b6675", label="training loss (thin)")
        axes.set_zorder(losses.get_zorder() + 1)
        axes.patch.set_visible(False)
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlim(left=0)
        axes.set_xlabel("images seen in training" if names else "epochs")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.set_ylabel("R_mem, share of copies")
        losses.set_ylabel("training loss per pixel")
        handles = [drawn for each in (axes, losses) for drawn in zip(*each.get_legend_handles_labels(), strict=True)]
        figure.legend(*zip(*handles, strict=True), loc="outside upper left", ncols=3)
        return svg(figure)


def first_copies(trajectory: Trajectory) -> list[FirstCopy]:
    """The first copy of each training image, in the order in which they came up, at most `GALLERY`."""
    found: dict[int, FirstCopy] = {}
    training = trajectory.training
    for point in trajectory.points:
        shown = point.evaluation
        for image, row in zip(shown.images, shown.records.image_rows.tolist(), strict=True):
            index = int(shown.nearest[row])
            if index in found or len(found) >= GALLERY:
                continue
            pictures = data_url(image), data_url(training.images[index])
            found[index] = FirstCopy(
                point.epochs, int(shown.seeds[row]), float(shown.ratios[row]), *pictures, name=training.name(index)
            )
    return list(found.values())
