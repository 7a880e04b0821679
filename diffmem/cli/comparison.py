"""What `diffmem optimum compare` and `diffmem optimum sweep` print."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

if TYPE_CHECKING:
    from diffmem.studies.comparison import Comparison, Sweep
    from diffmem.studies.comparison.gaps import Curve


def print_comparison(result: Comparison, report: Path | None, as_json: bool) -> None:
    """Saves the report where one is wanted, and prints JSON, or the curves and the verdict."""
    from diffmem.html_report import percent, percent_range

    page = None if report is None else result.save(report)
    if as_json:
        click.echo(json.dumps(result.to_dict(), allow_nan=False))
        return
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{result.checkpoint}: {result.model}")
    sizes = ", ".join(f"{len(gaps.gap):,} {kind}" for kind, gaps in result.gaps.items())
    click.echo(
        f"mean squared gap per pixel to the optimum of {len(result.training):,} training images, on {sizes} noisy "
        "images"
    )
    heading = f"{'sigma':>8}" + "".join(f"{kind:>11}" for kind in result.gaps)
    if result.memorization_score is not None:
        heading += f"{'score':>10}  {'95 % interval':<20}{'optimal':>9}{'normalized':>12}"
    click.echo(heading)
    for at, sigma in enumerate(result.levels):
        line = f"{sigma:>8.3g}" + "".join(f"{result.gap(kind).value[at]:>11.3g}" for kind in result.gaps)
        if result.memorization_score is not None:
            value, low, high = (each[at] for each in result.memorization_score)
            normalized = cast("Curve", result.normalized_score).value[at]
            share = "-" if math.isnan(normalized) else percent(normalized)
            line += f"{percent(value):>10}  {percent_range((low, high)):<20}"
            line += f"{percent(cast('Curve', result.optimal_score).value[at]):>9}{share:>12}"
        click.echo(line)
    click.echo(f"{result.rate.count} of {result.rate.total} generated images are copies ({percent(result.rate.ratio)})")
    click.echo(result.verdict())
    if page is not None:
        click.echo(f"report: {page}")


def print_sweep(result: Sweep, report: Path, as_json: bool) -> None:
    """Saves the report, and prints JSON, or a line per point."""
    from diffmem.html_report import percent, percent_range

    page = result.save(report)
    if as_json:
        click.echo(json.dumps(result.to_dict(), allow_nan=False))
        return
    click.echo(f"{'regularization':<22}{'R_mem':>8}  {'95 % interval':<20}{'expected':>9}  images")
    for point in result.points:
        expected = percent(result.expected(point.variant))
        interval = percent_range(point.interval)
        click.echo(f"{point.variant!s:<22}{percent(point.ratio):>8}  {interval:<20}{expected:>9}  {point.total:,}")
    for kind in result.kinds:
        if (half := result.half(kind)) is not None:
            click.echo(
                f"half of the images are copies at {kind}:{f'exp({half:.6g})' if kind == 'bayes' else f'{half:.3g}'}"
            )
    click.echo(f"report: {page}")
