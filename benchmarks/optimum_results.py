"""The figures of `benchmarks/results/optimum`: R_mem of regularized optima, and how close networks come to theirs.

    python -m benchmarks.optimum_results RUNS [sweeps] [networks] [over-time]

Sweeps are kept in RUNS/sweep-digits and RUNS/sweep-cifar-10 and go on from there: 1,000 seeds a point on digits, 256 on
CIFAR-10 (JPEG), 20 minutes on one core. Networks are those of RUNS/digits-100, RUNS/digits-1000 and RUNS/cifar-100,
folders of `diffmem train`; those that are not there are left out. They were trained so:

    diffmem train --data builtin:digits --size 100 --images 320000 --batch 64 --precond edm --num-channels 32
        --channel-mult 1,2 --num-blocks 1 --attn-resolutions 4 --dropout 0 --lr 1e-3 --warmup-epochs 10
        --ema-rule constant --ema-halflife 20000 --out RUNS/digits-100
    … --size 1000 … --out RUNS/digits-1000
    diffmem train --data cifar10-train.zip --size 100 --resize 16 --images 400000 --batch 64 --precond edm
        --num-channels 32 --channel-mult 1,2 --num-blocks 1 --attn-resolutions 8 --dropout 0 --lr 1e-3
        --ema-target 0.995 --out RUNS/cifar-100
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click
import torch

from diffmem.atomic_io import atomic_write
from diffmem.data import DatasetSpec
from diffmem.html_report import percent
from diffmem.progress import Progress, progress_bars
from diffmem.sampling import SamplerConfig
from diffmem.studies.comparison import compare, draw_scores, draw_sweeps, sweep
from diffmem.studies.comparison.sweeps_report import images_of
from diffmem.training import RunFolder

RESULTS = Path(__file__).parent / "results" / "optimum"
CIFAR10 = Path(__file__).parents[2] / "shared" / "data"
SWEEPS: dict[str, tuple[str, Any, int]] = {  # name in figures: folder, training set, seeds
    "digits": ("sweep-digits", "builtin:digits", 1000),
    "CIFAR-10 (JPEG)": ("sweep-cifar-10", CIFAR10 / "cifar10-train.zip", 256),
}
NETWORKS = {  # name in figures: folder, training set, unseen images
    "100 digits": ("digits-100", DatasetSpec("builtin:digits", 100), DatasetSpec("builtin:digits")),
    "1,000 digits": ("digits-1000", DatasetSpec("builtin:digits", 1000), DatasetSpec("builtin:digits")),
    "100 of CIFAR-10 (JPEG), 16×16": (
        "cifar-100",
        DatasetSpec(CIFAR10 / "cifar10-train.zip", 100, 16),
        DatasetSpec(CIFAR10 / "cifar10-test.zip", None, 16),
    ),
}
OVER_TIME = "100 of CIFAR-10 (JPEG), 16×16"
SEEN = (20_000, 60_000, 100_000, 200_000, 400_000)  # images seen of the snapshots whose scores are drawn


@click.command()
@click.argument("runs", type=click.Path(path_type=Path))
@click.argument("parts", nargs=-1, type=click.Choice(["sweeps", "networks", "over-time"]))
def main(runs: Path, parts: tuple[str, ...]) -> None:
    """Draw the figures (default: all PARTS), from what is in RUNS."""
    torch.set_flush_denormal(True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    with progress_bars() as progress:
        for part, made in (("sweeps", sweeps), ("networks", networks), ("over-time", over_time)):
            if part in parts or not parts:
                made(runs, progress)


def sweeps(runs: Path, progress: Progress) -> None:
    swept = {}
    for name, (folder, source, seeds) in SWEEPS.items():
        if not str(source).startswith("builtin:") and not source.exists():
            print(f"{source} is not there: {name} is left out")
            continue
        swept[name] = sweep(
            str(source), ["tikhonov", "bayes", "smooth"], runs / folder, seeds=range(seeds), labels=False,
            sampler=SamplerConfig(batch=64), progress=progress,
        )  # fmt: skip
        swept[name].save(runs / folder)
        shutil.copy(runs / folder / "sweep.csv", RESULTS / f"{folder}.csv")
        for kind in swept[name].kinds:
            # Natural images take several times as much as PNG.
            suffix = "jpg" if swept[name].training.image_shape[0] == 3 else "png"
            images_of(swept[name].of(kind)).save(RESULTS / f"{folder}-{kind}.{suffix}", quality=85, optimize=True)
    atomic_write(RESULTS / "sweeps.svg", draw_sweeps(list(swept.values()), list(swept)))


def networks(runs: Path, progress: Progress) -> None:
    compared = {}
    for name, (folder, training, unseen) in NETWORKS.items():
        if not (runs / folder).is_dir():
            print(f"{runs / folder} is not there: {name} are left out")
            continue
        result = compare(runs / folder, training.load(progress), holdout=unseen.load(progress), progress=progress)
        result.save(runs / folder / "compare")
        for suffix in ("csv", "svg"):
            shutil.copy(runs / folder / "compare" / f"compare.{suffix}", RESULTS / f"{folder}.{suffix}")
        print(f"{name}: {result.verdict()}")
        compared[name] = result
    if compared:
        atomic_write(RESULTS / "scores.svg", draw_scores(list(compared.values()), list(compared)))


def over_time(runs: Path, progress: Progress) -> None:
    """Memorization scores of the snapshots of one run."""
    folder, training, unseen = NETWORKS[OVER_TIME]
    if not (runs / folder).is_dir():
        return
    snapshots = RunFolder.open(runs / folder).snapshots()
    chosen = [min(snapshots, key=lambda snapshot: abs(snapshot.images - seen)) for seen in SEEN]
    images, others = training.load(progress), unseen.load(progress)
    compared, names, rows = [], [], ["epochs,copies,generated,highest_score,sigma_low,sigma_star"]
    for snapshot in chosen:
        result = compare(
            runs / folder / "snapshots" / f"{snapshot.images:09d}", images, holdout=others, progress=progress
        )
        compared.append(result)
        names.append(f"{snapshot.epochs:,.0f} epochs, R_mem {percent(result.copies / result.generated_images)}")
        ends = ["" if end is None else end for end in (result.memorized_range or (None, None))[:2]]
        numbers = (
            snapshot.epochs,
            result.copies,
            result.generated_images,
            result.memorization_score.value.max(),
            *ends,
        )
        rows.append(",".join(value if isinstance(value, str) else f"{value:.4g}" for value in numbers))
    atomic_write(RESULTS / f"{folder}-over-time.csv", "\n".join(rows) + "\n")
    atomic_write(RESULTS / f"{folder}-over-time.svg", draw_scores(compared, names))


if __name__ == "__main__":
    main()
