"""Studies and searches for people and scripts: one self-contained page, and the same as CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmem.atomic_io import atomic_set, check_output_folder
from diffmem.integrity import NoChecksumError, load_arrays
from diffmem.pages import template, write_texts
from diffmem.pictures import data_url, grid, plot, svg
from diffmem.studies.findings import Findings
from diffmem.studies.measure import GALLERY, Result
from diffmem.studies.run import UNITS
from diffmem.studies.study import Study
from diffmem.text import printable, table
from diffmem.training import differences

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from diffmem.studies.emm import EMM

COLORS = ("#3866a8", "#a3261c", "#2b6b3f", "#8a5a00", "#6b3fa0", "#1f8a8a", "#b0457b", "#555555", "#9aa021", "#d0742a")
SHOWN = 8  # generated images per variant in a gallery
RUN_COLUMNS = (
    "study", "variant", "size", "repetition", "key", "r_mem", "low", "high", "count", "total", "images", "epochs",
    "best_images", "parameters", "training_seconds", "sampling_seconds",
)  # fmt: skip


def published() -> dict[str, Any]:
    """The paper's numbers (`published.json`)."""
    return json.loads((resources.files("diffmem.studies") / "published.json").read_text(encoding="utf-8"))


def write_studies(found: Sequence[Findings], root: Path, folder: Path) -> Path:
    """Writes `report.html`, `runs.csv` and `studies.json` into `folder` and returns the page's path.

    root: the studies' folder, in which galleries lie.
    """
    check_output_folder(folder)
    numbers = published()
    # What all studies note is said once.
    shared = [note for note in found[0].study.notes if all(note in each.study.notes for each in found)] if found else []
    page = template("diffmem.studies", "studies.html.j2").render(
        studies=[_section(each, root, numbers) for each in found],
        shared=shared,
        source=numbers["source"],
        runs=len({result.key for each in found for result in each.results}),
        seconds=sum({result.key: result.seconds for each in found for result in each.results}.values()),
        spread=found[0].cells[0].spread if found and found[0].cells else None,
        versions=next((result.versions for each in found for result in each.results), {}),
    )
    summary = json.dumps([_as_json(each) for each in found], separators=(",", ":")) + "\n"
    runs = _table(RUN_COLUMNS, (row for each in found for row in _rows(each)))
    with atomic_set(folder) as stage:
        write_texts(stage, {"studies.json": summary, "runs.csv": runs, "report.html": page})
    return folder / "report.html"


def write_emm(emm: EMM, folder: Path, running: bool = False) -> Path:
    """Writes `emm.json`, `runs.csv`, `emm.svg` and `report.html` into `folder` and returns the page's path. running:
    the search has not ended; the page says so and reloads itself."""
    check_output_folder(folder)
    drawing = draw_emm(emm)
    columns = (*(name for name in RUN_COLUMNS if name not in ("study", "variant")), "decided", "censored")
    rows = [{**_row(result), "decided": result.decided, "censored": result.censored} for result in emm.results]
    page = template("diffmem.studies", "emm.html.j2").render(emm=emm, plot=drawing, running=running)
    summary = json.dumps(emm.to_dict(), indent=1) + "\n"
    texts = {"emm.json": summary, "runs.csv": _table(columns, rows), "emm.svg": drawing, "report.html": page}
    with atomic_set(folder) as stage:
        write_texts(stage, texts)
    return folder / "report.html"


def draw_emm(emm: EMM) -> str:
    """R_mem of every run, the curve that they suggest with its 95 % band, and EMM, as SVG."""
    from matplotlib.ticker import PercentFormatter

    tried = [result.size for result in emm.results]
    low, high = emm.interval
    sizes = np.geomspace(min([*tried, low]) / 1.3, max([*tried, high]) * 1.3, 80)
    band = emm.posterior.curve(sizes)
    with plot(7.2, 3.6) as figure:
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
        level = f"{1 - emm.search.zeta:.3g}"
        axes.axhline(
            1 - emm.search.zeta, color="#555", linestyle="--", linewidth=0.8, label=f"R_mem {float(level):.0%}, at EMM"
        )
        axes.set_xscale("log")
        _plain_ticks(axes, sizes[[0, -1]])
        axes.set_ylim(-0.03, 1.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("training images N")
        axes.set_ylabel("R_mem")
        axes.legend()
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


def _curves(axes: Axes, found: Findings) -> None:
    """R_mem over N, a curve per variant, and where each EMM lies."""
    for position, variant in enumerate(found.study.variants):
        cells = [cell for cell in found.cells if cell.variant.name == variant.name]
        if not cells:
            continue
        color = COLORS[position % len(COLORS)]
        _points(axes, [cell.size for cell in cells], cells, color, printable(variant.name))
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
        _points(axes, [places[cell.variant.name] for cell in cells], cells, color, f"N = {size:,}")
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
        axes.plot(*zip(*runs, strict=True), "_", color=color, markersize=7, alpha=0.6)


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


def _plain_ticks(axes: Axes, sizes: Sequence[float], ticks: Sequence[float] | None = None) -> None:
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


def _section(found: Findings, root: Path, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of one study."""
    return {
        "found": found,
        "study": found.study,
        "plot": draw_study(found, numbers) if found.cells else "",
        "gallery": _gallery(found, root),
        "setting": json.dumps(found.study.variants[0].setting.to_json(), indent=1),
        "differences": {v.name: _changes(found.study, v.setting.to_json()) for v in found.study.variants},
    }


def _changes(study: Study, setting: Mapping[str, Any]) -> str:
    """In what a variant's setting is not that of the first one, as dotted names."""
    first = study.variants[0].setting.to_json()
    return ", ".join(f"{name} = {json.dumps(ours)}" for name, ours, _ in differences(setting, first))


def _gallery(found: Findings, root: Path) -> list[tuple[str, str, int, int]]:
    """(caption, picture, copies, images) per variant: generated images above the training images nearest to them."""
    pictures = []
    for variant in found.study.variants:
        cells = [cell for cell in found.cells if cell.variant.name == variant.name]
        if not cells:
            continue
        # Where some are copies and some are not, there is most to see.
        cell = min(cells, key=lambda cell: abs(cell.r_mem - 0.5))
        path = root / UNITS / cell.results[0].key / GALLERY
        if not path.exists():
            continue
        try:
            stored = load_arrays(path, "remove it, and the report is made without its pictures")
        except NoChecksumError:
            continue
        generated, nearest, memorized = (stored[name][:SHOWN] for name in ("generated", "nearest", "memorized"))
        # A frame of grey keeps neighbours apart.
        framed = np.pad(np.concatenate([generated, nearest]), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=190)
        picture = np.asarray(grid(framed, scale=1, columns=len(generated)))
        pixels = picture[None] if picture.ndim == 2 else picture.transpose(2, 0, 1)
        pictures.append((f"{variant.name}, N = {cell.size:,}", data_url(pixels), int(memorized.sum()), len(memorized)))
    return pictures


def _rows(found: Findings) -> list[dict[str, Any]]:
    return [
        {"study": found.study.name, "variant": cell.variant.name, **_row(result)}
        for cell in found.cells
        for result in cell.results
    ]


def _row(result: Result) -> dict[str, Any]:
    low, high = result.interval
    numbers = {"r_mem": result.r_mem, "low": low, "high": high, "epochs": result.epochs}
    seconds = {name: f"{getattr(result, name):.1f}" for name in ("training_seconds", "sampling_seconds")}
    return {**vars(result), **{name: f"{value:.6g}" for name, value in numbers.items()}, **seconds}


def _as_json(found: Findings) -> dict[str, Any]:
    return {
        "study": found.study.to_json(),
        "cells": [
            {
                "variant": cell.variant.name,
                "size": cell.size,
                "r_mem": cell.r_mem,
                "interval": list(cell.interval),
                "runs": [result.key for result in cell.results],
            }
            for cell in found.cells
        ],
        "emm": {name: {"emm": size, "interval": list(interval)} for name, (size, interval) in found.emm.items()},
        "claims": [
            {
                "claim": asdict(judged.claim),
                "sizes": list(judged.sizes),
                "difference": judged.difference if judged.sizes else None,
                "interval": list(judged.interval) if judged.sizes else None,
                "verdict": judged.verdict,
            }
            for judged in found.judged
        ],
        "failures": [
            dict(zip(("variant", "size", "repetition", "error"), each, strict=True)) for each in found.failures
        ],
        "missing": found.missing,
    }


def _table(columns: Sequence[str], rows: Any) -> str:
    return table(columns, ([row[name] for name in columns] for row in rows))
