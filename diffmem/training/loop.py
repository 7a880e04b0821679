"""The training loop: `train` runs, continues and stops a run; `plan_training` says what it would do and cost.

What a run leaves in its folder, and who reads it, is in `diffmem.training.run_folder`.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from diffmem.atomic_io import output_lock
from diffmem.data import DatasetSpec, ImageSource
from diffmem.errors import InputError
from diffmem.logs import logger
from diffmem.models import Model
from diffmem.precision import float32_products
from diffmem.training.callbacks import Callback, Snapshot, StopDecision, combined
from diffmem.training.config import TrainingConfig
from diffmem.training.parallel import Ranks
from diffmem.training.planning import Plan, measured_plan
from diffmem.training.run_folder.description import begin_run, describe
from diffmem.training.run_folder.snapshots import KeepRule, SnapshotRecord, Snapshots, keep_all
from diffmem.training.run_folder.state import latest_state, read_metadata, read_tensors, save_state
from diffmem.training.run_folder.stats import Stats, append_stats, truncate_stats
from diffmem.training.signals import own_random_numbers, stop_requests
from diffmem.training.trainer import Trainer

_log = logger(__name__)
_TICKS = 1000  # lines of statistics per run, about
_LONGEST_TICK = 200  # steps
_READ_STOP_EVERY = {"cpu": 1, "cuda": 16}  # steps between looks at the other processes' wish to stop


class DivergedError(InputError):
    """The loss is no longer a number. An `InputError`."""


@dataclass(frozen=True)
class Run:
    """What `train` did.

    Attributes:
        out: The run's folder.
        images: Images seen in all.
        ending: Why it ended: "finished", "interrupted" or "stopped".
        reason: What a callback said when it stopped it.
        loss: Mean loss per pixel of the last line of statistics.
        snapshots: The snapshots that were made.
    """

    out: Path
    images: int
    ending: str
    reason: str
    loss: float
    snapshots: tuple[SnapshotRecord, ...]


def train(
    config: TrainingConfig,
    data: ImageSource,
    out: str | Path,
    *,
    snapshot_images: int | None = None,
    device: str | torch.device = "auto",
    batch_gpu: int | None = None,
    compile: bool | str = "auto",
    cuda_graph: bool | str = "auto",
    keep: KeepRule = keep_all,
    state_minutes: float = 10.0,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    data_source: DatasetSpec | None = None,
    model: Model | None = None,
) -> Run:
    """Trains a denoiser on `data` and returns how that ended; the results lie in the folder `out`.

    SIGINT and SIGTERM let the step finish and save a state; a second one interrupts at once. Under `torchrun`, with
    torch.distributed initialized, each process computes its slice of every batch, and noise, losses and gradients are
    those of a single process.

    Args:
        config: What decides the result.
        data: Anything that `diffmem.load_images` reads; uint8.
        out: The run's folder.
        snapshot_images: A snapshot at the first step that reaches each multiple (default: only at the end; the last
            step always makes one).
        device: "cpu", "cuda", or "auto".
        batch_gpu: Images per forward pass of one process, gradients are accumulated (default: the process's share of
            the batch).
        compile: True, False, or "auto", which compiles where the run is long enough to gain by it.
        cuda_graph: True, False, or "auto": a GPU replays a graph of the passes where that was measured to be faster
            (small networks); the arithmetic is the same.
        keep: Which snapshots stay.
        state_minutes: A state to resume from is saved so often, and at every snapshot, interruption and end.
        resume: Continue the run in `out` (from its beginning where it has saved no state yet); on a CPU, with the same
            batch_gpu, number of threads and processes, the weights become those of a run never interrupted, bit by bit.
        callbacks: Callbacks, see `Callback`.
        data_source: How to find `data` again, where they are images in memory: then `diffmem.evaluation` needs not be
            told.
        model: A network of your own, where `config.denoiser` is that of `as_denoiser(model, …)`: the module, which is
            copied and trained from the weights that it has, or a function that makes one, which is called with torch's
            generator seeded by `config.seed`. Buffers, such as running means, are those of the last step, and of the
            first process. Or a `Denoiser`, to train from its weights.

    Returns:
        The folder, images seen, why the run ended, and its snapshots.

    Raises:
        InputError: Data that do not fit, a folder in use, or a state of other settings, naming the fields.
        DivergedError: The loss is no longer a number.

    Example:
        >>> from diffmem.models import preset
        >>> config = TrainingConfig(preset("ddpmpp_8", channels=1, model_channels=8), images=64, batch=32)
        >>> run = train(config, DatasetSpec("builtin:digits", size=20), "run", compile=False)
        >>> run.ending, run.images
        ('finished', 64)
    """
    out, ranks = Path(out), Ranks()
    if snapshot_images is not None and snapshot_images < 1:
        raise InputError(f"snapshot_images is {snapshot_images}, but must be at least 1")
    with own_random_numbers(), stop_requests() as stop, contextlib.ExitStack() as stack:
        ranks.agree(lambda: stack.enter_context(output_lock(out)))
        trainer = Trainer(config, data, device, batch_gpu, compile, ranks, data_source, cuda_graph, model)
        trainer.enter(stack)
        ranks.agree(lambda: begin_run(out, describe(trainer.config, trainer.data, trainer.source), resume))
        snapshots = ranks.agree(lambda: Snapshots(out, keep))
        state = ranks.agree(lambda: latest_state(out) if resume else None)
        if state is not None:
            metadata = read_metadata(state)
            trainer.restore(metadata, read_tensors(state, metadata))
            _log.info("%s: resumes after %d images", out, trainer.images)
        plan = measured_plan(trainer, snapshot_images)
        if ranks.rank == 0:
            snapshots.forget_after(trainer.images)
            truncate_stats(out, trainer.images)
            for callback in callbacks:
                callback.on_start(plan)
        try:
            return _run(trainer, out, snapshots, snapshot_images, state_minutes, callbacks, ranks, stop)
        finally:
            if ranks.rank == 0:
                for callback in callbacks:
                    callback.on_end()


def plan_training(
    config: TrainingConfig,
    data: ImageSource,
    *,
    device: str | torch.device = "auto",
    batch_gpu: int | None = None,
    compile: bool | str = "auto",
    cuda_graph: bool | str = "auto",
    model: Model | None = None,
) -> Plan:
    """What `train` with these arguments would do and cost, from a few passes of the network; nothing is written.

    Args:
        config: As for `train`.
        data: As for `train`.
        device: As for `train`.
        batch_gpu: As for `train`.
        compile: As for `train`.
        cuda_graph: As for `train`.
        model: As for `train`.
    """
    ranks = Ranks()
    with own_random_numbers(), contextlib.ExitStack() as stack:
        trainer = Trainer(config, data, device, batch_gpu, compile, ranks, cuda_graph=cuda_graph, model=model)
        trainer.enter(stack)
        return measured_plan(trainer)


def _run(
    trainer: Trainer,
    out: Path,
    snapshots: Snapshots,
    snapshot_images: int | None,
    state_minutes: float,
    callbacks: Sequence[Callback],
    ranks: Ranks,
    stop: threading.Event,
) -> Run:
    """Steps until the end or a wish to stop, with all that is to be written on the way."""
    config = trainer.config
    if trainer.compile:
        trainer.objective = torch.compile(trainer.objective, dynamic=False)
    first = ranks.rank == 0
    tick_steps = max(1, min(_LONGEST_TICK, trainer.total_steps // _TICKS))
    read_stop = _READ_STOP_EVERY[trainer.device.type]
    began = ticked = saved = time.perf_counter()
    images_at_tick, last_loss = trainer.images, math.nan
    ending, reason = "finished", ""

    def save() -> None:
        if first:
            save_state(out, trainer.images, *trainer.state())

    while not trainer.finished:
        trainer.step()
        due = trainer.finished or (
            snapshot_images is not None
            and trainer.images // snapshot_images > (trainer.images - config.batch) // snapshot_images
        )
        stopping = stop.is_set()
        if ranks.size > 1:
            stopping = False
            if trainer.steps % read_stop == 0 or trainer.finished:
                wishes = torch.tensor(float(stop.is_set()), device=trainer.device)
                ranks.sum(wishes)
                stopping = bool(wishes.item())
        if due or stopping or trainer.steps % tick_steps == 0:
            last_loss, snapshot_loss = trainer.mean_losses()
            if not math.isfinite(last_loss):
                raise DivergedError(_advice(trainer, out))
            now = time.perf_counter()
            stats = Stats(
                images=trainer.images,
                epochs=trainer.epochs,
                steps=trainer.steps,
                loss=last_loss,
                lr=trainer.lr,
                ema_beta=trainer.beta,
                images_per_second=(trainer.images - images_at_tick) / (now - ticked),
                seconds=now - began,
            )
            if trainer.steps % tick_steps == 0 or trainer.finished:
                trainer.forget_losses(0)
                ticked, images_at_tick = now, trainer.images
                if first:
                    append_stats(out, stats)
                    for callback in callbacks:
                        callback.on_log(stats)
        if due:
            paused = time.perf_counter()
            decision = ranks.agree(partial(_snapshot, trainer, out, snapshots, snapshot_loss, callbacks))
            ticked += time.perf_counter() - paused  # the speed is that of training
            trainer.forget_losses(1)
            if decision.stop and not trainer.finished:
                ending, reason = "stopped", decision.reason
        if stopping and not trainer.finished:
            ending = "interrupted"
        if due or ending != "finished" or time.perf_counter() - saved > 60 * state_minutes:
            save()
            saved = time.perf_counter()
        if ending != "finished":
            break
    return Run(out, trainer.images, ending, reason, last_loss, tuple(snapshots.records))


def _snapshot(
    trainer: Trainer, out: Path, snapshots: Snapshots, loss: float, callbacks: Sequence[Callback]
) -> StopDecision:
    folder = snapshots.write(trainer.averaged, trainer.images)
    snapshot = Snapshot(folder, trainer.images, trainer.epochs, loss, trainer.averaged)
    with float32_products("ieee"):  # what is sampled and audited is sampled as the protocol says
        decision = combined([callback.on_snapshot(snapshot) for callback in callbacks])
    snapshots.add(SnapshotRecord(trainer.images, trainer.epochs, loss, decision.score))
    return decision


def _advice(trainer: Trainer, out: Path) -> str:
    config = trainer.config
    state = latest_state(out)
    back = "no state was saved before" if state is None else f"the state after {int(state.name):,} images is intact"
    return (
        f"the loss is NaN or infinite after {trainer.images:,} images (learning rate {trainer.lr:.3g}, batch "
        f"{config.batch}): train again with a lower learning rate (such as a third of it) or a longer warm-up; {back}"
    )
