"""`trajectory`: the memorization ratio of every snapshot of a run, and when copying began."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import diffmem
from diffmem.data import ImageSet
from diffmem.devices import pick_device
from diffmem.errors import InputError
from diffmem.evaluation import checked_seeds, format_seeds, sample_detector
from diffmem.evaluation.snapshot_audit import PROTOCOL_SEEDS, AuditFiles, SnapshotAudit, audit_snapshot, way_of
from diffmem.memorization import CopyRate, ReportsRate, SequentialTest, highest_interval
from diffmem.memorization.plausibility import single_color_share
from diffmem.models import fingerprint, load
from diffmem.progress import Progress, silent
from diffmem.sampling import SamplerConfig
from diffmem.training import RunFolder, SnapshotRecord, Stats

FOLDER = "trajectory"  # in the run's folder
ORDERS = ("newest", "oldest", "bisect")
_ONSET = 0.5  # what bisection looks for where no question says otherwise


@dataclass(frozen=True, eq=False)
class Point(ReportsRate):
    """R_mem of one snapshot.

    Attributes:
        images: Images seen.
        epochs: Epochs.
        loss: Mean loss per pixel before it.
        audited: What was audited.
        question: The one that the audit was to answer, at the confidence of this snapshot's share; None: all seeds.
    """

    images: int
    epochs: float
    loss: float
    audited: SnapshotAudit
    question: SequentialTest | None = None

    @property
    def rate(self) -> CopyRate:
        return self.audited.rate

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval: Wilson's, or, where sampling stopped with the answer, one that allows for that."""
        return self.rate.interval if self.question is None else self.rate.anytime_interval

    @property
    def answer(self) -> bool | None:
        if self.question is None:
            return None
        of = len(PROTOCOL_SEEDS) if self.audited.seeds.max() in PROTOCOL_SEEDS else None
        return self.question.answer(self.count, self.total, of)


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
        question: What was asked; None: R_mem itself.
        looks: How many snapshots could have been audited, where which ones were depended on what was seen (order
            "bisect"), else None.
    """

    run: Path
    points: tuple[Point, ...]
    left_out: tuple[int, ...]
    losses: tuple[Stats, ...]
    training: ImageSet
    settings: dict[str, Any]
    question: SequentialTest | None = None
    looks: int | None = None

    @cached_property
    def best(self) -> Point:
        """The snapshot of the highest R_mem."""
        return max(self.points, key=lambda point: point.ratio)

    @property
    def r_mem(self) -> float:
        """The run's R_mem: the highest over its snapshots (Gu et al., arXiv 2310.02664)."""
        return self.best.ratio

    @property
    def interval(self) -> tuple[float, float]:
        """A 95 % interval of the highest R_mem among the audited snapshots; it allows for its being the highest of
        several estimates (`diffmem.memorization.highest_interval`)."""
        counts = [(point.count, point.total) for point in self.points]
        return highest_interval(counts, looks=self.looks, anytime=self.question is not None)

    @property
    def answer(self) -> bool | None:
        """Whether some snapshot's R_mem is as high as the question asks; None where that is open."""
        # Nothing is known of what was left out.
        return SequentialTest.of_highest([*(point.answer for point in self.points), *(None for _ in self.left_out)])

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Why the newest snapshot's figure must not be relied on, one sentence each: its images are of a single color,
        or nearly all the same. Such images of earlier snapshots may be those of a network that has learned little."""
        collapse = self.points[-1].audited.collapse()
        if collapse is None:
            return ()
        return tuple(collapse.suspicions(len(self.training), single_color_share(self.training.images)))

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
            "question": None
            if self.question is None
            else {
                "at_least": self.question.at_least,
                "confidence": self.question.confidence,
                "answer": self.answer,
            },
            "snapshots": [
                {
                    "images": point.images,
                    "epochs": point.epochs,
                    "loss": point.loss,
                    **point.rate.to_dict(),
                    "interval": list(point.interval),
                    "answer": point.answer,
                    "seeds": format_seeds(sorted(point.audited.seeds.tolist())),
                }
                for point in self.points
            ],
            "left_out": list(self.left_out),
            "training": {"source": self.training.source, "images": len(self.training)},
            "settings": self.settings,
            "versions": {"diffmem": diffmem.__version__, "torch": torch.__version__},
        }

    def save(self, folder: str | Path | None = None) -> Path:
        """Writes `trajectory.html`, `.json`, `.csv` and `.svg` into `folder` (default: `trajectory/` in the run's
        folder) and returns the path of the page."""
        from diffmem.evaluation.trajectory_report import write_page

        return write_page(self, self.run / FOLDER if folder is None else Path(folder))


def trajectory(
    run: str | Path,
    *,
    data: Any = None,
    seeds: Sequence[int] = PROTOCOL_SEEDS,
    every: int | None = None,
    order: str = "newest",
    question: SequentialTest | None = None,
    settings: SamplerConfig = SamplerConfig(),  # noqa: B008 (frozen)
    device: str = "auto",
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
            narrow down where R_mem passes the question's share (0.5 without a question), as if it only grew.
        question: Stop at each snapshot as soon as this is answered there; the confidence is shared among the snapshots.
        settings: Of the sampler.
        device: "cpu", "cuda" or "auto".
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: There is no run, no snapshot, or another training set.
    """
    if order not in ORDERS:
        raise InputError(f"order is {order!r}, but must be one of {', '.join(ORDERS)}")
    seeds = checked_seeds(seeds)
    folder = RunFolder.open(run)
    there = folder.snapshots()
    if not there:
        raise InputError(
            f"{folder.path}: holds no snapshot; the run makes one at its end, with snapshot_images=… before"
        )
    records = _thinned(there, every)
    training = folder.training_images(data, progress)
    place = pick_device(device)
    denoiser = load(folder.checkpoint(records[-1]), place)
    flip = folder.config.xflip
    image_shape = (denoiser.channels, denoiser.resolution, denoiser.resolution)
    detector = sample_detector(training, image_shape, place, flip=flip, progress=progress)
    settings.plan(denoiser)  # raises where the settings do not fit
    way = way_of(settings, training.fingerprint, flip, place.type)
    files = AuditFiles(folder.path / FOLDER / "audits", way)
    shared = None if question is None else question.shared_among(len(records))
    points: dict[int, Point] = {}

    def audit(record: SnapshotRecord) -> Point:
        # One network, whose weights change: what was compiled once serves all snapshots.
        denoiser.load_state_dict(load(folder.checkpoint(record), place).state_dict())
        name = fingerprint(denoiser)
        known = files.read(record.images, name)
        stage = f"sampling: snapshot {len(points) + 1} of {len(records)}, {record.epochs:,.0f} epochs"

        def after_batch(audited: SnapshotAudit) -> None:
            files.write(record.images, name, audited)
            asked = audited.of(seeds)
            progress(f"{stage}: {asked.ratio:.1%} copies", asked.total, len(seeds))

        progress(stage, 0, len(seeds))
        audited = audit_snapshot(
            denoiser, detector, seeds, settings=settings, question=shared, known=known, after_batch=after_batch
        )
        return Point(record.images, record.epochs, record.loss, audited.of(seeds), shared)

    for record in _chosen(records, order, points, _ONSET if question is None else question.at_least):
        points[record.images] = audit(record)
    return Trajectory(
        folder.path,
        tuple(points[record.images] for record in records if record.images in points),
        tuple(record.images for record in there if record.images not in points),
        tuple(folder.stats()),
        training,
        {**way, "seeds": format_seeds(seeds), "order": order, "every": every, "ema": folder.averaging()},
        question,
        len(records) if order == "bisect" else None,
    )


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
