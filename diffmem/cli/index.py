"""`diffmem index`: build, add, info, verify, plan."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from diffmem.cli.execution import executing, executor_options
from diffmem.cli.options import (
    CommandWithJson,
    StreamedSource,
    center_crop_option,
    debug_option,
    in_own_options,
    json_option,
    reading,
    reading_options,
    resize_option,
    value_range_option,
)
from diffmem.text import printable

if TYPE_CHECKING:
    from diffmem.executors import Executor
    from diffmem.indexes import IndexFolder

_memory_option = click.option(
    "--memory", metavar="SIZE",
    help="Memory of one worker at most, such as 2GB. What is needed is computed and printed before the work begins.",
)  # fmt: skip
_DTYPE = click.option(
    "--dtype", type=click.Choice(["float16", "float32"]),
    help="How vectors are stored. float16: in half the space, rounded.  [default: as they are]",
)  # fmt: skip
_FEATURES = [
    click.option(
        "--features", default="pixels", show_default=True, metavar="NAME",
        help="What images are compared by: pixels, hash, sscd, dinov2, clip, timm:NAME, torchscript:PATH, onnx:PATH; "
        "precomputed: the sources are vectors (.npy, .safetensors, .parquet, folders of clip-retrieval).",
    ),
    click.option(
        "--metric", type=click.Choice(["cosine", "euclidean", "hamming"]),
        help="How two vectors are compared.  [default: cosine; hamming for hashes]",
    ),
    click.option("--weights", type=click.Path(), help="Path of the network's weights; nothing is downloaded."),
    click.option(
        "--preprocessing", metavar="NAME",
        help="Preprocessing of the images for a network: sscd, sscd-320, dcr, dinov2, clip, imagenet, 0-1, -1-1.",
    ),
    click.option("--batch", type=click.IntRange(min=1), help="Images per batch: those of a network's forward pass."),
    click.option(
        "--precision", type=click.Choice(["ieee", "tf32", "bf16", "fp16"]),
        help="Precision of matrix products and convolutions in the network. ieee: float32; tf32: TF32 on a GPU; bf16, "
        "fp16: autocast.  [default: ieee]",
    ),
    _DTYPE,
    click.option(
        "--index", default="auto", show_default=True, metavar="NAME",
        help="How neighbors are searched: flat, exactly, without codes; by codes that FAISS makes for finding "
        "candidates: ivf, ivf1024, or a factory string such as IVF4096,PQ64; auto: flat up to 16 GB of vectors, which "
        "are searched for 10,000 images in minutes, else ivf.",
    ),
    click.option(
        "--duplicate-radius", type=click.FloatRange(min=0), default=0.0, show_default=True,
        help="Training images within this distance (rms, in gray levels) of each other count as duplicates. Beyond 0 "
        "all are compared with each other.",
    ),
    click.option(
        "--shards", type=click.IntRange(min=1), metavar="N",
        help="About how many shards to make of sources that can be divided; a tar archive is always one.  "
        "[default: by the size of each file]",
    ),
]  # fmt: skip


class _Count(click.ParamType):
    """A whole number, also as 1e9."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = float(str(value).replace(",", "").replace("_", ""))
            if number < 1 or number != int(number):
                raise ValueError
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not a whole number of at least 1, such as 1000000 or 1e9", param, ctx)
        return int(number)


def _feature_options(command):
    for option in reversed(_FEATURES):
        command = cast(Any, option)(command)
    return command


@click.group("index")
@debug_option
def index_command() -> None:
    """Index training sets that are larger than one machine.

    \b
    Examples:
      diffmem index build train.zip train.index
      diffmem index build "s3://bucket/laion/{00000..09999}.tar" laion.index --features sscd --resize 288 --workers 8
      diffmem index add laion.index more-shards/
      diffmem index info laion.index
      diffmem index verify laion.index --rebuild
      diffmem index plan 1e9 --features sscd --machines 100
    """


@index_command.command("build", cls=CommandWithJson)
@click.argument("sources", nargs=-1, required=True, type=StreamedSource(), metavar="SOURCE...")
@click.argument("out", type=click.Path(path_type=Path))
@_feature_options
@_memory_option
@resize_option()
@center_crop_option
@value_range_option("those of all sources")
@reading_options()
@executor_options
@json_option("what diffmem index info prints")
@debug_option
def build_command(
    sources, out, features, metric, weights, preprocessing, batch, precision, dtype, index, duplicate_radius,
    shards, memory, resize, center_crop, value_range, workers, ray, gpus_per_run, device, as_json, **options,
) -> None:  # fmt: skip
    """Build the index OUT of the training images in the SOURCEs.

    SOURCE is whatever `diffmem audit` reads, and, with the extra "remote", a URL of fsspec: s3://, gs://, hf://,
    https://. Brace patterns and globs stand for many files. Sources are read as streams, never copied as a whole;
    nothing in them is executed. OUT is a folder on this disk, or one that all workers share.

    Finished shards are kept whatever happens: the same command again continues a build that was killed, and one with
    more SOURCEs makes only what is missing. Under torchrun the ranks share the work.

    \b
    Examples:
      diffmem index build train.zip train.index
      diffmem index build "shards/{00000..00127}.tar" train.index --resize 64 --skip-bad --workers 8
      diffmem index build "s3://bucket/train/*.parquet" train.index --memory 2GB
      diffmem index build embeddings/ laion.index --features precomputed --dtype float16
      diffmem index build "shards/*.tar" train.index --features sscd --resize 288 --ray auto
      torchrun --nproc-per-node 8 -m diffmem index build "shards/*.tar" train.index --features sscd --resize 288
    """
    from diffmem.cli.distributed import is_first_rank, process_group
    from diffmem.executors import Ranks
    from diffmem.indexes import build_index
    from diffmem.progress import progress_bars

    with (
        process_group() as ranks,
        progress_bars(is_first_rank()) as progress,
        _on_ray(None if ranks else ray, workers, gpus_per_run, device) as cluster,
    ):
        built = build_index(
            sources, out, features, metric=metric, weights=weights, preprocessing=preprocessing, batch=batch,
            precision=precision, dtype=dtype, index=index, duplicate_radius=duplicate_radius, shards=shards,
            memory=memory, workers=workers, executor=Ranks(device) if ranks else cluster, device=device, say=_say,
            progress=progress, resize=resize, center_crop=center_crop, value_range=value_range, **reading(**options),
        )  # fmt: skip
    if is_first_rank():
        _tell(built, as_json)


@index_command.command("add", cls=CommandWithJson)
@click.argument("out", type=click.Path(path_type=Path, exists=True))
@click.argument("sources", nargs=-1, type=StreamedSource(), metavar="SOURCE...")
@click.option(
    "--retrain",
    is_flag=True,
    help="Train the codes again, on all rows that there are then; where there are none, as --index auto does.",
)
@_memory_option
@executor_options
@json_option("what diffmem index info prints")
@debug_option
def add_command(out, sources, retrain, memory, workers, ray, gpus_per_run, device, as_json) -> None:
    """Add SOURCEs to the index OUT, read as its others are.

    Rows that are there keep their numbers; shards that are there are not read again. Duplicates are found among all.
    """
    from diffmem.indexes import add_to_index
    from diffmem.progress import progress_bars

    with progress_bars() as progress, _on_ray(ray, workers, gpus_per_run, device) as executor:
        index = add_to_index(
            out, sources, retrain=retrain, memory=memory, workers=workers, executor=executor, device=device, say=_say,
            progress=progress,
        )  # fmt: skip
    _tell(index, as_json)


@index_command.command("info", cls=CommandWithJson)
@click.argument("out", type=click.Path(path_type=Path, exists=True))
@json_option("the same", full="with every shard")
@debug_option
def info_command(out, as_json) -> None:
    """What an index holds: features, sources, shards, duplicates, what was skipped, and how large it is."""
    from diffmem.indexes import open_index

    _tell(open_index(out), as_json)


@index_command.command("verify", cls=CommandWithJson)
@click.argument("out", type=click.Path(path_type=Path, exists=True))
@click.option("--rebuild", is_flag=True, help="Make damaged shards again from their sources.")
@click.option("--prune", is_flag=True, help="Remove finished shards that the index does not use.")
@_memory_option
@executor_options
@json_option("what was found")
@debug_option
def verify_command(out, rebuild, prune, memory, workers, ray, gpus_per_run, device, as_json) -> int:
    """Check every file of an index: hashes, numbers of rows, digests, duplicates. Exit status 1 if anything is wrong.

    Damaged shards are named, with the command that repairs them.
    """
    from diffmem.indexes.build import Settings
    from diffmem.indexes.planning import parse_memory
    from diffmem.indexes.verify import report_of, verify_index
    from diffmem.progress import progress_bars

    with progress_bars() as progress, _on_ray(ray, workers, gpus_per_run, device) as executor:
        settings = Settings(
            memory=parse_memory(memory), workers=workers, executor=executor, device=device, say=_say, progress=progress
        )
        found = verify_index(out, rebuild=rebuild, prune=prune, settings=settings, progress=progress)
    if as_json:
        click.echo(json.dumps({"intact": found.intact, **found.__dict__}))
    else:
        for line in report_of(found, out):
            click.echo(printable(line), err=True)
        if found.rebuilt:
            click.echo(f"made again: {', '.join(found.rebuilt)}")
        if found.unused:
            click.echo(
                f"{len(found.unused):,} finished shards are not used by this index; --prune removes them", err=True
            )
        if found.intact:
            click.echo(f"{out}: {found.shards:,} shards with {found.rows:,} rows are intact")
    return 0 if found.intact else 1


@index_command.command("plan", cls=CommandWithJson)
@click.argument("images", type=_Count(), metavar="IMAGES")
@_FEATURES[0]
@click.option("--dimension", type=click.IntRange(min=1), help="Values of a vector.  [default: by the features]")
@_DTYPE
@click.option("--machines", type=click.IntRange(min=1), default=10, show_default=True, help="How many there are.")
@click.option("--cores", type=click.IntRange(min=1), default=16, show_default=True, help="Of each machine.")
@click.option("--gpus", type=click.IntRange(min=0), default=0, show_default=True, help="Of each machine.")
@click.option("--machine-memory", default=64.0, show_default=True, metavar="GB", help="Of each machine.")
@click.option(
    "--bandwidth",
    default=500.0,
    show_default=True,
    metavar="MB/S",
    help="What each machine reads per second from where the images lie, and from its own disk.",
)
@click.option(
    "--images-per-second",
    type=click.FloatRange(min=0, min_open=True),
    metavar="RATE",
    help="Of the network, on one GPU, or on one core where --gpus is 0.  [default: as measured on one core]",
)
@click.option("--image-kb", default=21.5, show_default=True, metavar="KB", help="Size of an image as it is stored.")
@click.option("--generated", type=_Count(), default="10000", show_default=True, help="Images of one audit.")
@click.option("--flat", is_flag=True, help="The worst case of a search: vectors without leading components.")
@click.option("--price-core-hour", default=0.04, show_default=True, metavar="PRICE", help="Of one core.")
@click.option("--price-gpu-hour", default=2.5, show_default=True, metavar="PRICE", help="Of one GPU.")
@click.option("--price-gb-month", default=0.023, show_default=True, metavar="PRICE", help="Of one GB on disk.")
@json_option("the same")
@debug_option
def plan_command(
    images, features, dimension, dtype, machines, cores, gpus, machine_memory, bandwidth, images_per_second, image_kb,
    generated, flat, price_core_hour, price_gpu_hour, price_gb_month, as_json,
) -> None:  # fmt: skip
    """What an index of IMAGES images would cost: time, disk, memory, money, and an audit against it.

    Nothing is read or written. The rates were measured on one core of an AMD EPYC (Zen 4); prices are in one currency.

    \b
    Examples:
      diffmem index plan 1e9 --features sscd --machines 100
      diffmem index plan 1e10 --features sscd --machines 50 --gpus 8 --images-per-second 5000
      diffmem index plan 4e8 --features precomputed --dimension 768 --machines 4
    """
    from diffmem.indexes.cost import Machines, cost_of_index, report_of

    there = Machines(
        machines, cores, gpus, machine_memory * 1e9, bandwidth * 1e6, price_core_hour,
        price_gpu_hour, price_gb_month,
    )  # fmt: skip
    cost = cost_of_index(
        images, features, there, generated=generated, dimension=dimension, dtype=dtype or "float16",
        image_bytes=image_kb * 1e3, images_per_second=images_per_second, flat=flat,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(cost.to_dict()))
    else:
        for line in report_of(cost, features, there, generated):
            click.echo(printable(line))


@contextmanager
def _on_ray(ray: str | None, workers: int | None, gpus_per_run: float, device: str) -> Iterator[Executor | None]:
    """The Ray cluster that is asked for, or None: then the build itself decides about processes."""
    if ray is None:
        yield None
        return
    with executing(workers, ray, gpus_per_run, device) as executor:
        yield executor


def _say(line: str) -> None:
    click.echo(printable(in_own_options(line)), err=True)


def _tell(index: IndexFolder, as_json: str | None) -> None:
    from diffmem.indexes.info import describe, table

    if as_json:
        click.echo(json.dumps(describe(index, full=as_json == "full")))
    else:
        for line in table(index):
            click.echo(printable(line))
