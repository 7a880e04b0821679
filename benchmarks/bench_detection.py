"""How many copies detectors find, at how many alarms: `python -m benchmarks detection`.

What is measured are shares, not time. Two sets: test images of CIFAR-10 (JPEG) that people judged to show what a
training image shows (`benchmarks/detection/sets.py` says where they are looked for), and planted copies: training
images disguised as people meet them, at rising strength, of CIFAR-10 (JPEG), else of patches of photographs, and of
256×256 photographs. Every detector gives scores; its threshold is the one that raises alarms on 0.1, 0.5 or 1 % of
images that are not copies, beside those that its users take. Writes results/detection.csv and results/detection.svg;
`--only NAME` measures one detector and leaves the rows of the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.detection.detectors import Detector, detectors
from benchmarks.detection.disguises import PLANTED
from benchmarks.detection.sets import Cifar, cifar, photographs
from benchmarks.harness import RESULTS, Bench
from benchmarks.rows import read_table, write_table
from diffmem.data import load_images
from diffmem.memorization.statistics import wilson_interval

VALUES, MINUTES = "detection.csv", 90
ALARMS = (0.001, 0.005, 0.01)
COPIED = 100  # training images that are planted
COLUMNS = (
    "set", "detector", "disguise", "strength", "everyday", "threshold", "alarms", "of", "found", "copies", "recall",
    "low", "high",
)  # fmt: skip
CURVES = Path(__file__).parents[1] / "build" / "detection"  # scores, of which the chart is made
Row = dict[str, str]


def run(bench: Bench) -> None:
    rows: list[Row] = []
    known = cifar()
    training, unseen = photographs()
    for detector in detectors():
        if not bench.wants(detector.name):
            continue
        if detector.missing:
            print(f"{detector.name}: left out, {detector.missing}", flush=True)
            continue
        if known is not None:
            scores = detector.prepare(known.training)
            alarms = scores(known.test[known.others[:: 10 if bench.quick else 1]])
            rows += near_duplicates(detector, known, scores, alarms, bench.quick)
            rows += planted("CIFAR-10 (JPEG)", detector, scores, known.training, alarms, bench.quick)
        else:
            patches, others = (load_images(f"builtin:patches?n=5000&seed={seed}").images for seed in (0, 1))
            scores = detector.prepare(patches)
            rows += planted("patches", detector, scores, patches, scores(others), bench.quick)
        scores = detector.prepare(training)
        rows += planted("photographs 256", detector, scores, training, scores(unseen), bench.quick)
        write(rows, bench)
    if known is not None:
        chart(bench)


def near_duplicates(detector: Detector, known: Cifar, scores, alarms: np.ndarray, quick: bool) -> Iterator[Row]:
    """Listed near duplicates, the two halves of the list apart (aligned search was tuned on the even one), and the
    copies that nobody had listed."""
    listed = np.array(sorted(known.pairs))
    copies = np.array(sorted(image for image, verdict in known.judged.items() if verdict == "copy"))
    found = scores(known.test[listed])
    if not quick:
        CURVES.mkdir(parents=True, exist_ok=True)
        np.savez(CURVES / f"{detector.name.replace('/', ' over ')}.npz", name=detector.name, alarms=alarms, found=found)
    for name, part in (("listed", found), ("listed, even", found[::2]), ("listed, odd", found[1::2])):
        yield from shares("near duplicates", detector, part, alarms, disguise=name)
    if len(copies):
        yield from shares("near duplicates", detector, scores(known.test[copies]), alarms, disguise="not listed")


def planted(
    name: str, detector: Detector, scores, training: np.ndarray, alarms: np.ndarray, quick: bool
) -> Iterator[Row]:
    chosen = training[np.linspace(0, len(training) - 1, min(len(training), 20 if quick else COPIED)).astype(int)]
    together = []
    for disguise, strength, everyday, function in PLANTED:
        found = scores(function(chosen))
        together += [found] if everyday else []
        rest = {"disguise": disguise, "strength": strength, "everyday": "yes" if everyday else ""}
        yield from shares(name, detector, found, alarms, **rest)
    yield from shares(name, detector, np.concatenate(together), alarms, disguise="all of everyday strength")


def shares(name: str, detector: Detector, found: np.ndarray, alarms: np.ndarray, **rest: str) -> Iterator[Row]:
    """A row per threshold: how many of the copies it finds, with the 95 % interval, and how many alarms it raises."""
    thresholds = {f"{share:.1%} alarms": np.sort(alarms)[int(share * len(alarms))] for share in ALARMS}
    for label, threshold in (thresholds | detector.thresholds).items():
        count, raised = int((found < threshold).sum()), int((alarms < threshold).sum())
        low, high = wilson_interval(count, len(found))
        row = {
            "set": name, "detector": detector.name, "threshold": label, "alarms": raised, "of": len(alarms),
            "found": count, "copies": len(found), "recall": f"{count / len(found):.4f}", "low": f"{low:.4f}",
            "high": f"{high:.4f}", **rest,
        }  # fmt: skip
        yield {column: str(row.get(column, "")) for column in COLUMNS}
        if rest["disguise"] in ("listed", "not listed", "all of everyday strength"):
            print(
                f"{name:18} {detector.name:34} {rest['disguise']:26} {label:14} found {count / len(found):6.1%} "
                f"({low:.1%} to {high:.1%}), alarms {raised / len(alarms):.2%}",
                flush=True,
            )


def table(bench: Bench, suffix: str = "csv"):
    return RESULTS / f"detection{'.quick' if bench.quick else ''}.{suffix}"


def write(rows: list[Row], bench: Bench) -> None:
    """The table; rows of detectors that were not run now stay."""
    path, now = table(bench), {row["detector"] for row in rows}
    before = [row for row in read_table(path) if row["detector"] not in now]
    order = [detector.name for detector in detectors()]
    write_table(path, sorted([*rows, *before], key=lambda row: order.index(row["detector"])), COLUMNS)


def chart(bench: Bench) -> None:
    """Left: near duplicates found against alarms. Right: planted copies found at 0.1 % alarms, by disguise. Of all
    detectors that were measured, now or before."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if bench.quick or not table(bench).exists():
        return
    rows = read_table(table(bench))
    curves = {
        str(each["name"]): (np.sort(each["alarms"]), each["found"]) for each in map(np.load, CURVES.glob("*.npz"))
    }
    matplotlib.rcParams["svg.hashsalt"] = "detection"  # the same figure gives the same file
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 6), width_ratios=(1, 1.15), layout="constrained")
    shares_of_alarms = np.geomspace(3e-4, 0.3, 200)
    names = [name for name in dict.fromkeys(row["detector"] for row in rows) if name in curves]
    for name in names:
        alarms, found = curves[name]
        recall = [(found < alarms[int(share * len(alarms))]).mean() for share in shares_of_alarms]
        left.plot(shares_of_alarms, recall, label=name)
    left.set(
        xscale="log", xlabel="alarms: share of other test images", ylabel="near duplicates found", ylim=(0, 1.02),
        title="CIFAR-10 (JPEG): listed near duplicates", xlim=(3e-4, 0.3),
    )  # fmt: skip
    left.legend(loc="lower right", fontsize=8)
    left.grid(alpha=0.3)
    chosen = [r for r in rows if r["set"] == "CIFAR-10 (JPEG)" and r["threshold"] == "0.1% alarms"]
    labels = list(dict.fromkeys(f"{r['disguise']} {r['strength']}".strip() for r in chosen))
    for name in names:
        recall = {f"{r['disguise']} {r['strength']}".strip(): r["recall"] for r in chosen if r["detector"] == name}
        right.plot([float(recall[each]) for each in labels], range(len(labels)), "o", markersize=4, label=name)
    right.set_yticks(range(len(labels)), labels, fontsize=6)
    right.invert_yaxis()
    right.set(xlabel="planted copies found at 0.1 % alarms", xlim=(-0.02, 1.02), title="CIFAR-10 (JPEG): disguises")
    right.grid(alpha=0.3)
    figure.savefig(table(bench, "svg"), metadata={"Date": None})
    pyplot.close(figure)
