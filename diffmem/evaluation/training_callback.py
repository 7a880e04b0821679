"""A callback of training that audits as the model learns, and can end the run once a question is answered."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffmem.devices import pick_device
from diffmem.errors import InputError
from diffmem.evaluation import sample_detector
from diffmem.evaluation.snapshot_audit import AuditFiles, SnapshotAudit, audit_snapshot, way_of
from diffmem.evaluation.trajectories import FOLDER, Point
from diffmem.memorization import SequentialTest
from diffmem.models import fingerprint
from diffmem.sampling import SamplerConfig
from diffmem.training import Callback, Plan, Snapshot, StopDecision, read_data


class AuditEvery(Callback):
    """Audits the snapshots of a run as they are made, with few images each.

    Args:
        data: The run's training set, as for `diffmem.training.train`.
        out: The run's folder, which keeps the audits where `diffmem.evaluation.trajectory` finds them.
        every: Audit the first snapshot of every so many images; None: all. The last one is always audited.
        samples: Images per audit at most, those of the protocol's first seeds.
        question: "Is R_mem at least …?": an audit ends as soon as this is answered at its snapshot, and the run ends at
            the first snapshot that answers yes (R_mem of a run is the highest over its snapshots, so that a no is known
            at the end only). Its confidence covers all audits of the run together.
        flip: Compare mirrored images too, for a run with xflip.
        settings: Of the sampler.
        device: Of the sampler.
        on_audit: Called with each finished audit.
    """

    def __init__(
        self,
        data: Any,
        out: str | Path,
        *,
        every: int | None = None,
        samples: int = 256,
        question: SequentialTest | None = None,
        flip: bool = False,
        settings: SamplerConfig = SamplerConfig(),  # noqa: B008 (frozen)
        device: str = "auto",
        on_audit: Callable[[Point], None] = lambda point: None,
    ):
        if samples < 1 or (every is not None and every < 1):
            raise InputError(f"an audit of {samples} samples every {every} images: both must be at least 1")
        self.out, self.every = Path(out), every
        self.seeds = range(samples)
        self.question, self.flip, self.settings, self.on_audit = question, flip, settings, on_audit
        self.device = pick_device(device)
        self.training, _ = read_data(data)
        self.detector = sample_detector(self.training, self.training.image_shape, self.device, flip=flip)
        self.points: list[Point] = []
        self.files = AuditFiles(
            self.out / FOLDER / "audits", way_of(settings, self.training.fingerprint, flip, self.device.type)
        )

    def on_start(self, plan: Plan) -> None:
        self.planned, self.last = plan.images, plan.resumed_at
        interval = max(self.every or 0, plan.snapshot_images or plan.images)
        self.looks = math.ceil(plan.images / interval)
        self.asked = None if self.question is None else self.question.shared_among(self.looks)

    def on_snapshot(self, snapshot: Snapshot) -> StopDecision | None:
        last, self.last = self.last, snapshot.images
        due = self.every is None or snapshot.images // self.every > last // self.every
        if not due and snapshot.images < self.planned:
            return None
        name = fingerprint(snapshot.denoiser)

        def after_batch(audited: SnapshotAudit) -> None:
            self.files.write(snapshot.images, name, audited)

        audited = audit_snapshot(
            snapshot.denoiser,
            self.detector,
            self.seeds,
            settings=self.settings,
            question=self.asked,
            known=self.files.read(snapshot.images, name),
            after_batch=after_batch,
        )
        point = Point(snapshot.images, snapshot.epochs, snapshot.loss, audited.of(self.seeds), self.asked)
        self.points.append(point)
        self.on_audit(point)
        if not point.answer:
            return StopDecision(score=point.ratio)
        reason = f"R_mem is at least {self.question.at_least:.4g} ({point.count} of {point.total} images are copies)"
        return StopDecision(point.ratio, stop=True, reason=reason)
