"""`diffmem measure`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from diffmem.cli.audit import tell_result
from diffmem.cli.options import (
    CommandWithJson,
    Source,
    center_crop_option,
    debug_option,
    decoded_meanwhile,
    in_own_options,
    json_option,
    ranges_by_set,
    reading,
    reading_options,
    reserve_report,
    resize_option,
    say_notes,
    value_range_option,
    without_collector,
)
from diffmem.cli.sampling_options import device_option, folder_option
from diffmem.text import printable

if TYPE_CHECKING:
    from diffmem.memorization import Measures


def _list(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Names all measures and variants, with their formulas and sources."""
    if not value or context.resilient_parsing:
        return
    from diffmem.memorization.criteria import CRITERIA

    for criterion in CRITERIA.values():
        click.echo(f"{criterion.name}: {criterion.formula} ({criterion.source})")
        for name, value_of in criterion.values.items():
            click.echo(f"    {name}: {value_of.what}")
        for name, variant in criterion.variants.items():
            click.echo(f"    {criterion.name}:{name}: {variant.value.what} ({variant.source}); only by its full name")
    context.exit()


@click.command("measure", cls=CommandWithJson)
@click.argument("generated", type=Source())
@click.argument("training", type=Source())
@click.option(
    "--holdout",
    type=Source(),
    help="Real images that the model has not seen; they give each measure's value when nothing is copied.",
)
@click.option(
    "--measures", default="all", show_default=True, metavar="all|NAME,…",
    help="Which measures to compute (see --list); variants by their full names, such as authenticity:fld.",
)  # fmt: skip
@click.option(
    "--features", default="pixels", show_default=True, metavar="NAME",
    help="What images are compared by: pixels, hash, sscd, dinov2, clip, torchscript:PATH, onnx:PATH, …; precomputed: "
    "the sources are files of vectors.",
)  # fmt: skip
@click.option(
    "--cells", type=click.Choice(["k-means", "labels"]), default="k-means", show_default=True,
    help="Cells of C_T: k-means clusters of the training images, or the class labels of all sets.",
)  # fmt: skip
@click.option(
    "--second", type=Source(), help="For disjoint_halves: images that a second model generated from the same latents."
)
@click.option("--second-training", type=Source(), help="Training set of the second model.  [default: TRAINING]")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the random choices: of k-means and the bootstrap."
)
@resize_option()
@center_crop_option
@value_range_option("of all sets, or of one alone: generated=-1,1, training=0,1, holdout=0,1", multiple=True)
@reading_options("generated", "training", "holdout")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N images: of GENERATED.")
@click.option(
    "--cache", is_flag=True, help="Cache the decoded images beside each source, so that the next run starts at once."
)
@device_option
@folder_option("a folder for measures.html, measures.csv, images.csv and measures.json.")
@click.option(
    "--list", is_flag=True, is_eager=True, expose_value=False, callback=_list,
    help="List the measures with their formulas and sources, and exit.",
)  # fmt: skip
@json_option("what measures.json holds")
@debug_option
def measure_command(
    generated, training, holdout, measures, features, cells, second, second_training, seed, resize, center_crop,
    value_range, limit, cache, device, out, as_json, **options,
) -> None:  # fmt: skip
    """Compute every measure of copying for the GENERATED images.

    GENERATED and TRAINING are what `diffmem audit` reads. Prints one table. With --holdout it also gives each measure's
    value for unseen real images: the holdout images in place of the generated ones. "all" skips the measures whose
    inputs are missing; a measure named explicitly whose inputs are missing is an error.

    \b
    Examples:
      diffmem measure samples/ cifar10-train.zip --holdout cifar10-test.zip --out measures
      diffmem measure samples.npz training.zip --measures authenticity,authenticity:fld --json
      diffmem measure samples.npy training.npy --features precomputed    vectors [N, d]
    """
    from diffmem.progress import progress_bars

    sources = {
        "generated": generated, "training": training, "holdout": holdout, "second": second,
        "second_training": second_training,
    }  # fmt: skip
    sources = {name: source for name, source in sources.items() if source is not None}
    ranges = ranges_by_set(value_range)
    with progress_bars() as progress:

        def given(name: str) -> dict[str, Any]:
            first = limit if name in ("generated", "second") else None
            found = {**reading(name, **options), "value_range": ranges.get(name, ranges.get("training"))}
            found |= {"limit": first, "resize": resize, "center_crop": center_crop, "cache": cache}
            return found | {"progress": progress}

        with decoded_meanwhile({} if features == "precomputed" else sources, given) as loading:
            with without_collector():
                import torch

                from diffmem.features import load_features
                from diffmem.memorization import measure

            torch.set_flush_denormal(True)
            reserve_report(out)

            def load(name: str, source: str) -> Any:
                if features == "precomputed":
                    found, first = load_features(source), given(name)["limit"]
                    return found if first is None else found.select(slice(0, first))
                images = loading[name].result()
                say_notes([images])
                return images

            sets = {name: load(name, source) for name, source in sources.items()}
            found = measure(
                **sets,
                measures=measures,
                features="pixels" if features == "precomputed" else features,
                cells=None if cells == "k-means" else cells,
                seed=seed,
                device=device,
                progress=progress,
            )
    tell_result(found, out, found.to_json() if as_json else None, print_measures)


def print_measures(found: Measures) -> None:
    """The table, on standard output."""
    from diffmem.memorization.measures_report import lines

    made = lines(found)
    columns = [
        ("measure", "name"),
        ("value", "shown"),
        ("95 % interval", "interval"),
        ("unseen images", "honest_shown"),
    ]
    if not found.honest:
        columns.pop()
    widths = [max(len(title), *(len(line[key]) for line in made)) for title, key in columns]

    def row(cells: list[str]) -> str:
        first, *others = (
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    click.echo(row([title for title, _ in columns]))
    for line in made:
        text = row([line[key] for _, key in columns])
        click.echo(f"{text}   {line['hint']}" if line["hint"] else text)
    for warning in found.warnings:
        click.echo(f"warning: {printable(in_own_options(warning))}")
    for note in found.notes:
        click.echo(f"  {note}")
    for name, reason in found.skipped.items():
        click.echo(f"  not computed: {name}: {printable(in_own_options(reason))}")
    if not found.honest:
        click.echo("  no holdout set: the values for real unseen images are unknown (give --holdout)")
