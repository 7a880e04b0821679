"""A callback of training that audits as the model learns, and can end the run once a test is answered."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffmem.data import read_data
from diffmem.devices import pick_device
from diffmem.errors import InputError
from diffmem.evaluation.detectors import sample_detector
from diffmem.evaluation.evaluator import Evaluation, decide_compile
from diffmem.evaluation.trajectories import Point, evaluate_snapshot
from diffmem.memorization import SequentialTest
from diffmem.sampling import SamplerConfig
from diffmem.training import Callback, Plan, Snapshot, StopDecision


class AuditEvery(Callback):
    """Audits the snapshots of a run as they are made, with few images each.

    Args:
        data: The run's training set, as for `diffmem.training.train`.
        out: The run's folder, which keeps the audits where `diffmem.evaluation.trajectory` finds them.
        every: Audit the first snapshot of every so many images; None: all. The last one is always audited.
        samples: Images per audit at most, those of the protocol's first seeds.
        stop: "Is R_mem at least …?": an audit ends as soon as this test is answered at its snapshot, and the run ends
            at the first snapshot that answers yes (R_mem of a run is the highest over its snapshots, so that a no is
            known at the end only). Its confidence covers all audits of the run together.
        flip: Compare mirrored images too, for a run with xflip.
        sampler: The sampler and its settings.
        criterion: By which images are copies; see `diffmem.evaluation.trajectory`.
        device: Device of the sampler.
        on_audit: Called with each finished audit.
    """

    def __init__(
        self,
        data: Any,
        out: str | Path,
        *,
        every: int | None = None,
        samples: int = 256,
        stop: SequentialTest | None = None,
        flip: bool = False,
        sampler: SamplerConfig = SamplerConfig(),  # noqa: B008 (frozen)
        criterion: str | None = None,
        device: str = "auto",
        on_audit: Callable[[Point], None] = lambda point: None,
    ):
        if samples < 1 or (every is not None and every < 1):
            raise InputError(f"samples is {samples} and every is {every}, but both must be at least 1")
        self.out, self.every = Path(out), every
        self.seeds = range(samples)
        self.stop, self.sampler, self.on_audit = stop, sampler, on_audit
        self.device = pick_device(device)
        self.training, _ = read_data(data)
        self.detector = sample_detector(
            self.training, self.training.image_shape, self.device, flip=flip, criterion=criterion
        )
        self.points: list[Point] = []
        self.keep_images: int | None = 0  # of those of an audit; None: all

    def on_evaluation(self, snapshot: Snapshot, found: Evaluation) -> None:
        """For subclasses: called with every audit, before `on_audit`.

        Args:
            snapshot: The snapshot.
            found: What was sampled and judged of it.
        """

    def on_start(self, plan: Plan) -> None:
        self.planned, self.last = plan.images, plan.resumed_at
        interval = max(self.every or 0, plan.snapshot_images or plan.images)
        self.looks = math.ceil(plan.images / interval)
        self.test = None if self.stop is None else self.stop.shared_among(self.looks)

    def on_snapshot(self, snapshot: Snapshot) -> StopDecision | None:
        last, self.last = self.last, snapshot.images
        due = self.every is None or snapshot.images // self.every > last // self.every
        if not due and snapshot.images < self.planned:
            return None
        if self.stop is None:  # else few batches may do
            self.sampler = decide_compile(snapshot.denoiser, self.sampler, len(self.seeds) * self.looks)
        found = evaluate_snapshot(
            self.out, snapshot.images, snapshot.denoiser, self.seeds, self.sampler, self.detector, self.test,
            keep=self.keep_images,
        )  # fmt: skip
        self.on_evaluation(snapshot, found)
        point = Point(snapshot.images, snapshot.epochs, snapshot.loss, found, self.test)
        self.points.append(point)
        self.on_audit(point)
        if not point.answer or self.stop is None:
            return StopDecision(score=point.ratio)
        reason = f"R_mem is at least {self.stop.at_least:.4g} ({point.count} of {point.total} images are copies)"
        return StopDecision(point.ratio, stop=True, reason=reason)
