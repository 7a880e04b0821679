"""`run_trial`: trains, samples and audits one trial, in a folder from which it continues when interrupted.

The folder holds `trial.json` (what is run), `run/` (the training run, with its last and its best snapshot),
`audits.json` (R_mem of each snapshot so far, and costs), and when all is done `result.json` and `gallery.npz`
(generated images of the best snapshot beside the training images nearest to them).
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from diffmem.atomic_io import atomic_file, atomic_write
from diffmem.data import ImageSet
from diffmem.devices import pick_device
from diffmem.errors import InputError
from diffmem.evaluation import Agreement, AuditEvery, Evaluation, Point, agreement, evaluate
from diffmem.inert.boundary import parsing
from diffmem.integrity import read_checked, save_arrays, sealed
from diffmem.memorization import CopyDetector, CopyRate, SequentialTest, highest_interval
from diffmem.memorization.result import software_versions
from diffmem.models import Denoiser, WrappedDenoiser, load
from diffmem.studies.checks import GENERATED, Check, checks
from diffmem.studies.leveling import LEVELED_OFF, NOISE, Level, audit_steps, level_of
from diffmem.studies.mixture import Mixture, MixtureResult, train_mixture
from diffmem.studies.trial import Setting, Trial
from diffmem.studies.watch import Watch, Watched, Watcher
from diffmem.training import KeepLast, Plan, Snapshot, StopDecision, images_of, snapshot_folder, train
from diffmem.training.provenance import arithmetic, code_fingerprint

TRIAL, RUN, AUDITS, RESULT, GALLERY = "trial.json", "run", "audits.json", "result.json", "gallery.npz"
SHOWN = 16  # images in a gallery


class InterruptedTrialError(Exception):
    """The trial was asked to stop before its end; run again, it continues."""


@dataclass(frozen=True)
class SnapshotResult:
    """R_mem of one snapshot: copies among the images of seeds 0 … total − 1, and what the run had cost by then.

    training_seconds, sampling_seconds: wall-clock time since the start of the trial, over all its continuations.
    answer: to the trial's test, None where it has none or it stayed open. watched: what else was found, where the
    setting has a watch. copies: which images are copies, as bits in the order of the seeds, compressed, in base 64;
    None in results that are older than the field.
    """

    images: int
    epochs: float
    loss: float
    count: int
    total: int
    training_seconds: float
    sampling_seconds: float
    answer: bool | None = None
    watched: Watched | None = None
    copies: str | None = None

    def __post_init__(self) -> None:
        memorized = self.memorized
        if memorized is not None and int(memorized.sum()) != self.count:
            raise InputError(f"copies: {int(memorized.sum())} verdicts say copy, but the count is {self.count}")

    @property
    def ratio(self) -> float:
        return CopyRate(self.count, self.total).ratio

    @property
    def memorized(self) -> np.ndarray | None:
        """Which images are copies, bool [total], in the order of the seeds; None where it is not known."""
        if self.copies is None:
            return None
        length = -(-self.total // 8)
        packed = zlib.decompressobj().decompress(base64.b64decode(self.copies), length)
        return np.unpackbits(np.frombuffer(packed, np.uint8), count=self.total).astype(bool)


def pack(memorized: np.ndarray) -> str:
    """Verdicts, bool [n], as `SnapshotResult.copies`."""
    return base64.b64encode(zlib.compress(np.packbits(memorized).tobytes(), 9)).decode()


@dataclass(frozen=True)
class Result:
    """What a run found.

    Attributes:
        key: Key of the run.
        size: N.
        repetition: Repetition of the run.
        count: Copies among the images of the snapshot with the highest share, R_mem.
        total: Images of that snapshot.
        decided: The answer to the run's test; None where it has none or it stayed open.
        censored: The run was ended by its answer, or by what it was watched for, so that R_mem is at least what was
            seen.
        images: Length of the run, images seen.
        epochs: Length of the run.
        best_images: Images seen at the snapshot with the highest share.
        parameters: Number of parameters of the network.
        training_seconds: Wall time.
        sampling_seconds: Wall time.
        training_set: Its fingerprint.
        snapshots: Each audited snapshot.
        versions: Versions of diffmem and what decides the numbers.
        at_least: Threshold of the run's test.
        looks: How many snapshots were to be audited.
        device: "cpu" or "cuda"; None where the run is older than the field.
        threads: Threads of the CPU; None where the run is older than the field.
        level_off: By how many standard errors R_mem may rise and count as level, where that ends the run.
        checks: What the rule does by itself and what other criteria say; none where the run is older, or has a test.
        alarms: Of unseen images, how many the rule calls copies, and how many there are; where they are watched.
        delta: Distance within which images count as the same in the three phases, root mean square in gray levels;
            where they are watched.
        mixture: What else was found of a trained mixture, where that was the run.
        agreement: How much two networks agree that were trained on disjoint halves, where they were the run; its counts
            are then those of both.
        arithmetic: How sums were formed: instruction sets of the CPU, or the GPU's name; None where the run is older
            than the field.
        code: The fingerprint of diffmem's Python files; None where the run is older than the field.
        tabled: The interval that a table of runs states; the table lacks the verdicts by image, of which it was formed.
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
    snapshots: tuple[SnapshotResult, ...]
    versions: dict[str, str]
    at_least: float | None = None
    looks: int | None = None
    device: str | None = None
    threads: int | None = None
    level_off: float | None = None
    checks: tuple[Check, ...] = ()
    alarms: tuple[int, int] | None = None
    delta: float | None = None
    mixture: MixtureResult | None = None
    agreement: Agreement | None = None
    arithmetic: str | None = None
    code: str | None = None
    tabled: tuple[float, float] | None = None

    @property
    def r_mem(self) -> float:
        return CopyRate(self.count, self.total).ratio

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 % interval of this run's R_mem, the highest over its snapshots: the noise of sampling, and that it is the
        highest of several estimates (`diffmem.memorization.highest_interval`); another run differs by more."""
        if self.tabled is not None:
            return self.tabled
        counts = [(audited.count, audited.total) for audited in self.snapshots] or [(self.count, self.total)]
        if self.at_least is None and self.snapshots and len(self.snapshots) < (self.looks or 0):
            # How many snapshots there are depends on what they showed: the run ended by it.
            return highest_interval(counts, looks=self.looks)
        if self.at_least is None:
            # Where only the highest is known (a table of runs), the others, which were no higher, count anyway.
            verdicts = [each for audited in self.snapshots if (each := audited.memorized) is not None]
            if verdicts and len(verdicts) == len(counts) == (self.looks or len(counts)):
                return highest_interval(counts, verdicts=verdicts)
            return highest_interval([*counts, *[(0, self.total)] * ((self.looks or 0) - len(counts))])
        # Which snapshots there are depends on the answers: the run ends with the first yes.
        return highest_interval(counts, looks=self.looks or len(counts), anytime=True)

    @property
    def seconds(self) -> float:
        return self.training_seconds + self.sampling_seconds

    @property
    def level(self) -> Level:
        """Whether R_mem had leveled off by the end of the run; see `diffmem.studies.leveling`."""
        return level_of([(each.epochs, each.count, each.total) for each in self.snapshots], self.noise)

    @property
    def noise(self) -> float:
        return NOISE if self.level_off is None else self.level_off

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "r_mem": self.r_mem, "interval": list(self.interval)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Result:
        """The result that `to_json` gave; fields of later versions, which may share the folder, are left out."""
        known = set(Result.__dataclass_fields__)
        values = {name: value for name, value in values.items() if name in known}
        alarms, tabled = values.get("alarms"), values.get("tabled")
        fields = {
            "snapshots": tuple(map(_snapshot_result, values["snapshots"])),
            "checks": tuple(map(Check.from_json, values.get("checks", ()))),
            "alarms": None if alarms is None else tuple(alarms),
            "tabled": None if tabled is None else tuple(tabled),
            "mixture": None if (mixture := values.get("mixture")) is None else MixtureResult(**mixture),
            "agreement": None
            if (found := values.get("agreement")) is None
            else Agreement(**{**found, "nearest": tuple(found["nearest"])}),
        }
        return Result(**{**values, **fields})


def _snapshot_result(values: Mapping[str, Any]) -> SnapshotResult:
    watched = values.get("watched")
    return SnapshotResult(**{**values, "watched": None if watched is None else Watched(**watched)})


def read_result(folder: Path) -> Result | None:
    """The result that lies in a trial's folder, None where there is none yet."""
    path = folder / RESULT
    if not path.exists():
        return None
    advice = "delete its folder to run it again"
    values = read_checked(path, advice)
    with parsing(path, "the result of a trial", advice):
        return Result.from_json(values)


def store_result(trial: Trial, result: Result, folder: Path) -> None:
    """Writes a result that was made elsewhere, where `run_trial` would leave it.

    Args:
        trial: The trial.
        result: Its result.
        folder: Its folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / TRIAL, trial.to_json())
    _write_json(folder / RESULT, result.to_json())


def run_trial(trial: Trial, folder: str | Path, device: str = "auto") -> Result:
    """The result of `trial`, from its `folder` where it lies there; else trained, sampled and audited, continuing what
    lies there.

    Snapshots are audited as training goes on (see `diffmem.evaluation.AuditEvery`); with a test a yes ends the run.
    What depends on the machine's state is set for the length of the run: `setting.threads`, and that denormal numbers
    count as zero. So on one kind of device the result is that of the run, whoever makes it.

    Args:
        trial: The run.
        folder: Its folder.
        device: "cpu", "cuda", or "auto".

    Raises:
        InputError: Data, network and training do not fit together.
        DivergedError: The loss is not a number.
        InterruptedTrialError: SIGINT or SIGTERM stopped it.
    """
    folder = Path(folder)
    if (known := read_result(folder)) is not None:
        return known
    if trial.setting.halves == "both":
        return _run_halves(trial, folder, device)
    with fixed_arithmetic(trial.setting.threads or 1):
        return (_run_trial if trial.setting.mixture is None else _run_mixture)(trial, folder, device)


@contextlib.contextmanager
def fixed_arithmetic(threads: int) -> Iterator[None]:
    """torch with so many threads, and with denormal numbers as zeros, for as long as this lasts."""
    before = torch.get_num_threads()
    kept = bool(torch.tensor(1e-310, dtype=torch.float64) * 1)  # there is no other way to ask
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(not kept)


def _run_trial(trial: Trial, folder: Path, device: str) -> Result:
    images = trial.setting.training_set(trial.size, trial.repetition)
    config = trial.setting.config(images, trial.repetition)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / TRIAL, trial.to_json())
    interval = trial.setting.audit_interval(config.images, config.batch)
    audits = _Audits(trial, images, folder, device, interval)
    if audits.known_end():
        return _finished(trial, folder, audits, device)
    run = train(
        config,
        images,
        folder / RUN,
        snapshot_images=interval,
        device=device,
        # On CPUs compiling saves little, and whether it would is found by timing; compiled code rounds differently.
        compile="auto" if pick_device(device).type == "cuda" else False,
        keep=KeepLast(1),
        state_minutes=2.0,
        resume=True,
        callbacks=[audits],
    )
    if run.ending == "interrupted":
        raise InterruptedTrialError(f"{folder}: interrupted after {run.images:,} of {config.images:,} images")
    return _finished(trial, folder, audits, device)


def _run_mixture(trial: Trial, folder: Path, device: str) -> Result:
    """The result of a mixture, which is trained in seconds, on the CPU: one that is interrupted starts again."""
    setting, size = trial.setting, trial.size
    if trial.at_least is not None:
        raise InputError("mixture: a search by tests is for networks: run the study crossover instead")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / TRIAL, trial.to_json())
    images = images_of(size, **dict[str, Any](setting.length))
    mixture = Mixture.of(setting.mixture or {})
    found = train_mixture(mixture, size, trial.repetition, images, setting.samples)
    epochs, seconds = images / size, (found.training_seconds, found.sampling_seconds)
    snapshot = SnapshotResult(images, epochs, found.result.loss, found.count, found.total, *seconds)
    result = Result(
        trial.key, size, trial.repetition, found.count, found.total, decided=None, censored=False, images=images,
        epochs=epochs, best_images=images, parameters=found.result.components * mixture.dimension + 1,
        training_seconds=seconds[0], sampling_seconds=seconds[1], training_set="", snapshots=(snapshot,),
        versions=software_versions(), looks=1, device="cpu", threads=setting.threads or 1, mixture=found.result,
        arithmetic=arithmetic(torch.device("cpu")), code=code_fingerprint(),
    )  # fmt: skip
    _write_json(folder / RESULT, result.to_json())
    return result


def together(one: SnapshotResult, other: SnapshotResult) -> SnapshotResult:
    """The images of two networks at one length as those of one: the first one's, then the other's."""
    verdicts = [each.memorized for each in (one, other)]
    known = [each for each in verdicts if each is not None]
    return replace(
        one,
        count=one.count + other.count,
        total=one.total + other.total,
        training_seconds=one.training_seconds + other.training_seconds,
        sampling_seconds=one.sampling_seconds + other.sampling_seconds,
        copies=pack(np.concatenate(known)) if len(known) == len(verdicts) else None,
    )


def _run_halves(trial: Trial, folder: Path, device: str) -> Result:
    """The result of two networks on disjoint halves, each a trial in a folder of its own, with the images of the same
    seeds at their last snapshots."""
    if trial.at_least is not None:
        raise InputError("halves: a search by tests is for single networks: run the study halves instead")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / TRIAL, trial.to_json())
    results, images, sets = [], [], []
    for half in ("first", "second"):
        setting = replace(trial.setting, halves=half)
        results.append(run_trial(replace(trial, setting=setting), folder / half, device))
        training = setting.training_set(trial.size, trial.repetition)
        with fixed_arithmetic(setting.threads or 1):
            denoiser = load(snapshot_folder(folder / half / RUN, results[-1].images), pick_device(device))
            images.append(_sampled(setting, training, denoiser, setting.samples).images)
        sets.append(training.images)
    one, other = results
    snapshots = tuple(together(*pair) for pair in zip(one.snapshots, other.snapshots, strict=True))
    best = max(snapshots, key=lambda each: each.ratio)
    result = replace(
        one,
        key=trial.key,
        count=best.count,
        total=best.total,
        best_images=best.images,
        training_seconds=one.training_seconds + other.training_seconds,
        sampling_seconds=one.sampling_seconds + other.sampling_seconds,
        snapshots=snapshots,
        checks=(),
        agreement=agreement(images[0], images[1], sets[0], sets[1]),
    )
    shutil.copyfile(folder / "first" / GALLERY, folder / GALLERY)
    _write_json(folder / RESULT, result.to_json())
    return result


def _finished(trial: Trial, folder: Path, audits: _Audits, device: str) -> Result:
    """The result of a run that has ended, with its gallery."""
    result = audits.result()
    denoiser = load(snapshot_folder(folder / RUN, result.best_images), pick_device(device))
    _write_gallery(folder, audits.detector, trial, denoiser)
    if trial.at_least is None:
        training = cast(ImageSet, audits.detector.training)
        sampled = _sampled(trial.setting, training, denoiser, min(trial.setting.samples, GENERATED))
        result = replace(result, checks=checks(trial, training, sampled.images, pick_device(device)))
    _write_json(folder / RESULT, result.to_json())
    shutil.rmtree(folder / RUN / "state", ignore_errors=True)
    return result


class _Audits(AuditEvery):
    """Audits the snapshots of a trial's run, all or those at doubling lengths, and keeps the list of what was found and
    spent. interval: images from one snapshot to the next."""

    def __init__(self, trial: Trial, training: ImageSet, folder: Path, device: str, interval: int) -> None:
        setting = trial.setting
        super().__init__(
            training,
            folder / RUN,
            samples=setting.samples,
            stop=None if trial.at_least is None else SequentialTest(trial.at_least),
            flip=bool(setting.training.get("xflip")),
            sampler=setting.sample_settings(training),
            criterion=setting.criterion,
            device=device,
            on_audit=self._add,
        )
        self.trial, self.folder, self.interval = trial, folder, interval
        self.steps = set(audit_steps(setting.snapshots)) if setting.spread_audits else None
        self.watch: Watch | None = None
        self.watcher: Watcher | None = None
        self.watched: Watched | None = None
        if (unseen := setting.unseen(trial.size, trial.repetition)) is not None:
            self.watch = Watch.of(setting.watch or {})
            self.watcher = Watcher(training, unseen, self.detector)
            self.keep_images = None  # all
        self.audits: list[SnapshotResult] = []
        self.parameters = self.looks = 0

    def known_end(self) -> bool:
        """Whether a run that was killed before it wrote its result had been ended by its last audit, in this folder;
        then all of that is read."""
        path = self.folder / AUDITS
        if not path.exists():
            return False
        self.audits, counts = _read_audits(path)
        if counts is None or not self.audits or self._reason() is None:
            return False
        self.parameters, self.looks = counts
        return snapshot_folder(self.folder / RUN, max(self.audits, key=lambda each: each.ratio).images).is_dir()

    def on_start(self, plan: Plan) -> None:
        super().on_start(plan)
        if self.steps is not None:
            # Where a run is too short for all of its audits, they stand closer than snapshots can.
            last = math.ceil(plan.images / self.interval)
            self.looks = len({step for step in self.steps if step < last}) + 1
            self.test = None if self.stop is None else self.stop.shared_among(self.looks)
        path = self.folder / AUDITS
        known = _read_audits(path)[0] if path.exists() else []
        self.audits = [audited for audited in known if audited.images <= plan.resumed_at]
        # What was spent on steps that are now done again is spent.
        self.training_seconds, self.sampling_seconds = (
            (known[-1].training_seconds, known[-1].sampling_seconds) if known else (0.0, 0.0)
        )
        self.parameters = plan.parameters
        self.since = time.perf_counter()

    def on_snapshot(self, snapshot: Snapshot) -> StopDecision | None:
        now = time.perf_counter()
        self.training_seconds += now - self.since
        self.since = now
        at = snapshot.images // self.interval
        if self.steps is not None and snapshot.images < self.planned and at not in self.steps:
            return None
        decision = super().on_snapshot(snapshot)
        if decision is not None and not decision.stop and (reason := self._reason()) is not None:
            return replace(decision, stop=True, reason=reason)
        return decision

    def on_evaluation(self, snapshot: Snapshot, found: Evaluation) -> None:
        self.watched = None if self.watcher is None else self.watcher.measure(snapshot.denoiser, found)

    def _reason(self) -> str | None:
        """Why the run ends with the last audit, if it does."""
        if self.watch is not None:
            return self.watch.ends(self.audits[-1].images, self.audits[-1].ratio)
        if self.trial.at_least is not None and self.audits[-1].answer:
            return f"R_mem is at least {self.trial.at_least:.4g}"
        if (noise := self.trial.setting.level_off) is not None:
            level = level_of([(each.epochs, each.count, each.total) for each in self.audits], noise)
            return str(level) if level.state == LEVELED_OFF else None
        return None

    def _add(self, point: Point) -> None:
        now = time.perf_counter()
        self.sampling_seconds += now - self.since
        self.since = now
        self.audits.append(
            SnapshotResult(
                images=point.images,
                epochs=point.epochs,
                loss=point.loss,
                count=point.count,
                total=point.total,
                training_seconds=self.training_seconds,
                sampling_seconds=self.sampling_seconds,
                answer=point.answer,
                watched=self.watched,
                copies=pack(point.evaluation.memorized),
            )
        )
        values = {"parameters": self.parameters, "looks": self.looks}
        _write_json(self.folder / AUDITS, {"audits": [asdict(each) for each in self.audits], **values})

    def result(self) -> Result:
        last, best = self.audits[-1], max(self.audits, key=lambda audited: audited.ratio)
        return Result(
            key=self.trial.key,
            size=self.trial.size,
            repetition=self.trial.repetition,
            count=best.count,
            total=best.total,
            decided=SequentialTest.of_highest(audited.answer for audited in self.audits),
            censored=len(self.audits) < self.looks
            and bool(self.watch is not None or (self.trial.at_least is not None and last.answer)),
            images=last.images,
            epochs=last.images / len(self.training),
            best_images=best.images,
            parameters=self.parameters,
            training_seconds=last.training_seconds,
            sampling_seconds=last.sampling_seconds,
            training_set=self.training.fingerprint,
            snapshots=tuple(self.audits),
            versions=software_versions(),
            at_least=self.trial.at_least,
            looks=self.looks,
            device=self.device.type,
            threads=self.trial.setting.threads or 1,
            level_off=self.trial.setting.level_off,
            alarms=None if self.watcher is None else self.watcher.alarms,
            delta=None if self.watcher is None else self.watcher.delta,
            arithmetic=arithmetic(self.device),
            code=code_fingerprint(),
        )


def _sampled(
    setting: Setting,
    training: ImageSet,
    denoiser: Denoiser | WrappedDenoiser,
    count: int,
    detector: CopyDetector | None = None,
    **changes: Any,
) -> Evaluation:
    """The first so many images of a run, sampled once more, with changes of its sampler."""
    sampler = replace(setting.sample_settings(training), compile="off", **changes)
    found = evaluate(denoiser, range(count), sampler, detector)
    assert found is not None  # on one rank
    return found


def _write_gallery(folder: Path, detector: CopyDetector, trial: Trial, denoiser: Denoiser | WrappedDenoiser) -> None:
    """The first images of a snapshot, beside the training images nearest to them (mirrored where
    that is nearer, for a run that counts mirrored images)."""
    training = cast(ImageSet, detector.training)
    found = _sampled(trial.setting, training, denoiser, SHOWN, detector, batch=SHOWN)
    nearest = training.images[found.nearest]
    assert found.detection is not None
    if (mirrored := found.detection.neighbors.mirrored) is not None:
        nearest = np.where(mirrored[:, 0, None, None, None], nearest[..., ::-1], nearest)
    with atomic_file(folder / GALLERY) as partial, partial.open("wb") as stream:
        arrays = {"generated": found.images, "nearest": nearest, "memorized": found.memorized}
        save_arrays(stream, arrays, compress=True)


def _read_audits(path: Path) -> tuple[list[SnapshotResult], tuple[int, int] | None]:
    """(what was found so far, (parameters, looks) of the run; None in files of earlier versions)."""
    advice = f"delete the folder {path.parent} to run its trial again"
    values = read_checked(path, advice)
    with parsing(path, "the audits of a trial", advice):
        values = values if isinstance(values, dict) else {"audits": values}  # without checksums it was a plain list
        counts = (int(values["parameters"]), int(values["looks"])) if "parameters" in values else None
        return [_snapshot_result(each) for each in values["audits"]], counts


def _write_json(path: Path, values: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(sealed(values), indent=1) + "\n")
