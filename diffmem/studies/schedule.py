"""What a study will cost before it starts: a plan of every run, measured on a few passes, and a simulated schedule."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffmem.models import Denoiser
from diffmem.progress import Progress, silent
from diffmem.studies.measure import fixed_arithmetic, read_result
from diffmem.studies.mixture import BATCH, Mixture, train_mixture
from diffmem.studies.run import trial_folder
from diffmem.studies.trial import Trial
from diffmem.training import images_of, plan_training

# A training step's share that one pass of the network forward takes: forward, and twice that back.
_FORWARD = 1 / 3


@dataclass(frozen=True)
class Cost:
    """Seconds of a trial, in training and in sampling, on one device. done: it is done, and this is what it took."""

    trial: Trial
    training: float
    sampling: float
    done: bool = False

    @property
    def left(self) -> float:
        """Seconds still to be spent."""
        return 0.0 if self.done else self.training + self.sampling


@dataclass(frozen=True)
class Schedule:
    """A simulated run of trials on some workers, in order, each as soon as a worker is free.

    seconds: until the last one ends. work: of all together. utilization: work over the workers' time.
    """

    workers: int
    seconds: float
    work: float

    @property
    def utilization(self) -> float:
        return self.work / (self.seconds * self.workers) if self.seconds else 1.0


def costs(
    trials: Sequence[Trial], root: str | Path | None, device: str = "auto", progress: Progress = silent
) -> list[Cost]:
    """What each trial costs on `device`: what it took where it is done in `root`, else an estimate: its steps times the
    time of one, from `plan_training` on a few passes, once per network and batch; and all its snapshots sampled in
    full. Runs with a test may end earlier."""
    measured: dict[str, tuple[float, int]] = {}
    found = []
    for position, trial in enumerate(trials):
        progress("measuring costs", position, len(trials))
        known = None if root is None else read_result(trial_folder(root, trial))
        if known is not None:
            found.append(Cost(trial, known.training_seconds, known.sampling_seconds, done=True))
            continue
        setting = trial.setting
        if setting.mixture is not None:
            found.append(_cost_of_mixture(trial))
            continue
        images = setting.training_set(trial.size, trial.repetition)
        config = setting.config(images, trial.repetition)
        kind = json.dumps([config.denoiser.to_json(), config.batch, config.augment > 0, setting.threads])
        if kind not in measured:
            with fixed_arithmetic(setting.threads or 1):
                plan = plan_training(config, images, device=device, compile=False)
            sampler = setting.sample_settings()
            measured[kind] = plan.seconds_per_step, sampler.plan(Denoiser(config.denoiser)).nfe
        per_step, nfe = measured[kind]
        steps = math.ceil(config.images / config.batch)
        per_evaluation = per_step / config.batch * _FORWARD
        runs = 2 if setting.halves == "both" else 1
        sampling = per_evaluation * nfe * setting.samples * setting.snapshots
        found.append(Cost(trial, runs * per_step * steps, runs * sampling))
    progress("measuring costs", len(trials), len(trials))
    return found


def _cost_of_mixture(trial: Trial) -> Cost:
    """From a few of its steps."""
    setting = trial.setting
    images = images_of(trial.size, **dict[str, Any](setting.length))
    few = min(images, 10 * BATCH)
    with fixed_arithmetic(setting.threads or 1):
        mixture = Mixture.of(setting.mixture or {})
        part = train_mixture(mixture, trial.size, trial.repetition, few, setting.samples)
    return Cost(trial, part.training_seconds * images / few, part.sampling_seconds)


def schedule(estimates: Sequence[Cost], workers: int) -> Schedule:
    """How long what is left takes on `workers` devices like the one that was measured (list scheduling)."""
    left = [cost.left for cost in estimates if cost.left > 0]
    free = [0.0] * workers
    for seconds in left:
        heapq.heapreplace(free, free[0] + seconds)
    return Schedule(workers, max(free, default=0.0), sum(left))
