"""`run_unit`: trains, samples and audits one unit, in a folder from which it continues when interrupted.

The folder holds `unit.json` (what is run), `run/` (the training run, with its last and its best snapshot),
`audits.json` (R_mem of each snapshot so far, and costs), and when all is done `result.json` and `gallery.npz`
(generated images of the best snapshot beside the training images nearest to them).
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.data import ImageSet
from diffmem.errors import InputError
from diffmem.memorization import Audit, Question, anytime_interval, audit, wilson_interval
from diffmem.memorization.audit import software_versions
from diffmem.models import Denoiser
from diffmem.sampling import sample_batches
from diffmem.search import TrainingIndex
from diffmem.studies.unit import Unit
from diffmem.training import KeepLast, Observer, Plan, Snapshot, Verdict, train
from diffmem.whole import whole_file

UNIT, RUN, AUDITS, RESULT, GALLERY = "unit.json", "run", "audits.json", "result.json", "gallery.npz"
SHOWN = 16  # images in a gallery


class InterruptedUnitError(Exception):
    """The unit was asked to stop before its end; run again, it continues."""


@dataclass(frozen=True)
class SnapshotAudit:
    """R_mem of one snapshot: copies among the images of seeds 0 … total − 1, and what the run had cost by then.

    training_seconds, sampling_seconds: wall-clock time since the start of the unit, over all its continuations.
    """

    images: int
    epochs: float
    loss: float
    count: int
    total: int
    training_seconds: float
    sampling_seconds: float

    @property
    def ratio(self) -> float:
        return self.count / self.total


@dataclass(frozen=True)
class Result:
    """What a unit found.

    key, size, repetition: of the unit. count, total: copies and images of the snapshot with the highest share, R_mem.
    decided: the answer to the unit's question, None where it has none or it stayed open; censored: the run was ended
    by its answer, so that R_mem is at least what was seen. images, epochs: length of the run; best_images: of the
    snapshot. training_seconds, sampling_seconds: wall-clock. parameters: of the network. training_set: fingerprint.
    """

    key: str
    size: int
    repetition: int
    count: int
    total: int
    decided: bool | None
    censored: bool
    images: int
    epochs: float
    best_images: int
    parameters: int
    training_seconds: float
    sampling_seconds: float
    training_set: str
    snapshots: tuple[SnapshotAudit, ...]
    versions: dict[str, str]

    @property
    def r_mem(self) -> float:
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval: of sampling noise alone, another run differs by more."""
        return wilson_interval(self.count, self.total)

    @property
    def seconds(self) -> float:
        return self.training_seconds + self.sampling_seconds

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "r_mem": self.r_mem, "interval": list(self.interval)}


def read_result(folder: Path) -> Result | None:
    """The result that lies in a unit's folder, None where there is none yet."""
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        del values["r_mem"], values["interval"]
        return Result(**{**values, "snapshots": tuple(SnapshotAudit(**each) for each in values["snapshots"])})
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not the result of a unit ({error}); remove its folder to run it again") from None


def run_unit(unit: Unit, folder: str | Path, device: str = "auto") -> Result:
    """The result of `unit`, from its `folder` where it lies there; else trained, sampled and audited, continuing what
    lies there.

    Snapshots are audited with seeds 0, 1, … as training goes on. An audit ends early when it is all but certain
    (99.9 %, at whatever image one looks) that its snapshot is not the best one; with a question also when that is
    answered, and a yes ends the run. device: "cpu", "cuda", or "auto". Raises InputError where data, network and
    training do not fit, DivergedError for a loss that is no number, InterruptedUnitError when stopped by SIGINT or
    SIGTERM.
    """
    folder = Path(folder)
    if (known := read_result(folder)) is not None:
        return known
    images = unit.setting.data.training_set(unit.size, unit.repetition)
    config = unit.setting.config(images, unit.repetition)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / UNIT, unit.to_json())
    steps = math.ceil(config.images / config.batch)
    snapshot_steps = math.ceil(steps / unit.setting.snapshots)
    audits = _Audits(unit, images, folder, looks=math.ceil(steps / snapshot_steps), device=device)
    run = train(
        config,
        images,
        folder / RUN,
        snapshot_images=snapshot_steps * config.batch,
        device=device,
        keep=KeepLast(1),
        state_minutes=2.0,
        resume=True,
        observers=[audits],
    )
    if run.ending == "interrupted":
        raise InterruptedUnitError(f"{folder}: interrupted after {run.images:,} of {config.images:,} images")
    result = audits.result(run.images, run.images / len(images), censored=run.ending == "stopped")
    _write_json(folder / RESULT, result.to_json())
    shutil.rmtree(folder / RUN / "state", ignore_errors=True)
    return result


class _Audits(Observer):
    """Audits every snapshot of a run, and ends the run when its question is answered."""

    def __init__(self, unit: Unit, training: ImageSet, folder: Path, looks: int, device: str):
        self.unit, self.training, self.folder = unit, training, folder
        self.index = TrainingIndex(training, device=device)
        self.question = None if unit.at_least is None else Question(unit.at_least).shared_among(looks)
        self.audits: list[SnapshotAudit] = []

    def started(self, plan: Plan) -> None:
        path = self.folder / AUDITS
        known = json.loads(path.read_text()) if path.exists() else []
        self.audits = [SnapshotAudit(**each) for each in known if each["images"] <= plan.resumed_at]
        # What was spent on steps that are now done again is spent: the last line knows it.
        self.training_before, self.sampling_seconds = (
            (known[-1]["training_seconds"], known[-1]["sampling_seconds"]) if known else (0.0, 0.0)
        )
        self.parameters = plan.parameters
        self.began, self.sampling_now = time.perf_counter(), 0.0

    @property
    def best(self) -> SnapshotAudit | None:
        return max(self.audits, key=lambda audited: audited.ratio, default=None)

    def snapshot(self, snapshot: Snapshot) -> Verdict:
        began = time.perf_counter()
        count, total, shown = self._audited(snapshot.denoiser)
        self.sampling_now += time.perf_counter() - began
        ratio = count / total
        if self.best is None or ratio > self.best.ratio:
            self._write_gallery(shown)
        self.audits.append(
            SnapshotAudit(
                snapshot.images,
                snapshot.epochs,
                snapshot.loss,
                count,
                total,
                self.training_before + time.perf_counter() - self.began - self.sampling_now,
                self.sampling_seconds + self.sampling_now,
            )
        )
        _write_json(self.folder / AUDITS, [asdict(each) for each in self.audits])
        if self.question is not None and self.question.answer(count, total):
            return Verdict(ratio, stop=True, reason=f"R_mem is at least {self.unit.at_least:g}: {count} of {total}")
        return Verdict(ratio)

    def _audited(self, denoiser: Denoiser) -> tuple[int, int, Audit]:
        """Copies, images, and the audit of the first batch."""
        setting = self.unit.setting
        settings = setting.sample_settings()
        count = total = 0
        first = None
        for samples in sample_batches(
            denoiser,
            range(setting.samples),
            solver=settings.solver,
            batch=min(settings.batch, setting.samples),
            compile={"auto": "auto", "on": True, "off": False}[settings.compile],
            **settings.solver_arguments(),
        ):
            audited = audit(ImageSet(samples.images.numpy()), self.training, index=self.index)
            first = first or audited
            count, total = count + audited.count, total + audited.total
            best = self.best
            if best is not None and (
                anytime_interval(count, total, 0.999)[1] < anytime_interval(best.count, best.total, 0.999)[0]
            ):
                break
            if self.question is not None and self.question.answer(count, total) is not None:
                break
        return count, total, first

    def _write_gallery(self, audited: Audit) -> None:
        rows = slice(SHOWN)
        with whole_file(self.folder / GALLERY) as partial, partial.open("wb") as stream:
            np.savez_compressed(
                stream,
                generated=audited.generated.images[rows],
                nearest=self.training.images[audited.neighbors.indices[rows, 0]],
                memorized=audited.memorized[rows],
            )

    def result(self, images: int, epochs: float, censored: bool) -> Result:
        best, last = self.best, self.audits[-1]
        answers = [] if self.question is None else [self.question.answer(a.count, a.total) for a in self.audits]
        if any(answers):
            decided = True
        else:
            # The highest is below only where all are.
            decided = False if answers and all(answer is False for answer in answers) else None
        return Result(
            key=self.unit.key,
            size=self.unit.size,
            repetition=self.unit.repetition,
            count=best.count,
            total=best.total,
            decided=decided,
            censored=censored,
            images=images,
            epochs=epochs,
            best_images=best.images,
            parameters=self.parameters,
            training_seconds=last.training_seconds,
            sampling_seconds=last.sampling_seconds,
            training_set=self.training.fingerprint,
            snapshots=tuple(self.audits),
            versions=software_versions(),
        )


def _write_json(path: Path, values: Any) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(values, indent=1) + "\n")
