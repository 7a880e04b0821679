"""Self-contained HTML pages: templates, and numbers as pages write them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffmem.progress import duration

if TYPE_CHECKING:
    from jinja2 import Template


def percent(share: float) -> str:
    """A share as a percentage with as many digits as tell something: 93.4 %, 0.06 %, 0 %."""
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f} %"
    return f"{value:.2f} %" if value < 10 or value > 99 else f"{value:.1f} %"


def template(package: str, name: str) -> Template:
    """The template `name` in `package`/templates: everything is escaped, what is not given is an error, and the filters
    are percent, points, thousands, duration and filename. It may extend `page.html.j2`, the house's page."""
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
        "filename": lambda name: name.rstrip("/").rsplit("/", 1)[-1],
    }
    return environment.get_template(name)
