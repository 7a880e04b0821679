"""The audit's report: `report.html` (one self-contained page), `samples.csv` (a row per image) and `report.json`."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmem.atomic_io import atomic_set, check_output_folder
from diffmem.errors import MissingExtraError
from diffmem.histogram import Line, histogram
from diffmem.html_report import template, write_texts
from diffmem.memorization.gallery import Gallery, beside_threshold, most_alike_near, partner, surest_first
from diffmem.text import cell, write_columns

if TYPE_CHECKING:
    import pandas

    from diffmem.memorization.result import Audit

GALLERY_ROWS = 120  # triples shown, most certain copies first
SUMMARY_ROWS = 4  # triples shown in a notebook
BORDER_ROWS = 12  # triples shown on each side of the threshold
NEAR_ROWS = 60  # images shown that are near
SOURCE_ROWS, COPIES_SHOWN = 24, 6  # training images shown with their copies, and copies of each
FALSE_DISCOVERIES = 0.1  # the share of false copies for which the count is told


def write_report(audit: Audit, folder: str | Path) -> Path:
    """Write the three files into `folder` (made if need be), together, and return the path of `report.html`."""
    folder = check_output_folder(folder)
    with atomic_set(folder) as stage, ThreadPoolExecutor(1) as pool:
        page = pool.submit(render, audit)  # which waits for the pictures' alignment and compression in between
        summary = json.dumps(audit.to_dict(), separators=(",", ":"))
        with open(stage / "samples.csv", "w", encoding="utf-8", newline="") as file:
            write_columns(file, columns(audit))
        write_texts(stage, {"report.json": summary, "report.html": page.result()})
    return folder / "report.html"


def columns(audit: Audit) -> dict[str, list[Any]]:
    """The columns of `samples.csv`, an entry per generated image: numbers, and text for a CSV file (`cell`). Distances
    in the units of the images; rms in the same units per value."""
    neighbors, training, look = audit.neighbors, audit.training, audit.look

    def fixed(values: np.ndarray, form: str = "%.6f") -> list[str]:
        return [form % value for value in values.tolist()]

    def flags(values: np.ndarray) -> list[int]:
        return values.astype(np.int64).tolist()

    def names(indices: np.ndarray) -> list[str]:
        return [cell(training.name(index)) for index in indices.tolist()]

    table: dict[str, list[Any]] = {
        "index": list(range(audit.total)),
        "name": [cell(audit.generated.name(row)) for row in range(audit.total)],
        "memorized": flags(audit.memorized),
        "raw_memorized": flags(audit.raw_memorized),
        "published_memorized": flags(audit.published_memorized),
        "d1_over_d2": fixed(audit.distance_ratios),
        "verdict": audit.verdicts,
        "score": fixed(audit.scores),
    }
    if audit.calibration is not None:
        table |= {"p_value": fixed(audit.p_values, "%.6g"), "q_value": fixed(audit.q_values, "%.6g")}
    distances, rms = neighbors.distances, neighbors.rms
    for column, which in enumerate(("nearest", "second")):
        indices = neighbors.indices[:, column]
        table |= {f"{which}_index": indices.tolist(), f"{which}_name": names(indices)}
        table |= {f"{which}_distance": fixed(distances[:, column]), f"{which}_rms": fixed(rms[:, column])}
        table[f"{which}_squared_distance"] = neighbors.squared_distances[:, column].tolist()
    for column, which in enumerate(("nearest", "second")):
        if neighbors.mirrored is not None:
            table[f"{which}_mirrored"] = flags(neighbors.mirrored[:, column])
    for column, which in enumerate(("nearest", "second")):
        if training.labels is not None and training.labels.ndim == 1:
            table[f"{which}_label"] = training.labels[neighbors.indices[:, column]].tolist()
    if look is not None:
        seen = look.scores == look.scores
        seen_only = {
            "aligned_index": look.indices.tolist(),
            "aligned_name": names(look.indices),
            "aligned_residual": fixed(look.residuals),
            "aligned_score": fixed(look.scores),
        }
        for name, values in seen_only.items():
            table[name] = [value if shown else "" for value, shown in zip(values, seen.tolist(), strict=True)]
    return table


def frame(audit: Audit) -> pandas.DataFrame:
    """The table of `samples.csv` as a data frame."""
    try:
        import pandas
    except ImportError:
        raise MissingExtraError("pandas", "pandas", "a data frame") from None
    neighbors, training = audit.neighbors, audit.training
    table: dict[str, Any] = {
        "index": np.arange(audit.total),
        "name": [audit.generated.name(row) for row in range(audit.total)],
        "memorized": audit.memorized,
        "raw_memorized": audit.raw_memorized,
        "published_memorized": audit.published_memorized,
        "d1_over_d2": audit.distance_ratios,
        "verdict": audit.verdicts,
        "score": audit.scores,
    }
    if audit.calibration is not None:
        table |= {"p_value": audit.p_values, "q_value": audit.q_values}
    for column, which in enumerate(("nearest", "second")):
        indices = neighbors.indices[:, column]
        table |= {f"{which}_index": indices, f"{which}_name": [training.name(int(index)) for index in indices]}
        table |= {f"{which}_distance": neighbors.distances[:, column], f"{which}_rms": neighbors.rms[:, column]}
        table[f"{which}_squared_distance"] = neighbors.squared_distances[:, column]
        if neighbors.mirrored is not None:
            table[f"{which}_mirrored"] = neighbors.mirrored[:, column]
        if training.labels is not None and training.labels.ndim == 1:
            table[f"{which}_label"] = training.labels[indices]
    if audit.look is not None:
        table |= {"aligned_index": audit.look.indices, "aligned_residual": audit.look.residuals}
        table |= {"aligned_score": audit.look.scores}
        table["aligned_name"] = [training.name(int(index)) for index in audit.look.indices]
    return pandas.DataFrame(table)[list(columns(audit))]


def render_summary(audit: Audit) -> str:
    """The verdict and the most certain copies as a fragment of a page."""
    triples = Gallery(audit).triples([int(row) for row in surest_first(audit)[:SUMMARY_ROWS]])
    return template("diffmem.memorization", "summary.html.j2").render(audit=audit, triples=triples)


def render(audit: Audit) -> str:
    """The page, as one string."""
    gallery, order = Gallery(audit), surest_first(audit)
    # Rows and training images that the page shows if there is room.
    border_rows, near_rows = beside_threshold(audit, BORDER_ROWS), most_alike_near(audit, NEAR_ROWS)
    surest_rows, copies = order[:GALLERY_ROWS].tolist(), _copies_by_source(audit, order)
    copied = [(source, copies[source.index][:COPIES_SHOWN]) for source in audit.sources[:SOURCE_ROWS]]
    groups = [(len(group), [int(index) for index in group[:8]]) for group in audit.duplicates[:16]]
    rows = [*near_rows, *surest_rows, *border_rows, *(row for _, some in copied for row in some)]
    gallery.read_ahead([
        *(partner(audit, row) for row in rows), *(source.index for source, _ in copied),
        *(index for _, some in groups for index in some),
    ])  # fmt: skip
    # The pictures of the least sections are taken first: a gallery of large images must not starve them.
    duplicates = [
        (size, [(audit.training.name(index), gallery.training(index)) for index in some]) for size, some in groups
    ]
    border, near = gallery.triples(border_rows), gallery.triples(near_rows)
    sources = []
    for source, some in copied:
        picture = gallery.training(source.index)
        shown = gallery.triples(some) if picture else []
        if shown:
            sources.append((source, picture, shown))
    surest = gallery.triples(surest_rows)

    return template("diffmem.memorization", "report.html.j2").render(
        audit=audit,
        unit=_unit(audit),
        gallery=surest,
        near=near,
        border=border,
        sources=sources,
        duplicates=duplicates,
        missing=gallery.missing,
        false_discoveries=FALSE_DISCOVERIES,
        d1_histogram=_histogram(audit, _distances, _distance_name(audit), None),
        ratio_histogram=_histogram(audit, lambda a: a.scores, audit.rule.score_name, audit.score_threshold),
    )


def _unit(audit: Audit) -> str:
    """What distances are measured in."""
    if audit.rule.features == "pixels":
        return "gray levels" if audit.settings["generated"]["dtype"] == "uint8" else "units of the images"
    return {"hamming": "bits", "aligned": "residuals"}.get(audit.rule.metric, "units of the features")


def _distances(audit: Audit) -> np.ndarray:
    pixels = audit.rule.features == "pixels"
    if audit.rule.metric == "hamming":
        return audit.neighbors.squared_distances[:, 0].astype(np.float64)
    return audit.neighbors.rms[:, 0] if pixels else audit.neighbors.distances[:, 0]


def _distance_name(audit: Audit) -> str:
    return {
        "hamming": "bits that differ from the nearest training image's",
        "aligned": "residual to the nearest training image",
        "cosine": "distance to the nearest training image's unit vector",
    }.get(
        audit.rule.metric,
        "distance to the nearest training image" + (", rms" if audit.rule.features == "pixels" else ""),
    )


def _copies_by_source(audit: Audit, order: np.ndarray) -> dict[int, list[int]]:
    """The copies of each training image, most certain first."""
    found: dict[int, list[int]] = {}
    for row in order[audit.memorized[order]].tolist():
        found.setdefault(int(audit.neighbors.indices[row, 0]), []).append(row)
    return found


def _threshold_text(audit: Audit) -> str:
    return str(audit.rule.threshold) if audit.rule.name == "ratio" else f"{audit.score_threshold:.4g}"


def _histogram(audit: Audit, values: Callable[[Audit], np.ndarray], label: str, threshold: float | None) -> str:
    """An SVG histogram of the generated images, and of the unseen ones where there are any."""
    ours = values(audit)
    unseen = None if audit.holdout is None else values(audit.holdout)
    largest = max(float(ours.max()), 0.0 if unseen is None else float(unseen.max())) or 1.0
    # d1/d2 and the like end at 1; other scores where the images do.
    highest = 1.0 if threshold is not None and largest <= 1 and threshold <= 1 else largest
    # With a threshold, one of the bins' edges is put on it, so that no bar straddles it.
    edges = np.linspace(0, highest, 61)
    if threshold is not None and 0 < threshold < highest:
        left = max(1, round(60 * threshold / highest))
        edges = np.concatenate([np.linspace(0, threshold, left + 1), np.linspace(threshold, highest, 61 - left)[1:]])
    few = 0 < audit.ratio < 0.02
    return histogram(
        ours,
        edges,
        label,
        others=unseen,
        others_name="unseen real images",
        line=None if threshold is None else Line(threshold, f"threshold {_threshold_text(audit)}"),
        log=few,
    )
