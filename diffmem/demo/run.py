"""`run_demo`: trains the same network on few and on many of scikit-learn's real digits, samples both, audits both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from diffmem.atomic_io import check_output_folder, output_lock
from diffmem.data import ImageSet, load_images, write_edm_zip
from diffmem.evaluation import AuditEvery, Trajectory, generate, trajectory
from diffmem.memorization import Audit, audit
from diffmem.progress import Progress, silent
from diffmem.sampling import SamplerConfig
from diffmem.training import EMA, Callback, Plan, Stats, TrainingConfig, denoiser_config, snapshot_folder, train

FEW, MANY = 20, 1000  # training images
SEED = 0
BATCH = 64
IMAGES = 64_000  # seen in training, by each of the two
SAMPLES = 400
SNAPSHOTS = 5
WATCHED = 64  # images per snapshot


@dataclass(frozen=True, eq=False)
class Model:
    """One of the two: what it was trained on, how copying grew, and the audits of its samples.

    control: the audit of the same samples against unseen digits, as many as it was trained on where there are so many:
    what the rule says of a model that never saw the images it is compared with.
    """

    folder: Path
    training: ImageSet
    trajectory: Trajectory
    audit: Audit
    control: Audit

    @property
    def epochs(self) -> float:
        return self.trajectory.points[-1].epochs


@dataclass(frozen=True, eq=False)
class Demo:
    """Both models, the digits that neither saw, and the page that shows the difference."""

    few: Model
    many: Model
    unseen: ImageSet
    page: Path

    def to_dict(self) -> dict[str, Any]:
        """The results in plain JSON types."""
        return {
            name: {
                "training_images": len(model.training),
                "epochs": model.epochs,
                "samples": model.audit.total,
                "r_mem": model.audit.ratio,
                "interval": list(model.audit.interval),
                "false_alarms": cast(Audit, model.audit.holdout).ratio,
                "against_unseen": model.control.ratio,
                "over_time": [[point.epochs, point.ratio] for point in model.trajectory.points],
            }
            for name, model in (("few", self.few), ("many", self.many))
        }


def run_demo(
    out: str | Path,
    *,
    images: int = IMAGES,
    samples: int = SAMPLES,
    progress: Progress = silent,
) -> Demo:
    """Trains, samples and audits both models, and writes everything into the folder `out`: `report.html`, and for each
    model its run, its samples, its training set and the full report of its audit. What was finished before is not done
    again. images: seen in training, by each model. samples: generated, by each model.

    Everything runs on the CPU with one thread, so that the numbers are the same wherever the arithmetic is.
    """
    with output_lock(out):
        return _run_demo(check_output_folder(out), images, samples, progress)


def _run_demo(out: Path, images: int, samples: int, progress: Progress) -> Demo:
    from diffmem.demo.page import write_page

    digits = load_images("builtin:digits")
    order = np.random.default_rng(SEED).permutation(len(digits))
    unseen = digits.select(np.sort(order[MANY:]))
    write_edm_zip(unseen, out / "unseen.zip")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two would wait for each other on networks this small
    try:
        models = [
            _model(out / name, digits.select(np.sort(order[:size])), unseen, images, samples, progress)
            for name, size in (("few", FEW), ("many", MANY))
        ]
    finally:
        torch.set_num_threads(threads)
    demo = Demo(models[0], models[1], unseen, out / "report.html")
    write_page(demo)
    return demo


def _model(folder: Path, training: ImageSet, unseen: ImageSet, images: int, samples: int, progress: Progress) -> Model:
    folder.mkdir(exist_ok=True)
    write_edm_zip(training, folder / "training.zip")
    run = folder / "run"
    config = TrainingConfig(
        denoiser_config(8, 1, precond="edm", model_channels=16, channel_mult=(1, 2), num_blocks=1, dropout=0.0),
        images=images,
        batch=BATCH,
        lr=2e-3,
        warmup_epochs=3200 / len(training),
        ema=EMA("target", target=0.99),
    )
    watched = range(min(WATCHED, samples))
    sampler = SamplerConfig(solver="unipc", compile="off")
    watch = AuditEvery(training, run, samples=len(watched), sampler=sampler, device="cpu")
    what = f"training on {len(training):,} digits"
    done = train(
        config, training, run, snapshot_images=-(-images // SNAPSHOTS), device="cpu", compile=False, resume=True,
        callbacks=[watch, _Shown(progress, what)],
    )  # fmt: skip
    over_time = trajectory(run, data=training, seeds=watched, sampler=sampler, device="cpu")
    over_time.save()
    made = generate(
        snapshot_folder(run, done.images), range(samples), out=folder / "samples.npz",
        sampler=SamplerConfig(batch=100, compile="off"), training=training, holdout=unseen, device="cpu",
        progress=progress,
    )  # fmt: skip
    assert made is not None  # on one rank
    assert made.audit is not None  # a training set was given
    made.audit.save(folder / "audit")
    control = audit(cast(ImageSet, made.audit.generated), unseen.select(slice(len(training))), device="cpu")
    return Model(folder, training, over_time, made.audit, control)


class _Shown(Callback):
    """Tells a progress callback how far a training is."""

    def __init__(self, progress: Progress, what: str) -> None:
        self.progress, self.what = progress, what

    def on_start(self, plan: Plan) -> None:
        self.total = plan.images
        self.progress(self.what, plan.resumed_at, self.total)

    def on_log(self, stats: Stats) -> None:
        self.progress(f"{self.what}: loss {stats.loss:.3f}", stats.images, self.total)
