"""`trajectory`: the memorization ratio of every snapshot of a run, and when copying began."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import diffmem
from diffmem.data import ImageSet, ImageSource, load_images
from diffmem.devices import pick_device
from diffmem.errors import InputError
from diffmem.evaluation.detectors import sample_detector
from diffmem.evaluation.evaluator import Evaluation, decide_compile, evaluate, identity_of
from diffmem.evaluation.loss_gap import LossGap, LossGapMeter, first_warning
from diffmem.evaluation.seed_ranges import PROTOCOL_SEEDS, checked_seeds, format_seeds
from diffmem.evaluation.seed_store import SeedStore
from diffmem.logs import logger
from diffmem.memorization import CopyDetector, CopyRate, ReportsRate, SequentialTest, check_criterion, highest_interval
from diffmem.memorization.plausibility import single_color_share
from diffmem.models import Denoiser, Model, WrappedDenoiser, fingerprint, load
from diffmem.progress import Progress, silent
from diffmem.sampling import SamplerConfig
from diffmem.training import RunFolder, SnapshotRecord, Stats

_log = logger(__name__)
FOLDER = "trajectory"  # in the run's folder
ORDERS = ("newest", "oldest", "bisect")
COPIES = 24  # of a snapshot whose images are kept
_ONSET = 0.5  # what bisection looks for where no test says otherwise


@dataclass(frozen=True, eq=False)
class Point(ReportsRate):
    """R_mem of one snapshot.

    Attributes:
        images: Images seen.
        epochs: Epochs.
        loss: Mean loss per pixel before it.
        evaluation: Evaluation of its images.
        test: What was to be answered, at the confidence of this snapshot's share; None: all seeds were sampled.
        gap: How far its errors on unseen images are above those on training images; None: not asked for.
    """

    images: int
    epochs: float
    loss: float
    evaluation: Evaluation
    test: SequentialTest | None = None
    gap: LossGap | None = None

    @property
    def rate(self) -> CopyRate:
        return self.evaluation.rate

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval: Wilson's, or, where sampling stopped with the answer, one that allows for that."""
        return self.rate.interval if self.test is None else self.rate.anytime_interval

    @property
    def answer(self) -> bool | None:
        """Of the test; None where there is none, or it is open."""
        return None if self.test is None else self.evaluation.answer(self.test)


def evaluate_snapshot(
    run: Path,
    images: int,
    denoiser: Denoiser | WrappedDenoiser,
    seeds: Sequence[int],
    sampler: SamplerConfig,
    detector: CopyDetector,
    test: SequentialTest | None,
    stage: str = "",
    progress: Progress = silent,
    keep: int | None = 0,
) -> Evaluation:
    """The snapshot of a run after so many `images`, evaluated until the test is answered; the run's folder keeps what
    is known of it, with the first `keep` images (None: all)."""
    identity = identity_of(fingerprint(denoiser), sampler, detector, next(denoiser.parameters()).device)
    store = SeedStore.within(run / FOLDER / "audits", f"{images:09d}", identity)
    found = evaluate(
        denoiser, seeds, sampler, detector, store, test, images=keep, copies=COPIES, stage=stage, progress=progress
    )  # fmt: skip
    assert found is not None  # on one rank
    return found


@dataclass(frozen=True, eq=False)
class Trajectory:
    """R_mem over training time.

    Attributes:
        run: The run's folder.
        points: The audited snapshots, oldest first.
        left_out: Images seen of those that were not audited.
        losses: The lines of the run's `stats.jsonl`.
        training: The run's training set.
        settings: What decides the verdicts, in JSON types.
        test: What was to be answered; None: R_mem itself.
        looks: How many snapshots could have been audited, where which ones were depended on what was seen (order
            "bisect"), else None.
    """

    run: Path
    points: tuple[Point, ...]
    left_out: tuple[int, ...]
    losses: tuple[Stats, ...]
    training: ImageSet
    settings: dict[str, Any]
    test: SequentialTest | None = None
    looks: int | None = None

    @cached_property
    def best(self) -> Point:
        """The snapshot of the highest R_mem."""
        return max(self.points, key=lambda point: point.ratio)

    @property
    def r_mem(self) -> float:
        """The run's R_mem: the highest over its snapshots (Gu et al., arXiv 2310.02664)."""
        return self.best.ratio

    @cached_property
    def interval(self) -> tuple[float, float]:
        """A 95 % interval of the highest R_mem among the audited snapshots; it allows for its being the highest of
        several estimates (`diffmem.memorization.highest_interval`), and for how these depend on each other."""
        counts = [(point.count, point.total) for point in self.points]
        same = len({tuple(point.evaluation.seeds.tolist()) for point in self.points}) == 1
        return highest_interval(
            counts,
            looks=self.looks,
            anytime=self.test is not None,
            verdicts=[point.evaluation.memorized for point in self.points] if same else None,
        )

    @property
    def answer(self) -> bool | None:
        """Whether some snapshot's R_mem is as high as the test asks; None where that is open."""
        # Nothing is known of what was left out.
        return SequentialTest.of_highest([*(point.answer for point in self.points), *(None for _ in self.left_out)])

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Why the newest snapshot's figure must not be relied on, one sentence each: its images are of a single color,
        or nearly all the same. Such images of earlier snapshots may be those of a network that has learned little."""
        collapse = self.points[-1].evaluation.collapse
        return tuple(collapse.suspicions(len(self.training), single_color_share(self.training.images)))

    @cached_property
    def gap_warning(self) -> Point | None:
        """The first audited snapshot with a loss gap that is more than images differ, at 5 % over all snapshots and
        noise levels (`diffmem.evaluation.first_warning`); None where there is none, or gaps were not measured."""
        found = first_warning([point.gap for point in self.points if point.gap is not None], len(self.points))
        return None if found is None else self.points[found.place]

    def onset(self, level: float = _ONSET) -> Point | None:
        """The first audited snapshot whose R_mem is at least `level`."""
        return next((point for point in self.points if point.ratio >= level), None)

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain JSON types, without the images."""
        onset = self.onset()
        return {
            "run": str(self.run),
            "r_mem": self.r_mem,
            "interval": list(self.interval),
            "warnings": list(self.warnings),
            "best": self.best.images,
            "onset": None if onset is None else {"level": _ONSET, "images": onset.images, "epochs": onset.epochs},
            **({} if self.points[0].gap is None else {"loss_gap": self._gap_to_dict()}),
            "test": None
            if self.test is None
            else {"at_least": self.test.at_least, "confidence": self.test.confidence, "answer": self.answer},
            "snapshots": [
                {
                    "images": point.images,
                    "epochs": point.epochs,
                    "loss": point.loss,
                    **point.rate.to_dict(),
                    "interval": list(point.interval),
                    "answer": point.answer,
                    **({} if point.gap is None else {"loss_gap": [level._asdict() for level in point.gap.levels]}),
                    "seeds": format_seeds(sorted(point.evaluation.seeds.tolist())),
                }
                for point in self.points
            ],
            "left_out": list(self.left_out),
            "training": {"source": self.training.source, "images": len(self.training)},
            "settings": self.settings,
            "versions": {"diffmem": diffmem.__version__, "torch": torch.__version__},
        }

    def _gap_to_dict(self) -> dict[str, Any]:
        warning = self.gap_warning
        return {
            "warning": None if warning is None else {"images": warning.images, "epochs": warning.epochs},
            "unseen": self.settings["unseen"],
        }

    def save(self, folder: str | Path | None = None) -> Path:
        """Writes `trajectory.html`, `.json`, `.csv` and `.svg` into `folder` (default: `trajectory/` in the run's
        folder) and returns the path of the page."""
        from diffmem.evaluation.trajectory_report import write_page

        return write_page(self, self.run / FOLDER if folder is None else Path(folder))


def trajectory(
    run: str | Path,
    *,
    data: ImageSource | None = None,
    seeds: Sequence[int] = PROTOCOL_SEEDS,
    every: int | None = None,
    order: str = "newest",
    stop: SequentialTest | None = None,
    sampler: SamplerConfig = SamplerConfig(),  # noqa: B008 (frozen)
    criterion: str | None = None,
    loss_gap: bool = False,
    holdout: ImageSource | None = None,
    device: str = "auto",
    model: Model | None = None,
    progress: Progress = silent,
) -> Trajectory:
    """R_mem of the snapshots of a run.

    Each image is audited against the run's training set by the rule of `diffmem.audit` (with mirrored images too, where
    the run has them), and remembered in the run's folder: what was audited before, in the same way, is not again.
    Ctrl-C loses the current batch only.

    Args:
        run: The run's folder.
        data: The training set, where the run does not know where it lies.
        seeds: The images of each snapshot.
        every: Only the first snapshot of every so many images, and the last.
        order: "newest" or "oldest" first, or "bisect": the last one and then, where copying is found there, those that
            narrow down where R_mem passes the share that `stop` asks about (0.5 without), as if it only grew.
        stop: End sampling at each snapshot as soon as this test is answered there; its confidence is shared among the
            snapshots.
        sampler: The sampler and its settings.
        criterion: By which images are copies, in place of the ratio rule, so that a result can be shown not to hang on
            it: "calibrated_l2", "tile_max", "authenticity", … (`diffmem.memorization.CriterionDetector`).
        loss_gap: Measure at each snapshot how far the denoising errors on unseen images are above those on training
            images, by noise level, which warns before there are copies (`diffmem.evaluation.LossGapMeter`).
        holdout: Real images that the model has not seen, for `loss_gap`; default: those of the run's source that its
            training set leaves out.
        device: "cpu", "cuda" or "auto".
        model: As for `diffmem.training.train`, where the run trained a network of your own.
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: There is no run, no snapshot, or another training set.
    """
    if order not in ORDERS:
        raise InputError(f"order is {order!r}, but must be one of {', '.join(ORDERS)}")
    check_criterion(criterion)
    seeds = checked_seeds(seeds)
    folder = RunFolder.open(run)
    there = folder.snapshots()
    if not there:
        raise InputError(
            f"{folder.path}: no snapshots yet; the run writes one at its end, or earlier with snapshot_images=…"
        )
    records = _thinned(there, every)
    training = folder.training_images(data, progress)
    place = pick_device(device)
    denoiser = load(folder.checkpoint(records[-1]), place, model=model)
    flip = folder.config.xflip
    image_shape = (denoiser.channels, denoiser.resolution, denoiser.resolution)
    detector = sample_detector(training, image_shape, place, flip=flip, criterion=criterion, progress=progress)
    sampler.plan(denoiser)  # raises where its settings do not fit
    meter = None
    if loss_gap:
        meter = LossGapMeter(training, _unseen(folder, holdout, progress))
    elif holdout is not None:
        raise InputError("holdout: unseen images are for loss_gap=True")
    if stop is None:  # else few batches may do
        sampler = decide_compile(denoiser, sampler, len(seeds) * len(records))
    test = None if stop is None else stop.shared_among(len(records))
    points: dict[int, Point] = {}

    def audit(record: SnapshotRecord) -> Point:
        # One network, whose weights change: what was compiled once serves all snapshots.
        denoiser.load_state_dict(load(folder.checkpoint(record), place, model=model).state_dict())
        stage = f"sampling: snapshot {len(points) + 1} of {len(records)}, {record.epochs:,.0f} epochs"
        found = evaluate_snapshot(
            folder.path, record.images, denoiser, seeds, sampler, detector, test, stage, progress
        )  # fmt: skip
        gap = None if meter is None else meter.measure(denoiser)
        return Point(record.images, record.epochs, record.loss, found, test, gap)

    for record in _chosen(records, order, points, _ONSET if stop is None else stop.at_least):
        points[record.images] = audit(record)
    found = Trajectory(
        folder.path,
        tuple(points[record.images] for record in records if record.images in points),
        tuple(record.images for record in there if record.images not in points),
        tuple(folder.stats()),
        training,
        {**sampler.identity, "training": training.fingerprint, "flip": flip, "device": place.type,
         "seeds": format_seeds(seeds), "order": order, "every": every, "ema": folder.averaging(),
         **({} if criterion in (None, "ratio") else {"criterion": criterion}),
         **({} if meter is None else {"unseen": meter.unseen_images})},
        stop,
        len(records) if order == "bisect" else None,
    )  # fmt: skip
    for warning in found.warnings:
        _log.warning("%s: the newest snapshot: %s", folder.path, warning)
    return found


def _unseen(folder: RunFolder, holdout: ImageSource | None, progress: Progress) -> ImageSet:
    """The images to hold those of a run against: `holdout`, or all of the run's source."""
    if holdout is not None:
        return load_images(holdout, progress=progress)
    spec = folder.dataset
    if spec is None:
        raise InputError(f"{folder.path}: does not record where its training set is: pass unseen images as holdout=…")
    if spec.size is None:
        raise InputError(f"{folder.path}: was trained on all images of its source: pass unseen ones as holdout=…")
    return replace(spec, size=None, seed=None).load(progress)


def _thinned(records: list[SnapshotRecord], every: int | None) -> list[SnapshotRecord]:
    """The first record of every `every` images, and the last."""
    if every is None:
        return records
    if every < 1:
        raise InputError(f"every is {every}, but must be at least 1 image")
    previous = [0, *(record.images for record in records)]
    first = [record.images // every > before // every for before, record in zip(previous, records, strict=False)]
    return [record for record, chosen in zip(records, first, strict=True) if chosen or record is records[-1]]


def _chosen(
    records: list[SnapshotRecord], order: str, points: dict[int, Point], level: float
) -> Iterator[SnapshotRecord]:
    """The records to audit, one after the other; `points` holds what came of those before."""
    if order != "bisect":
        yield from reversed(records) if order == "newest" else records
        return

    def reached(record: SnapshotRecord) -> bool:
        return points[record.images].ratio >= level

    below, above = -1, len(records) - 1
    yield records[above]
    if not reached(records[above]):
        return  # it never got there, if it only grew
    while above - below > 1:
        middle = (below + above) // 2
        yield records[middle]
        if reached(records[middle]):
            above = middle
        else:
            below = middle
