"""`diffmem dataset`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from diffmem.cli.options import (
    CommandWithJson,
    Source,
    center_crop_option,
    debug_option,
    json_option,
    reading,
    reading_options,
    reserve_output,
    resize_option,
    say_notes,
    size_option,
    value_range_option,
)
from diffmem.errors import InputError


class Labels(click.ParamType):
    name = "labels"

    def convert(self, value, parameter, context) -> str:
        from diffmem.data.subsets import parse_labels

        try:
            parse_labels(value)
        except InputError as error:
            self.fail(str(error), parameter, context)
        return value


@click.command("dataset", cls=CommandWithJson)
@click.argument("source", type=Source())
@click.argument("out", type=click.Path(path_type=Path))
@size_option(": the first ones of each (the first N images where there are no classes)")
@click.option("--classes", type=click.IntRange(min=1), help="Only the first C classes.")
@click.option(
    "--labels", type=Labels(), metavar="true|consecutive|none|random:C|unique",
    help="true: the labels of SOURCE; consecutive: the same, classes renumbered from 0; none; random:C: one of C "
    "classes drawn for each image; unique: a class of its own for each image.  [default: true if SOURCE has labels, "
    "else none]",
)  # fmt: skip
@click.option(
    "--label-seed", type=click.IntRange(min=0),
    help="Seed of random:C.  [default: the sequence of the paper's public code]",
)  # fmt: skip
@resize_option("--resolution", "resolution")
@center_crop_option
@value_range_option("those of SOURCE, which is converted to uint8")
@reading_options()
@click.option("--mix", type=Source(), metavar="OTHER", help="Replace images of one class by the same class of OTHER.")
@click.option("--share", type=click.FloatRange(0, 1), help="With --mix: the fraction of the class to replace.")
@click.option("--class", "class_index", type=int, metavar="K", help="The class K: the one whose images --mix replaces.")
@click.option(
    "--seed", type=click.IntRange(min=0),
    help="Seed of the random choices: which images --size and --mix take.  [default: the first images]",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N images: of SOURCE.")
@json_option("the manifest")
@debug_option
def dataset_command(
    source, out, size, classes, labels, label_seed, resolution, center_crop, value_range, mix, share, class_index, seed,
    limit, as_json, **options,
) -> None:  # fmt: skip
    """Make the training set OUT from SOURCE.

    SOURCE is whatever `diffmem audit` reads. OUT is a .zip (EDM's layout), an .npz or, without a suffix, a new folder
    of PNG. It includes a manifest.json that records how it was made. The same SOURCE and options give the same bytes.

    \b
    Examples:
      diffmem dataset cifar10-train.zip c10-1000.zip --size 1000
      diffmem dataset cifar10-train.zip two-classes-16.zip --size 2000 --classes 2 --resolution 16
      diffmem dataset cifar10-train.zip random-labels.zip --size 5000 --labels random:100
      diffmem dataset cifar10-train.zip dogs.zip --size 2000 --mix imagenet-dogs/ --share 0.5 --class 5 --resolution 32
    """
    if len({mix is None, share is None, class_index is None}) > 1:
        raise click.UsageError("--mix, --share and --class go together")
    if label_seed is not None and not (labels or "").startswith("random:"):
        raise click.UsageError("--label-seed is for --labels random:C")
    for read in (source, mix):
        if read is not None and os.path.exists(read) and out.exists() and os.path.samefile(read, out):
            raise click.UsageError(f"{out} is also an input: choose another name for the new set")

    from diffmem.data import DatasetSpec, Mix
    from diffmem.data.write import check_writable
    from diffmem.progress import progress_bars

    check_writable(out)
    reserve_output(out)
    with progress_bars() as progress:
        spec = DatasetSpec(
            source,
            size=size,
            resolution=resolution,
            limit=limit,
            center_crop=center_crop,
            value_range=value_range,
            **reading(**options),
            classes=classes,
            mix=None if mix is None else Mix(mix, share, class_index),
            labels=labels,
            label_seed=label_seed,
            seed=seed,
        )
        derived = spec.derive(progress)
        derived.write(out, progress)
    say_notes([derived.images])
    if as_json:
        click.echo(json.dumps({"path": str(out), **derived.manifest}))
    else:
        print_summary(out, derived.manifest)


def print_summary(out: Path, manifest: dict[str, Any]) -> None:
    """Prints what was made from what."""
    result = manifest["result"]
    count, *shape = result["shape"]
    classes = "no labels" if result["classes"] is None else f"{result['classes']:,} classes"
    click.echo(f"{out}: {count:,} images of {'x'.join(map(str, shape))}, {classes}.")
    click.echo(f"  from {manifest['source']['name']}, {manifest['source']['shape'][0]:,} images")
    for operation in manifest["operations"]:
        arguments = {name: value["name"] if name == "other" else value for name, value in operation.items()}
        name = arguments.pop("operation")
        click.echo(f"  {name}({', '.join(f'{key}={value}' for key, value in arguments.items())})")
    click.echo(f"  fingerprint {result['fingerprint']}")
