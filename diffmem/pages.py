"""Self-contained HTML pages: templates, numbers as pages write them, and the files that lie beside a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmem.atomic_io import atomic_write
from diffmem.timing import duration

if TYPE_CHECKING:
    from jinja2 import Template


def percent(share: float) -> str:
    """A share as a percentage with as many digits as tell something: 93.4 %, 0.06 %, 0 %."""
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f} %"
    return f"{value:.2f} %" if value < 10 or value > 99 else f"{value:.1f} %"


def described(settings: Mapping[str, Any]) -> str:
    """Settings in a line for people: "steps 18; images (training 100, unseen 256)"."""

    def words(value: Any) -> str:
        if isinstance(value, Mapping):
            return "(" + ", ".join(f"{name} {words(each)}" for name, each in value.items()) + ")"
        if value is None or isinstance(value, bool):
            return {None: "none", True: "yes", False: "no"}[value]
        return f"{value:g}" if isinstance(value, float) else str(value)

    return "; ".join(f"{name} {words(value)}" for name, value in settings.items())


def write_report(
    folder: Path, stem: str, *, page: str, drawing: str, summary: str, columns: Sequence[str], rows: Iterable[Sequence]
) -> Path:
    """Writes `stem`.html (the page), .svg (its plot), .json (`summary`) and .csv into `folder`; returns the page's
    path."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    texts = {"json": summary + "\n", "csv": table.getvalue(), "svg": drawing, "html": page}
    for ending, text in texts.items():
        atomic_write(folder / f"{stem}.{ending}", text)
    return folder / f"{stem}.html"


def template(package: str, name: str) -> Template:
    """The template `name` in `package`/templates: everything is escaped, what is not given is an error, and the filters
    are percent, points, thousands, duration, described and filename. It may extend `page.html.j2`, the house's page."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "templates"), PackageLoader("diffmem", "templates")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": lambda share: f"{100 * share:+.1f}",
        "thousands": lambda number: f"{number:,.0f}",
        "duration": duration,
        "described": described,
        "filename": lambda name: name.rstrip("/").rsplit("/", 1)[-1],
    }
    return environment.get_template(name)
