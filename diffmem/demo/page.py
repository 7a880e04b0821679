"""The demonstration's page: both models side by side, self-contained."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from diffmem.atomic_io import atomic_write
from diffmem.evaluation import draw
from diffmem.html_report import template
from diffmem.plotting import data_url

if TYPE_CHECKING:
    from diffmem.data import ImageSet
    from diffmem.demo.run import Demo, Model

SHOWN = 16  # generated images of each model, seeds 0, 1, …: not chosen


def write_page(demo: Demo) -> None:
    """Writes the page to `demo.page`."""
    models = (demo.few, demo.many)
    names = [f"{len(model.training):,} training images" for model in models]
    page = template("diffmem.demo", "demo.html.j2").render(
        demo=demo,
        models=models,
        plot=draw([model.trajectory for model in models], names),
        pairs=[_pairs(model) for model in models],
    )
    atomic_write(demo.page, page)


def _pairs(model: Model) -> list[tuple[str, str, bool]]:
    """(generated image, nearest training image, whether it is a copy) of the first seeds."""
    result = model.audit
    rows = np.arange(min(SHOWN, result.total))
    return [
        (
            data_url(cast("ImageSet", result.generated).images[row]),
            data_url(model.training.images[result.neighbors.indices[row, 0]]),
            bool(result.memorized[row]),
        )
        for row in rows
    ]
