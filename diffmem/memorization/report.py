"""The audit's report: `report.html` (one self-contained page), `samples.csv` (a row per image) and `report.json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmem.atomic_io import atomic_set, check_output_folder
from diffmem.data import ImageSet
from diffmem.errors import MissingExtraError
from diffmem.html_report import template, write_texts
from diffmem.memorization.criteria import parse_threshold
from diffmem.plotting import data_url, plot, svg
from diffmem.text import write_table

if TYPE_CHECKING:
    import pandas

    from diffmem.memorization.result import Audit

GALLERY_ROWS = 120  # triples shown, surest copies first
SUMMARY_ROWS = 4  # triples shown in a notebook
BORDER_ROWS = 12  # triples shown on each side of the threshold
PICTURE_BUDGET = 3_600_000  # bytes of embedded pictures, so that the page stays below 5 MB whatever the images are


def write_report(audit: Audit, folder: str | Path) -> Path:
    """Write the three files into `folder` (made if need be), together, and return the path of `report.html`."""
    folder = check_output_folder(folder)
    with atomic_set(folder) as stage:
        summary = json.dumps(audit.to_dict(), separators=(",", ":"))
        write_texts(stage, {"report.json": summary, "report.html": render(audit)})
        with open(stage / "samples.csv", "w", encoding="utf-8", newline="") as file:
            write_table(file, columns(audit), rows(audit))
    return folder / "report.html"


def columns(audit: Audit) -> list[str]:
    """The columns of `samples.csv`."""
    neighbors, training = audit.neighbors, audit.training
    header = ["index", "name", "memorized", "raw_memorized", "published_memorized", "d1_over_d2"]
    for which in ("nearest", "second"):
        header += [f"{which}_{column}" for column in ("index", "name", "distance", "rms", "squared_distance")]
    if neighbors.mirrored is not None:
        header += ["nearest_mirrored", "second_mirrored"]
    if training.labels is not None and training.labels.ndim == 1:
        header += ["nearest_label", "second_label"]
    return header


def rows(audit: Audit) -> Iterator[list[Any]]:
    """One row per generated image. Distances in the units of the images; rms in the same units per value."""
    neighbors, training = audit.neighbors, audit.training
    ratios, distances, rms = audit.distance_ratios, neighbors.distances, neighbors.rms
    published = audit.published_memorized
    for row in range(audit.total):
        fields = [
            row,
            audit.generated.name(row),
            int(audit.memorized[row]),
            int(audit.raw_memorized[row]),
            int(published[row]),
            f"{ratios[row]:.6f}",
        ]
        for column in (0, 1):
            index = int(neighbors.indices[row, column])
            fields += [index, training.name(index), f"{distances[row, column]:.6f}", f"{rms[row, column]:.6f}"]
            fields += [neighbors.squared_distances[row, column]]
        if neighbors.mirrored is not None:
            fields += neighbors.mirrored[row].astype(int).tolist()
        if training.labels is not None and training.labels.ndim == 1:
            fields += training.labels[neighbors.indices[row]].tolist()
        yield fields


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
    }
    for column, which in enumerate(("nearest", "second")):
        indices = neighbors.indices[:, column]
        table |= {f"{which}_index": indices, f"{which}_name": [training.name(int(index)) for index in indices]}
        table |= {f"{which}_distance": neighbors.distances[:, column], f"{which}_rms": neighbors.rms[:, column]}
        table[f"{which}_squared_distance"] = neighbors.squared_distances[:, column]
        if neighbors.mirrored is not None:
            table[f"{which}_mirrored"] = neighbors.mirrored[:, column]
        if training.labels is not None and training.labels.ndim == 1:
            table[f"{which}_label"] = training.labels[indices]
    return pandas.DataFrame(table)[columns(audit)]


def render_summary(audit: Audit) -> str:
    """The verdict and the surest copies as a fragment of a page."""
    pictures = _Pictures(audit)
    order = np.argsort(audit.distance_ratios, kind="stable")
    triples = _triples(audit, [int(row) for row in order[:SUMMARY_ROWS]], pictures)
    return template("diffmem.memorization", "summary.html.j2").render(audit=audit, triples=triples)


@dataclass(frozen=True)
class _Triple:
    """One line of the gallery."""

    row: int
    name: str
    memorized: bool
    ratio: float
    pictures: tuple[str, str, str]
    names: tuple[str, str, str]
    rms: tuple[float, float]
    mirrored: tuple[bool, bool]


def render(audit: Audit) -> str:
    """The page, as one string."""
    pictures = _Pictures(audit)
    order = np.argsort(audit.distance_ratios, kind="stable")
    # The pictures of the least sections are taken first: a gallery of large images must not starve them.
    sources = [
        (source, pictures.training(source.index), _copies_of(audit, source.index, order))
        for source in audit.sources[:24]
    ]
    sources = [
        (source, picture, [pictures.generated(row) for row in rows[:6]]) for source, picture, rows in sources if picture
    ]
    duplicates = [
        (len(group), [(audit.training.name(i), pictures.training(int(i))) for i in group[:8]])
        for group in audit.duplicates[:16]
    ]
    border = _border(audit, order)
    border_triples = _triples(audit, border, pictures)
    gallery = _triples(audit, [int(row) for row in order[:GALLERY_ROWS]], pictures)

    return template("diffmem.memorization", "report.html.j2").render(
        audit=audit,
        unit="gray levels" if audit.settings["generated"]["dtype"] == "uint8" else "units of the images",
        gallery=gallery,
        border=border_triples,
        sources=sources,
        duplicates=duplicates,
        d1_histogram=_histogram(
            audit, lambda a: a.neighbors.rms[:, 0], "distance to the nearest training image, rms", None
        ),
        ratio_histogram=_histogram(
            audit, lambda a: a.distance_ratios, "d1 / d2", float(parse_threshold(audit.settings["threshold"]))
        ),
    )


def _copies_of(audit: Audit, index: int, order: np.ndarray) -> list[int]:
    return [int(row) for row in order if audit.memorized[row] and audit.neighbors.indices[row, 0] == index]


def _border(audit: Audit, order: np.ndarray) -> list[int]:
    """The images just below and just above the threshold, where a person should look twice."""
    below, above = order[audit.memorized[order]], order[~audit.memorized[order]]
    return [int(row) for row in (*below[-BORDER_ROWS:], *above[:BORDER_ROWS])]


def _triples(audit: Audit, rows: list[int], pictures: _Pictures) -> list[_Triple]:
    triples = []
    for row in rows:
        first, second = (int(index) for index in audit.neighbors.indices[row])
        shown = (pictures.generated(row), pictures.training(first), pictures.training(second))
        if not all(shown):
            break  # the page is full
        flags = (False, False) if audit.neighbors.mirrored is None else tuple(map(bool, audit.neighbors.mirrored[row]))
        triples.append(
            _Triple(
                row=row,
                name=audit.generated.name(row),
                memorized=bool(audit.memorized[row]),
                ratio=float(audit.distance_ratios[row]),
                pictures=shown,
                names=(audit.generated.name(row), audit.training.name(first), audit.training.name(second)),
                rms=tuple(map(float, audit.neighbors.rms[row])),
                mirrored=flags,
            )
        )
    return triples


class _Pictures:
    """Images as data URLs, each encoded once, until the budget of the page is spent (then None)."""

    def __init__(self, audit: Audit) -> None:
        self.audit = audit
        self.left = PICTURE_BUDGET
        self.encoded: dict[tuple[str, int], str] = {}
        self.scale = _float_scale(audit.training)

    def generated(self, row: int) -> str | None:
        if not isinstance(self.audit.generated, ImageSet):
            return None  # they were not kept
        return self._picture("generated", self.audit.generated, row)

    def training(self, index: int) -> str | None:
        return self._picture("training", self.audit.training, index)

    def _picture(self, kind: str, images: ImageSet, index: int) -> str | None:
        key = (kind, index)
        if key not in self.encoded:
            url = self._encode(images.images[index])
            if len(url) > self.left:
                return None
            self.encoded[key] = url
        # A picture that is shown again is embedded again: its bytes count each time.
        if len(self.encoded[key]) > self.left:
            return None
        self.left -= len(self.encoded[key])
        return self.encoded[key]

    def _encode(self, image: np.ndarray) -> str:
        if image.dtype != np.uint8:
            low, high = self.scale
            image = np.clip((image - low) / (high - low) * 255, 0, 255).round().astype(np.uint8)
        return data_url(image)


def _float_scale(training: ImageSet) -> tuple[float, float]:
    """The values shown as black and white, for float images: [0, 1] or [-1, 1] where they fit, else their own range."""
    if training.images.dtype == np.uint8:
        return 0.0, 255.0
    low, high = float(training.images.min()), float(training.images.max())
    for candidate in ((0.0, 1.0), (-1.0, 1.0)):
        if candidate[0] <= low and high <= candidate[1]:
            return candidate
    return low, max(high, low + 1e-12)


def _histogram(audit: Audit, values: Callable[[Audit], np.ndarray], label: str, threshold: float | None) -> str:
    """An SVG histogram of the generated images, and of the unseen ones where there are any."""
    ours = values(audit)
    unseen = None if audit.holdout is None else values(audit.holdout)
    highest = (
        1.0 if threshold is not None else max(float(ours.max()), 0.0 if unseen is None else float(unseen.max())) or 1.0
    )
    # With a threshold, one of the bins' edges is put on it, so that no bar straddles it.
    edges = np.linspace(0, highest, 61)
    if threshold is not None and threshold < 1:
        left = max(1, round(60 * threshold))
        edges = np.concatenate([np.linspace(0, threshold, left + 1), np.linspace(threshold, 1, 61 - left)[1:]])
    few = 0 < audit.ratio < 0.02
    with plot() as figure:
        axes = figure.add_subplot()
        axes.hist(ours, edges, weights=np.full(len(ours), 1 / len(ours)), color="#3866a8", label="generated")
        if unseen is not None:
            weights = np.full(len(unseen), 1 / len(unseen))
            axes.hist(
                unseen,
                edges,
                weights=weights,
                histtype="step",
                color="#c2571a",
                linewidth=1.4,
                label="unseen real images",
            )
        if threshold is not None:
            axes.axvline(
                threshold, color="#a11", linestyle="--", linewidth=1, label=f"threshold {audit.settings['threshold']}"
            )
        if few:
            axes.set_yscale("log")
        axes.set_xlim(0, highest)
        axes.set_xlabel(label)
        axes.set_ylabel("share of images" + (" (log scale)" if few else ""))
        if unseen is not None or threshold is not None:
            axes.legend()
        return svg(figure)
