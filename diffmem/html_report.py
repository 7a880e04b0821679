"""Self-contained HTML pages: templates, numbers as pages write them, and the files that lie beside a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


_FINGERPRINT = re.compile("[0-9a-f]{64}")
_CHURN = {"S_churn": "churn", "S_min": "churn from", "S_max": "churn up to", "S_noise": "churn noise"}


def level(share: float) -> str:
    """A share that was chosen, as a percentage: 90 %, 99.5 %."""
    return f"{100 * share:.6g} %"


def percent_range(interval: tuple[float, float]) -> str:
    """The ends of an interval of shares: "0.26 % to 2.18 %"."""
    low, high = interval
    return f"{percent(low)} to {percent(high)}"


def described(settings: Mapping[str, Any]) -> str:
    """Settings in a line for people: "steps 18; images (training 100, unseen 256)". What is not set is left out, and so
    are the parts of a churn of 0."""

    def words(value: Any) -> str:
        if isinstance(value, Mapping):
            return "(" + ", ".join(named(value)) + ")"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, str) and _FINGERPRINT.fullmatch(value):
            return f"{value[:12]}…"
        return f"{value:g}" if isinstance(value, float) else str(value)

    def named(values: Mapping[str, Any]) -> Iterator[str]:
        for name, value in values.items():
            calm = name.startswith("S_") and not values.get("S_churn", 1)
            if value is not None and not calm:
                yield f"{_CHURN.get(name, name).replace('_', ' ')} {words(value)}"

    return "; ".join(named(settings))


def write_report(
    folder: Path,
    stem: str,
    *,
    page: str,
    drawing: str,
    summary: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
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
    are percent, percent_range, level, points, thousands, duration, described and caption. What would not be seen is
    escaped as `printable` does. It may extend `page.html.j2`, the house's page."""
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
        "percent_range": percent_range,
        "level": level,
        "points": lambda share: f"{100 * share:+.1f}".replace("-", "−"),
        "thousands": lambda number: f"{number:,.0f}",
        "duration": duration,
        "described": described,
        "caption": caption,
    }
    return environment.get_template(name)
