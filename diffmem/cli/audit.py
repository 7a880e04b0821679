"""`diffmem audit`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from diffmem.cli.distributed import is_first_rank, process_group, ranks
from diffmem.cli.options import (
    SETS,
    CommandWithJson,
    PerSource,
    Share,
    Source,
    center_crop_option,
    debug_option,
    decoded_meanwhile,
    gate_options,
    holdout_option,
    in_own_options,
    json_option,
    limits_of,
    ranges_by_set,
    reading,
    reading_options,
    reserve_report,
    resize_option,
    say_notes,
    tell_gate,
    value_range_option,
    without_collector,
)
from diffmem.cli.sampling_options import device_option, folder_option
from diffmem.errors import InputError
from diffmem.text import printable

if TYPE_CHECKING:
    from diffmem.data import ImageSet
    from diffmem.evaluation import Generated
    from diffmem.features import FeatureSet
    from diffmem.memorization import Audit, Gate, Measures

    Result = TypeVar("Result", Audit, Measures)


class Threshold(click.ParamType):
    name = "number"

    def convert(self, value, parameter, context) -> Fraction:
        try:
            return Fraction(value)
        except (ValueError, TypeError, ZeroDivisionError):
            self.fail(f"{value!r} is not a number or a fraction such as 1/3", parameter, context)


@click.command("audit", cls=CommandWithJson)
@click.argument("generated", type=Source())
@click.argument("training", type=Source(), required=False)
@holdout_option
@click.option(
    "--features", default="pixels", show_default=True, metavar="NAME",
    help="What images are compared by: pixels, aligned (pixels after brightness, color, shift, mirroring and small "
    "crops are removed), hash, sscd, dinov2, clip, timm:NAME, torchscript:PATH, onnx:PATH; precomputed: the sources "
    "are files of vectors (.npy, .npz, .safetensors, .pt, .parquet, folders of clip-retrieval).",
)  # fmt: skip
@click.option(
    "--vectors", type=PerSource(SETS), multiple=True, metavar="SET=PATH",
    help="Vectors of the images that were computed elsewhere: generated=PATH, training=PATH, holdout=PATH, each with "
    "an option of its own.",
)  # fmt: skip
@click.option(
    "--metric", type=click.Choice(["cosine", "euclidean", "hamming"]),
    help="How two vectors are compared.  [default: cosine; hamming for hashes]",
)  # fmt: skip
@click.option("--weights", type=click.Path(), help="Path of the network's weights; nothing is downloaded.")
@click.option(
    "--preprocessing",
    metavar="NAME",
    help="Preprocessing of the images for a network: sscd, sscd-320, dcr, dinov2, clip, imagenet, 0-1, -1-1.",
)
@click.option("--batch", type=click.IntRange(min=1), help="Images per batch: those of a network's forward pass.")
@click.option(
    "--precision", type=click.Choice(["ieee", "tf32", "bf16", "fp16"]),
    help="Precision of matrix products and convolutions in the network. ieee: float32; tf32: TF32 on a GPU; bf16, "
    "fp16: autocast.  [default: ieee]",
)  # fmt: skip
@click.option("--no-feature-cache", is_flag=True, help="Do not cache a network's features beside each source.")
@click.option(
    "--rule",
    type=click.Choice(["ratio", "similarity", "calibrated"]),
    default="ratio",
    show_default=True,
    help="ratio: d1/d2 below the threshold, the paper's. similarity: a cosine above it, or a distance below it. "
    "calibrated: a threshold learned from the --holdout images, at the false-alarm rate --alarms.",
)
@click.option(
    "--threshold",
    type=Threshold(),
    help="Threshold of the rule.  [default: 1/3 for --rule ratio]",
)
@click.option(
    "--alarms",
    type=Share(),
    metavar="SHARE",
    help="With --rule calibrated: the highest acceptable share of false alarms among images that are not copies.  "
    "[default: 0.01]",
)
@click.option(
    "--no-second-look",
    is_flag=True,
    help="Skip the second look, which aligns images that are not copies by the rule with their nearest training "
    "images; no image is then reported as near.",
)
@click.option(
    "--duplicates", type=click.Choice(["collapse", "keep"]), default="collapse", show_default=True,
    help="collapse: take the second neighbor among the images that are not duplicates of the first. keep: count "
    "duplicates as neighbors (the paper's rule).",
)  # fmt: skip
@click.option(
    "--duplicate-radius", type=click.FloatRange(min=0), default=0.0, show_default=True,
    help="Training images within this distance (rms, in gray levels) of the nearest one count as its duplicates.",
)  # fmt: skip
@click.option("--flip", is_flag=True, help="Also look for mirrored copies (for models trained with horizontal flips).")
@resize_option()
@center_crop_option
@click.option(
    "--split-grid", is_flag=True,
    help="GENERATED are sheets of images in a grid: cut them into images of the training images' size.",
)  # fmt: skip
@value_range_option("of all sets, or of one alone: generated=-1,1, training=0,1, holdout=0,1", multiple=True)
@reading_options("generated", "training", "holdout")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N images: of GENERATED.")
@click.option(
    "--cache", is_flag=True, help="Cache the decoded images beside each source, so that the next run starts at once."
)
@click.option(
    "--index", default="exact", show_default=True, metavar="NAME|FOLDER",
    help="How neighbors are searched: exact, or with FAISS (on GPUs where available): flat, ivf, ivf1024, hnsw, or a "
    "FAISS factory string. Or, in place of TRAINING, the folder that `diffmem index build` made of it. FAISS, and an "
    "index folder with codes, may miss neighbors; the interval covers that.",
)  # fmt: skip
@click.option("--exact", is_flag=True, help="Search an index folder exactly, though it has codes.")
@click.option(
    "--verify", type=click.IntRange(min=1), default=1000, show_default=True, metavar="N",
    help="Images searched exactly, too, where the index may miss neighbors: the more, the narrower the interval.",
)  # fmt: skip
@click.option(
    "--recall", type=Share(), default="0.99", show_default=True, metavar="SHARE",
    help="Share of the nearest training images that an index which may miss some is to find; how widely it searches is "
    "chosen by that.",
)  # fmt: skip
@device_option
@folder_option("a folder for report.html, samples.csv and report.json.")
@json_option("a summary", full="with the result for each image")
@gate_options
@debug_option
def audit_command(
    generated, training, holdout, features, vectors, metric, weights, preprocessing, batch, precision, no_feature_cache,
    rule, threshold, alarms, no_second_look, duplicates, duplicate_radius, flip, resize, center_crop, split_grid,
    value_range, limit, cache, index, exact, verify, recall, device, out, as_json,
    fail_above, require_below, max_copies, **options,
) -> int:  # fmt: skip
    """Which of the GENERATED images are copies of TRAINING images, or of those in the folder --index?

    GENERATED and TRAINING are folders, zips, tar shards of webdataset, parquet, .npz, .npy, .pt, .safetensors or
    HDF5 files, LMDB, TIFF stacks, DICOM and NIfTI slices, CIFAR-10's cifar-10-python.tar.gz, data sets saved by
    Hugging Face datasets (also as hf:PATH?split=…&column=…), or builtin:digits and builtin:patches.
    The EXIF orientation is applied in every format; a note says to how many images. Images with more than 8 bits per
    channel are refused, except 16-bit gray that fits 8 bits exactly.

    A verdict is "copy", "near" (not a copy by the rule, but similar to a training image once the two are aligned: worth
    a look) or "not a copy". The terminal output, the report and the JSON say what the rule in use cannot detect.

    A gate sets the exit status: 0 (passed), 3 (closed) or 4 (undecided, also if the audit has warnings); 1 and 2 are
    errors.

    \b
    Examples:
      diffmem audit samples/ cifar10-train.zip --holdout cifar10-test.zip --out report
      diffmem audit samples.npz training.zip --json | jq .ratio
      diffmem audit samples/ train.zip --features aligned --rule calibrated --holdout test.zip    disguised copies
      diffmem audit samples/ train.zip --features sscd --rule similarity --threshold 0.75
      diffmem audit gen.npy train_emb/ --features precomputed --rule similarity --threshold 0.5
      diffmem audit samples.zip training.zip --require-below 0.01    a gate for a pipeline
      diffmem audit samples.zip training.zip --index ivf             FAISS, for sets too large to search exactly
      diffmem audit samples.zip --index laion.index --out report     an index folder holds the training set
      diffmem audit samples.zip --index laion.index --verify 4000    more images searched exactly: a narrower interval
      torchrun --nproc-per-node 8 -m diffmem audit samples.zip training.zip    one shard of the training set per GPU
    """
    from diffmem.data.containers import is_index_folder
    from diffmem.progress import progress_bars

    if split_grid and (resize or center_crop):
        raise click.UsageError(
            "--split-grid cuts images of the training images' size: remove --resize and --center-crop"
        )
    if index != "exact" and ranks() > 1:
        raise click.UsageError("--index: FAISS searches in one process, on all visible GPUs: run without torchrun")
    folder = None
    if training is not None and index == "exact" and is_index_folder(Path(training)):
        training, index = None, training
    if training is None:
        if index == "exact":
            raise click.UsageError("Missing argument 'TRAINING', or the folder of its index: --index FOLDER")
        from diffmem.indexes import open_index

        folder = open_index(index)
        metric = folder.metric if metric is None and folder.features.precomputed else metric
        if not split_grid:  # as the index's images were read
            resize = resize or folder.reading.resize
            center_crop = center_crop or folder.reading.center_crop
        options["color"] = options["color"] or folder.reading.color
    ranges = ranges_by_set(value_range)
    sources = {"generated": generated, "training": training, "holdout": holdout}
    with progress_bars(is_first_rank()) as progress:

        def given(name: str) -> dict[str, Any]:
            first = limit if name == "generated" else None
            found = {**reading(name, **options), "value_range": ranges.get(name), "limit": first}
            return found | {"resize": resize, "center_crop": center_crop, "cache": cache, "progress": progress}

        vectors_only = features == "precomputed" or (folder is not None and folder.features.precomputed)
        with decoded_meanwhile({} if vectors_only else sources, given) as loading:
            with without_collector():
                from diffmem.devices import is_cpu
                from diffmem.features import load_features
                from diffmem.memorization import audit, parse_threshold
                from diffmem.memorization.second_look import needs_pytorch

                if (features, index, ranks()) != ("pixels", "exact", 1) or vectors or not is_cpu(device):
                    _import_pytorch()

            if rule == "ratio" and threshold is not None:
                try:
                    parse_threshold(threshold)
                except InputError as error:
                    raise click.BadParameter(str(error), param_hint="--threshold") from None
            limits = limits_of(fail_above, require_below, max_copies)
            reserve_report(out)
            network = {"weights": weights, "preprocessing": preprocessing, "batch": batch, "precision": precision}
            network = {name: value for name, value in network.items() if value is not None}
            with_options = folder is None or vectors or network or features not in ("pixels", folder.features.name)
            compared = compared_of(features, vectors, metric, device, network) if with_options else features

            def load(name: str) -> ImageSet | FeatureSet:
                if vectors_only:
                    found = load_features(sources[name], key=given(name)["key"], metric=metric)
                    found = found if given(name)["limit"] is None else found.select(slice(given(name)["limit"]))
                else:
                    found = loading[name].result()
                if needs_pytorch(found):  # now, while the next set is decoded
                    _import_pytorch()
                say_notes([found], is_first_rank())
                return found

            with process_group() as distributed:
                result = audit(
                    load("generated"),
                    None if folder is not None else load("training"),
                    features=compared,
                    rule=rule,
                    threshold=threshold,
                    alarms=alarms,
                    duplicates=duplicates,
                    duplicate_radius=duplicate_radius,
                    holdout=None if holdout is None else load("holdout"),
                    split_grid=split_grid,
                    flip=flip,
                    device=device,
                    index="sharded" if distributed else index if folder is None else folder,
                    exact=exact,
                    verify=verify,
                    recall=recall,
                    second_look=not no_second_look,
                    feature_cache=not no_feature_cache,
                    progress=progress,
                )
    if not is_first_rank():
        return 0
    gate = result.gate(**limits) if limits else None
    tell_audit(result, out, as_json, gate)
    return tell_gate(gate)


def _import_pytorch() -> None:
    with without_collector():
        import torch

        torch.set_flush_denormal(True)


def compared_of(
    features: str, vectors: tuple[tuple[str | None, str], ...], metric: str | None, device: str, network: dict[str, Any]
) -> Any:
    """What --features, --vectors and the options of networks mean, as `diffmem.audit` takes it."""
    from diffmem.features import extractor, load_features

    if vectors:
        if features not in ("pixels", "precomputed") or network:
            raise click.UsageError(
                "--vectors gives precomputed features: remove --features and the options of networks"
            )
        if unnamed := [path for which, path in vectors if which is None]:
            raise click.BadParameter(
                f"{unnamed[0]!r}: must be SET=PATH, where SET is one of {', '.join(SETS)}", param_hint="--vectors"
            )
        return {which: load_features(path, metric=metric) for which, path in vectors}
    if features == "precomputed" and not network:
        return features
    if features in ("pixels", "aligned") and not network and metric is None:
        return features
    if features == "aligned":
        raise click.UsageError("--features aligned uses no network: remove --metric and the options of networks")
    return extractor(features, metric=metric, device=device, **network)


def tell_audit(result: Audit, out: Path | None, as_json: str | None, gate: Gate | None) -> None:
    """Prints the verdict, or JSON, then saves the report if one is wanted: last, so that a full disk cannot hide the
    verdict."""
    text = None
    if as_json:
        decided = {} if gate is None else {"gate": gate.to_dict()}
        text = json.dumps({**as_json_asks(result, as_json), **decided})
    tell_result(result, out, text, print_verdict)


def tell_result(result: Result, out: Path | None, json_text: str | None, show: Callable[[Result], None]) -> None:
    """Prints `json_text`, with the warnings on standard error, or else shows the result; then saves its report if one
    is wanted."""
    if json_text is not None:
        click.echo(json_text)
        for warning in result.warnings:
            click.echo(f"warning: {printable(in_own_options(warning))}", err=True)
    else:
        show(result)
    if out is not None:
        page = result.save(out)
        if json_text is None:
            click.echo(f"report: {page}")


def as_json_asks(result: Audit | Generated, kind: str) -> dict[str, Any]:
    """The full result, or a summary."""
    return result.to_dict() if kind == "full" else result.summary()


def print_verdict(result: Audit) -> None:
    """A short verdict that a person understands, on standard output."""
    from diffmem.html_report import percent, percent_range

    click.echo(f"{result.verdict()}.")
    for warning in result.warnings:
        click.echo(f"  warning: {in_own_options(warning)}")
    for line in explained(result):
        click.echo(f"  {in_own_options(line)}")
    for line in searched(result):
        click.echo(f"  {line}")
    if result.holdout is not None:
        if result.calibration is None:
            alarms = f"{result.holdout.count:,} of {result.holdout.total:,} ({percent(result.holdout.ratio)}"
            click.echo(
                f"  false alarms on unseen real images: {alarms}, interval {percent_range(result.holdout.interval)})"
            )
        if left_out := result.holdout.left_out:
            first = f"{left_out[0].name} is {left_out[0].training_name}"
            click.echo(
                f"  excluded from the holdout set because they are training images: {len(left_out):,} "
                f"({printable(first)})"
            )
        for warning in result.holdout.warnings:
            click.echo(f"  warning about the holdout set: {in_own_options(warning)}")
    if result.rule.features == "pixels":
        click.echo(f"  mean distance to the nearest training image: {result.mean_rms:.3f} gray levels rms")
    if result.duplicates:
        click.echo(f"  duplicates in the training set: {len(result.duplicates):,} groups")
    for which in ("generated", "training"):
        if skipped := result.settings[which]["skipped"]:
            first = f"{skipped[0]['name']}: {skipped[0]['reason']}"
            click.echo(f"  {which} files skipped: {len(skipped):,} (the first: {printable(first)})")
    if result.sources:
        most = ", ".join(f"{printable(source.name)} ({source.count})" for source in result.sources[:3])
        click.echo(f"  copied most often: {most}")
    for blind_spot in result.blind_spots:
        click.echo(f"  not covered: {in_own_options(blind_spot)}")


def searched(result: Audit) -> Iterator[str]:
    """How an index that may miss neighbors was searched, and what that does to the count."""
    from diffmem.html_report import percent

    checked, search = result.verification, result.settings["search"]
    if checked is None:
        return
    widely = f"{search['nprobe']:,} of {search['lists']:,} lists, " if search.get("lists") else ""
    recalls = f"{percent(checked.recall_nearest)} and {percent(checked.recall_second)}"
    yield (
        f"index {search['index']} ({widely}{search['candidates']:,} candidates per image re-ranked exactly): recall of "
        f"the nearest and second nearest {recalls}"
    )
    low, high = checked.count_interval
    count = f"{low:,}" if low == high else f"{low:,} to {high:,} (95 %)"
    yield (
        f"verdicts proven to be those of exact search: {checked.settled:,}; searched exactly: {checked.verified:,}; "
        f"copies by exact search: {count}"
    )


def explained(result: Audit) -> Iterator[str]:
    """What the count means under the rule in use."""
    from diffmem.html_report import level, percent, percent_range
    from diffmem.memorization.report import FALSE_DISCOVERIES

    if result.rule.published:
        left_in = f"{result.raw_count:,} ({percent(result.raw_ratio)})"
        published = f"{result.published_count:,} ({percent(result.published_ratio)})"
        yield f"with duplicates as neighbors: {left_in}; by the paper's code, which does not count 0/0: {published}"
    else:
        yield f"a copy: {result.rule.described(result.calibration)}"
    if result.calibration is not None:
        false = result.rule.alarms * result.total
        yield (
            f"false alarms: at most {level(result.rule.alarms)} of images that are not copies, {false:,.1f} of "
            f"{result.total:,}; this threshold's share lies within {percent_range(result.calibration.alarm_interval)}"
        )
        sure = int((result.q_values <= FALSE_DISCOVERIES).sum())
        yield f"copies at a false discovery rate of {level(FALSE_DISCOVERIES)} (Benjamini-Hochberg): {sure:,}"
    if result.near_count:
        pairs = [(row, int(result.look.indices[row])) for row in result.near.nonzero()[0][:3].tolist()]
        names = ", ".join(
            f"{printable(result.generated.name(row))} and {printable(result.training.name(index))}"
            for row, index in pairs
        )
        yield f"near, worth a look: {result.near_count:,} ({names}{', …' if result.near_count > 3 else ''})"
