"""Self-contained HTML pages: templates, numbers as pages write them, and the files that lie beside a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from diffmem.atomic_io import atomic_set
from diffmem.text import printable, table
from diffmem.timing import duration

if TYPE_CHECKING:
    from jinja2 import Template
    from PIL.Image import Image


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
    folder: Path,
    stem: str,
    *,
    page: str,
    drawing: str,
    summary: str,
    columns: Sequence[str],
    rows: Iterable[Sequence],
    pictures: Mapping[str, Image] = MappingProxyType({}),
) -> Path:
    """Writes `stem`.html (the page), .svg (its plot), .json (`summary`), .csv and `pictures` (by file name, as PNG)
    into `folder`, together; returns the page's path."""
    texts = {"json": summary + "\n", "csv": table(columns, rows), "svg": drawing, "html": page}
    with atomic_set(folder) as stage:
        for name, picture in pictures.items():
            picture.save(stage / name, "PNG", optimize=True)
        write_texts(stage, {f"{stem}.{ending}": text for ending, text in texts.items()})
    return folder / f"{stem}.html"


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Writes texts by file name into `folder`, as UTF-8; what that cannot hold is written as an escape."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def caption(name: str, length: int = 60) -> str:
    """An image's name, with its folders, shortened in the middle where it is long."""
    name = printable(name)
    if len(name) <= length:
        return name
    return f"{name[: length // 3]}…{name[1 + length // 3 - length :]}"


def template(package: str, name: str) -> Template:
    """The template `name` in `package`/templates: everything is escaped, what is not given is an error, and the filters
    are percent, points, thousands, duration, described and caption. What would not be seen is escaped as `printable`
    does. It may extend `page.html.j2`, the house's page."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "templates"), PackageLoader("diffmem", "templates")]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value, "\n\t") if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": lambda share: f"{100 * share:+.1f}",
        "thousands": lambda number: f"{number:,.0f}",
        "duration": duration,
        "described": described,
        "caption": caption,
    }
    return environment.get_template(name)
