"""What `Measures` look like: a page, two tables and a data frame."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmem.atomic_io import atomic_set, check_output_folder
from diffmem.errors import MissingExtraError
from diffmem.histogram import histogram
from diffmem.html_report import percent, template, write_texts
from diffmem.memorization.criteria import CRITERIA
from diffmem.plotting import data_url
from diffmem.text import write_table

if TYPE_CHECKING:
    import pandas

    from diffmem.memorization.measures import Measures

GALLERY = 24
# The scores that are drawn, with what is written below them.
SCORES = {
    "distance_ratio": "d1 / d2",
    "calibrated_l2": "calibrated L2",
    "nearest_distance": "d1, distance to the nearest training image",
    "tile_max": "tile maximum",
    "top1_similarity": "largest cosine",
}
HINTS = {
    "higher": "higher is less copying",
    "lower": "lower is less copying",
    "zero": "0 means no copying, far below 0 means copying",
    "half": "the value of unseen images means no copying, above it means copying",
    "neither": "",
}


def frame(found: Measures, per_image: bool) -> pandas.DataFrame:
    """The table of values, or that of the images."""
    try:
        import pandas
    except ImportError:
        raise MissingExtraError("pandas", "pandas", "a data frame") from None
    if not per_image:
        return pandas.DataFrame(found.columns()).set_index("name")
    count = found.settings["generated"]["images"]
    names = pandas.Index([found.name(row) for row in range(count)], name="image")
    return pandas.DataFrame(found.per_image, index=names)


def write(found: Measures, folder: str | Path) -> Path:
    """Writes page and tables into `folder`, together, and returns the path of the page."""
    folder = check_output_folder(folder)
    with atomic_set(folder) as stage:
        write_texts(stage, {"measures.json": found.to_json() + "\n", "measures.html": render(found)})
        table = found.columns()
        with open(stage / "measures.csv", "w", encoding="utf-8", newline="") as file:
            write_table(
                file, list(table), ([_cell(value) for value in row] for row in zip(*table.values(), strict=True))
            )
        with open(stage / "images.csv", "w", encoding="utf-8", newline="") as file:
            write_table(file, ["index", "name", *found.per_image], _image_rows(found))
    return folder / "measures.html"


def _cell(value: Any) -> Any:
    return "" if value is None else int(value) if isinstance(value, bool) else value


def _image_rows(found: Measures) -> Iterator[list[Any]]:
    arrays = [values.astype(int) if values.dtype == bool else values for values in found.per_image.values()]
    for row in range(found.settings["generated"]["images"]):
        yield [row, found.name(row), *(values[row] for values in arrays)]


def shown(value: float | None, share: bool) -> str:
    """A value as pages and the terminal write it."""
    if value is None or np.isnan(value):
        return "–"
    return percent(value) if share else f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def lines(found: Measures) -> list[dict[str, Any]]:
    """The table of values, a line each, as people read it."""
    table = found.columns()
    made = []
    for row in range(len(table["name"])):
        one = {name: column[row] for name, column in table.items()}
        share = one["share"]
        made.append(
            {
                **one,
                "shown": shown(one["value"], share),
                "interval": "" if one["low"] is None else f"{shown(one['low'], share)} to {shown(one['high'], share)}",
                "honest_shown": shown(one["honest"], share) if one["honest"] is not None else "",
                "hint": HINTS[one["better"]],
            }
        )
    return made


def render(found: Measures) -> str:
    """The page, as one string."""
    return template("diffmem.memorization", "measures.html.j2").render(
        found=found,
        lines=lines(found),
        charts=_charts(found),
        agreement=_agreement(found),
        gallery=_gallery(found),
        unit="gray levels" if found.settings["features"] == "pixels" and found.settings["dtype"] == "uint8" else "",
    )


def render_table(found: Measures) -> str:
    """The table alone, as a fragment of a page."""
    return template("diffmem.memorization", "measures_table.html.j2").render(found=found, lines=lines(found))


def _verdicts(found: Measures) -> dict[str, np.ndarray]:
    """bool [M] by the name of who decides: which images are copies by it."""
    return {
        "not authentic" if name == "authenticity" else name: found.per_image[criterion.decides[0]]
        == criterion.decides[1]
        for name, criterion in CRITERIA.items()
        if criterion.decides is not None and criterion.decides[0] in found.per_image
    }


def _agreement(found: Measures) -> dict[str, Any] | None:
    """How many images each pair of verdicts calls copies."""
    verdicts = _verdicts(found)
    if len(verdicts) < 2:
        return None
    counts = [[int((one & other).sum()) for other in verdicts.values()] for one in verdicts.values()]
    return {"names": list(verdicts), "counts": counts, "total": len(next(iter(verdicts.values())))}


def _charts(found: Measures) -> list[str]:
    drawn = []
    for name, label in SCORES.items():
        if name not in found.per_image:
            continue
        ours, unseen = found.per_image[name], found.honest_per_image.get(name)
        sets = [values[np.isfinite(values)] for values in (ours, unseen) if values is not None]
        sets = [values for values in sets if len(values)]
        if not sets:
            continue
        low, high = min(float(values.min()) for values in sets), max(float(values.max()) for values in sets)
        edges = np.linspace(low, high if high > low else low + 1, 51)
        others = sets[1] if len(sets) > 1 else None
        drawn.append(histogram(sets[0], edges, label, others=others, others_name="holdout images"))
    return drawn


def _gallery(found: Measures) -> list[dict[str, Any]]:
    """The images that most measures call copies, with their nearest training images."""
    images, training = found.images.get("generated"), found.images.get("training")
    nearest = found.per_image.get("nearest_index")
    if images is None or training is None or nearest is None or images.images.dtype != np.uint8:
        return []
    verdicts = _verdicts(found)
    votes = np.sum(list(verdicts.values()), axis=0) if verdicts else np.zeros(len(images), int)
    score = next((found.per_image[name] for name in SCORES if name in found.per_image), np.arange(len(images)))
    shown_rows = np.lexsort((score, -votes))[:GALLERY]
    return [
        {
            "name": images.name(row),
            "picture": data_url(images.images[row]),
            "nearest": training.name(int(nearest[row])),
            "nearest_picture": data_url(training.images[nearest[row]]),
            "votes": int(votes[row]),
            "of": len(verdicts),
            "by": [name for name, decided in verdicts.items() if decided[row]],
            "scores": [(name, f"{found.per_image[name][row]:.4g}") for name in SCORES if name in found.per_image],
        }
        for row in shown_rows.tolist()
    ]
