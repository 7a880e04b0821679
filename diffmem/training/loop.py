"""The training loop: `train` runs, continues and stops a run; `plan_training` says what it would do and cost.

A run's folder holds `config.json`, `stats.jsonl`, `snapshots/<images seen>/` (checkpoints of the EMA weights),
`snapshots.json` and `state/` (see `diffmem.training.state`).
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

import diffmem
from diffmem.atomic_io import atomic_write, output_lock
from diffmem.devices import pick_device
from diffmem.errors import InputError
from diffmem.inert.boundary import parsing
from diffmem.integrity import sealed
from diffmem.models import Denoiser
from diffmem.precision import AUTOCAST, float32_products, measured_convolutions
from diffmem.timing import CompileCost, Timing, compiling_pays, measure
from diffmem.training.augmentation import augment, augmentation_labels, draw_augmentation
from diffmem.training.callbacks import Callback, Plan, Snapshot, Stats, StopDecision, combined
from diffmem.training.config import TrainingConfig, differences
from diffmem.training.dataset import TrainingImages
from diffmem.training.losses import Draws, denoising_loss, draw
from diffmem.training.order import DataOrder
from diffmem.training.parallel import Ranks
from diffmem.training.passes import GraphedPass, Tensors, capture_cuda, forward_backward
from diffmem.training.run_folder import CONFIG, STATS, read_description
from diffmem.training.seeds import seed_of
from diffmem.training.snapshots import KeepRule, SnapshotRecord, Snapshots, keep_all
from diffmem.training.source import DataSource, read_data
from diffmem.training.state import checked_tensor, latest_state, read_metadata, read_tensors, save_state
from diffmem.training.weights import FlatParameters, make_optimizer, sanitize

# CPU: measured on a 32-channel network at 8×8 (122 s idle, 7 %) and, beside other work, on one of 78,000 parameters
# (168 s); GPU: not measured.
_COMPILING = {"cpu": CompileCost(170.0, 0.07, 500_000), "cuda": CompileCost(180.0, 0.3, 500_000)}
_MEASURING = 0.02  # of the run that is measured, in time; at most _LONGEST_MEASURING seconds
_LONGEST_MEASURING = 4.0
_TICKS = 1000  # lines of statistics per run, about
_LONGEST_TICK = 200  # steps
_GRAPH_BELOW = 0.1  # seconds of a pass above which its kernels hide their launches
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
    data: Any,
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
    data_source: DataSource | None = None,
) -> Run:
    """Trains a denoiser on `data` and returns how that ended; the results lie in the folder `out`.

    SIGINT and SIGTERM let the step finish and save a state; a second one interrupts at once. Under `torchrun`, with
    torch.distributed initialized, each process computes its slice of every batch, and noise, losses and gradients are
    those of a single process.

    Args:
        config: What decides the result.
        data: Anything that `diffmem.load_images` reads, or a DataSource; uint8.
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

    Returns:
        The folder, images seen, why the run ended, and its snapshots.

    Raises:
        InputError: Data that do not fit, a folder in use, or a state of other settings, naming the fields.
        DivergedError: The loss is no longer a number.

    Example:
        >>> from diffmem.models import preset
        >>> config = TrainingConfig(preset("ddpmpp_8", channels=1, model_channels=8), images=64, batch=32)
        >>> run = train(config, DataSource("builtin:digits", size=20), "run", compile=False)
        >>> run.ending, run.images
        ('finished', 64)
    """
    out, ranks = Path(out), Ranks()
    if snapshot_images is not None and snapshot_images < 1:
        raise InputError(f"snapshot_images is {snapshot_images}, but must be at least 1")
    with _own_random_numbers(), _stop_requests() as stop, contextlib.ExitStack() as stack:
        ranks.agree(lambda: stack.enter_context(output_lock(out)))
        trainer = Trainer(config, data, device, batch_gpu, compile, ranks, data_source, cuda_graph)
        trainer.enter(stack)
        snapshots = ranks.agree(lambda: _open_run(out, trainer, keep, resume))
        state = ranks.agree(lambda: latest_state(out) if resume else None)
        if state is not None:
            metadata = read_metadata(state)
            trainer.restore(metadata, read_tensors(state, metadata))
        plan = replace(trainer.plan(), snapshot_images=snapshot_images)
        if ranks.rank == 0:
            snapshots.forget_after(trainer.images)
            _truncate_stats(out / STATS, trainer.images)
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
    data: Any,
    *,
    device: str | torch.device = "auto",
    batch_gpu: int | None = None,
    compile: bool | str = "auto",
    cuda_graph: bool | str = "auto",
) -> Plan:
    """What `train` with these arguments would do and cost, from a few passes of the network; nothing is written.

    Args:
        config: As for `train`.
        data: As for `train`.
        device: As for `train`.
        batch_gpu: As for `train`.
        compile: As for `train`.
        cuda_graph: As for `train`.
    """
    ranks = Ranks()
    with _own_random_numbers(), contextlib.ExitStack() as stack:
        trainer = Trainer(config, data, device, batch_gpu, compile, ranks, cuda_graph=cuda_graph)
        trainer.enter(stack)
        return trainer.plan()


class _Objective(nn.Module):
    """The denoiser with its loss: the loss of each image, summed over its pixels."""

    def __init__(self, denoiser: Denoiser, tikhonov: float):
        super().__init__()
        self.denoiser, self.tikhonov = denoiser, tikhonov

    def forward(
        self,
        images: torch.Tensor,
        level: torch.Tensor,
        noise: torch.Tensor,
        labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None,
    ) -> torch.Tensor:
        loss = denoising_loss(
            self.denoiser,
            images,
            self.denoiser.config.preconditioning,
            labels,
            augment_labels,
            draws=Draws(level, noise),
            tikhonov=self.tikhonov,
        )
        return loss.sum(dim=(1, 2, 3))


class Trainer:
    """Network, averaged network, optimizer and data of a run, and their step; arguments as for `train`."""

    def __init__(
        self,
        config: TrainingConfig,
        data: Any,
        device: str | torch.device = "auto",
        batch_gpu: int | None = None,
        compile: bool | str = "auto",
        ranks: Ranks | None = None,
        data_source: DataSource | None = None,
        cuda_graph: bool | str = "auto",
    ):
        ranks = Ranks() if ranks is None else ranks
        for name, value in (("compile", compile), ("cuda_graph", cuda_graph)):
            if value not in (True, False, "auto"):
                raise InputError(f"{name} is {value!r}, but must be True, False or 'auto'")
        self.config, self.ranks = config, ranks
        self.device = pick_device(device)
        if cuda_graph is True and self.device.type != "cuda":
            raise InputError(f"cuda_graph is True, but the device is {self.device}: leave it at 'auto'")
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.share = config.batch // ranks.size
        self.microbatch = self.share if batch_gpu is None else batch_gpu
        if config.batch % ranks.size or self.microbatch < 1 or self.share % self.microbatch:
            raise InputError(
                f"batch {config.batch} cannot be split into passes of batch_gpu {self.microbatch} on {ranks.size} "
                "process(es): choose a divisor"
            )
        images, source = read_data(data)
        self.source = source or data_source
        self.data = TrainingImages(images, config.denoiser.network, self.device, config.xflip)
        self.order = DataOrder(len(self.data), seed_of(config.seed, "order"), config.window)
        torch.manual_seed(seed_of(config.seed, "weights"))
        self.denoiser = Denoiser(config.denoiser).to(self.device).train()
        self.averaged = Denoiser(config.denoiser).to(self.device).eval()
        self.averaged.load_state_dict(self.denoiser.state_dict())
        self.flat = FlatParameters(self.denoiser, gradients=True)
        self.flat_averaged = FlatParameters(self.averaged, gradients=False)
        self.optimizer = make_optimizer(config, self.flat)
        self.denoiser.autocast_dtype = AUTOCAST[config.precision]
        self.objective = _Objective(self.denoiser, config.tikhonov)
        self.compile, self.cuda_graph = compile, cuda_graph
        self.passes: GraphedPass | None = None
        self.generator = torch.Generator(self.device)
        self.host_generator = torch.Generator()
        self.images = 0
        self.lr = self.beta = 0.0
        # Summed on the device, read at ticks: nothing waits for it in between. Since the last tick, and snapshot.
        self.loss_sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.loss_counts = [0, 0]

    def enter(self, settings: contextlib.ExitStack) -> None:
        """Sets what holds for the whole process while this run computes: how products and convolutions are formed."""
        settings.enter_context(float32_products(self.config.precision))
        settings.enter_context(measured_convolutions(self.device))

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.images // self.config.batch

    @property
    def total_steps(self) -> int:
        return math.ceil(self.config.images / self.config.batch)

    @property
    def finished(self) -> bool:
        return self.steps >= self.total_steps

    @property
    def epochs(self) -> float:
        return self.images / len(self.data)

    def step(self) -> None:
        """One step of the optimizer, over the whole batch of all processes."""
        config, size = self.config, len(self.data)
        first = self.ranks.rank * self.share
        mine = slice(first, first + self.share)
        images, labels = self.data.batch(self.order.take(config.batch)[mine])
        augment_labels = None
        if config.augment:
            self.host_generator.manual_seed(seed_of(config.seed, "augmentation", self.steps))
            drawn = draw_augmentation(config.batch, config.augment, self.host_generator)[mine]
            images, augment_labels = augment(images, drawn), augmentation_labels(drawn).to(self.device)
        # For the batch of all processes: what an image is given must not depend on how many there are.
        self.generator.manual_seed(seed_of(config.seed, "noise", self.steps))
        shape = (config.batch, *images.shape[1:])
        level, noise = draw(config.denoiser.preconditioning, shape, self.device, self.generator)
        level, noise = level[mine], noise[mine]
        self.flat.values.grad.zero_()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, self.share, self.microbatch):
            part = slice(start, start + self.microbatch)
            # Dropout draws from torch's own generator.
            torch.manual_seed(seed_of(config.seed, "dropout", self.steps, first + start))
            given = (images, level, noise, labels, augment_labels)
            loss += self.forward_backward(tuple(None if each is None else each[part] for each in given))
        gradient = self.flat.values.grad
        self.ranks.sum(gradient)
        self.ranks.sum(loss)
        sanitize(gradient)
        self.lr = config.learning_rate(self.images, size)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        self.beta = config.ema.beta(self.images, config.batch, size)
        self.flat_averaged.values.data.lerp_(self.flat.values.data, 1 - self.beta)
        self.loss_sums += loss
        self.loss_counts = [count + config.batch for count in self.loss_counts]
        self.images += config.batch

    def forward_backward(self, tensors: Tensors) -> torch.Tensor:
        """Adds the gradient of a part of the batch (images, level, noise, labels, augment_labels), and returns its
        summed loss."""
        if self.cuda_graph is not True:
            return forward_backward(self.objective, self.config.batch, tensors)
        if self.passes is None:
            run = partial(forward_backward, self.objective, self.config.batch)
            self.passes = GraphedPass(run, self.flat.values.grad, capture_cuda)
        return self.passes(tensors)

    def mean_losses(self) -> tuple[float, float]:
        """Mean loss per pixel since the last tick and since the last snapshot."""
        network = self.config.denoiser.network
        pixels = network.channels * network.resolution**2
        since_tick, since_snapshot = (
            value / (max(count, 1) * pixels)
            for value, count in zip(self.loss_sums.tolist(), self.loss_counts, strict=True)
        )
        return since_tick, since_snapshot

    def forget_losses(self, which: int) -> None:
        self.loss_sums[which] = 0.0
        self.loss_counts[which] = 0

    def plan(self) -> Plan:
        """Measures a few passes, and settles whether the run is to be compiled; leaves no trace in the state."""
        per_step = self.ranks.agree(self._seconds_per_step)
        left = self.total_steps - self.steps
        parameters = sum(parameter.numel() for parameter in self.denoiser.parameters())
        if self.cuda_graph == "auto":
            pays = partial(self._graph_pays, per_step.median)
            self.cuda_graph = self.device.type == "cuda" and self.ranks.agree(pays)
        if self.compile == "auto":
            self.compile = compiling_pays(per_step, left, parameters, _COMPILING.get(self.device.type))
        whole = per_step.times(left)
        return Plan(
            images=self.total_steps * self.config.batch,
            steps=self.total_steps,
            images_left=left * self.config.batch,
            size=len(self.data),
            epochs=self.total_steps * self.config.batch / len(self.data),
            parameters=parameters,
            device=str(self.device),
            ranks=self.ranks.size,
            batch_gpu=self.microbatch,
            seconds_per_step=per_step.median,
            seconds=whole.median,
            seconds_range=(whole.low, whole.high),
            compiled=bool(self.compile),
            precision=self.config.precision,
            graphed=bool(self.cuda_graph),
            resident=self.data.resident,
            resumed_at=self.images,
        )

    def _seconds_per_step(self) -> Timing:
        """Forward and backward passes, timed on as many images as do not take long."""
        count = min(self.microbatch, 8)
        left = max(self.total_steps - self.steps, 1)
        found = measure(partial(self._pass, count), budget=0.0)
        budget = min(_LONGEST_MEASURING, _MEASURING * found.median * self.share / count * left)
        if count < self.microbatch and found.median * self.microbatch / count <= 1.0:
            count = self.microbatch
        found = measure(partial(self._pass, count), budget)
        self.flat.values.grad.zero_()
        found = found.times(self.share / count)
        # More images in a pass take less time each, as far as there is room in the processor.
        return found if count == self.microbatch else found._replace(low=found.low / 2)

    def _graph_pays(self, seconds: float) -> bool:
        """Whether a graph of the passes is faster than launching each kernel, which takes `seconds` a step."""
        each = seconds * self.microbatch / self.share
        if each > _GRAPH_BELOW:
            return False
        self.cuda_graph = True
        try:
            return measure(partial(self._pass, self.microbatch, graphed=True), budget=1.0).median < each
        except RuntimeError:  # something in it cannot be captured
            return False
        finally:
            self.cuda_graph = "auto"
            self.passes = None
            self.flat.values.grad.zero_()

    def _pass(self, count: int, graphed: bool = False) -> None:
        config = self.config
        torch.manual_seed(0)
        images, labels = self.data.batch(self.order.order[torch.arange(count).numpy() % len(self.data)])
        level, noise = draw(config.denoiser.preconditioning, images.shape, self.device)
        nothing_done = torch.zeros(count, config.denoiser.network.augment_dim, device=self.device)
        given = (images, level, noise, labels, nothing_done if config.augment else None)
        if graphed:
            self.forward_backward(given)
        else:
            forward_backward(self.objective, config.batch, given)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, metadata) for `save_state`."""
        tensors = {
            "weights": self.flat.to_stored(self.flat.values),
            "averaged": self.flat_averaged.to_stored(self.flat_averaged.values),
            "order": torch.from_numpy(self.order.order),
            "loss_sums": self.loss_sums,
        }
        for name, value in self.optimizer.state[self.flat.values].items():
            if isinstance(value, torch.Tensor):
                moments = value.shape == self.flat.values.shape
                tensors[f"optimizer.{name}"] = self.flat.to_stored(value) if moments else value
        metadata = {
            "images": self.images,
            "loss_counts": self.loss_counts,
            "order": self.order.state(),
            "compiled": bool(self.compile),
            **describe(self.config, self.data, self.source),
        }
        return tensors, metadata

    def restore(self, metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Continues where `state` was taken."""
        count, size = self.flat.values.numel(), len(self.order.order)
        if metadata["images"] % self.config.batch:
            raise InputError(f"the training state is after {metadata['images']:,} images, no multiple of the batch")
        weights = checked_tensor(tensors, "weights", (count,), self.flat.values.dtype)
        averaged = checked_tensor(tensors, "averaged", (count,), self.flat_averaged.values.dtype)
        order = checked_tensor(tensors, "order", (size,), torch.int64)
        loss_sums = checked_tensor(tensors, "loss_sums", (2,), torch.float64)
        for name in tensors:
            if name.startswith("optimizer.") and name != "optimizer.step":
                checked_tensor(tensors, name, (count,), self.flat.values.dtype)
        with parsing("the training state", "an order of this training set"):
            self.order.restore(metadata["order"], order.numpy())
        self.flat.values.data.copy_(self.flat.from_stored(weights))
        self.flat_averaged.values.data.copy_(self.flat_averaged.from_stored(averaged))
        state = {}
        for name, value in tensors.items():
            if name == "optimizer.step":
                state["step"] = value.cpu()
            elif name.startswith("optimizer."):
                state[name.removeprefix("optimizer.")] = self.flat.from_stored(value).to(self.device)
        if state:
            layout = self.optimizer.state_dict()
            self.optimizer.load_state_dict({**layout, "state": {0: state}})
        self.loss_sums.copy_(loss_sums)
        self.loss_counts = list(metadata["loss_counts"])
        self.images = metadata["images"]
        # Compiled code rounds differently: what was decided at the start holds for the whole run.
        if self.compile == "auto":
            self.compile = metadata["compiled"]


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
                    with (out / STATS).open("a") as stream:
                        stream.write(json.dumps(asdict(stats)) + "\n")
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


def describe(config: TrainingConfig, data: TrainingImages, source: DataSource | None) -> dict[str, Any]:
    """What a run is: its configuration and its training set, with the way to find that again where there is one."""
    description = {
        "config": config.to_json(),
        "data": {
            "source": data.source,
            "images": data.count,
            "fingerprint": data.fingerprint,
            "data_source": None if source is None else source.to_json(),
        },
    }
    return json.loads(json.dumps(description))  # as it will be read back


def _open_run(out: Path, trainer: Trainer, keep: KeepRule, resume: bool) -> Snapshots:
    """The run's folder, new, or checked to be one of the same settings."""
    description = describe(trainer.config, trainer.data, trainer.source)
    path, state = out / CONFIG, latest_state(out)
    if not resume and (path.exists() or state is not None):
        raise InputError(f"{out}: holds a run already: continue it with resume=True, or choose another folder")
    if state is not None:
        _check_same_run(out, description, read_metadata(state))
    elif path.exists():
        _check_same_run(out, description, read_description(out))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot write there ({error.strerror})") from None
    versions = {"diffmem": diffmem.__version__, "torch": torch.__version__, "python": platform.python_version()}
    atomic_write(path, json.dumps(sealed({**description, "versions": versions}), indent=1) + "\n")
    return Snapshots(out, keep)


def _check_same_run(out: Path, description: dict[str, Any], there: dict[str, Any]) -> None:
    try:
        different = differences(_comparable(description), _comparable(there))
    except (KeyError, TypeError, AttributeError, InputError):
        raise InputError(f"{out}: what lies there is not the description of a run: choose another folder") from None
    if different:
        listed = "; ".join(f"{name} ({theirs} there, {ours} here)" for name, ours, theirs in different)
        raise InputError(f"{out}: its run has other settings: {listed}: use those, or another folder")


def _comparable(description: dict[str, Any]) -> dict[str, Any]:
    """What must agree for a run to be continued: not its length, nor where the same images came from. A field that is
    newer than the run has its default."""
    config = json.loads(json.dumps(TrainingConfig.from_json(description["config"]).to_json()))
    del config["images"]
    data = {name: value for name, value in description["data"].items() if name not in ("source", "data_source")}
    return {**config, "data": data}


def _truncate_stats(path: Path, images: int) -> None:
    """Removes lines of steps that will be done again, and a half-written last one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            if json.loads(line)["images"] <= images:
                kept.append(line + "\n")
    atomic_write(path, "".join(kept))


def _advice(trainer: Trainer, out: Path) -> str:
    config = trainer.config
    state = latest_state(out)
    back = "no state was saved before" if state is None else f"the state after {int(state.name):,} images is whole"
    return (
        f"the loss is no longer a number after {trainer.images:,} images (learning rate {trainer.lr:.3g}, batch "
        f"{config.batch}): train again with a lower learning rate (a third, say) or a longer warm-up; {back}"
    )


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Leaves torch's global generators as they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, where signals can be caught; a second SIGINT interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    signals = (signal.SIGINT, signal.SIGTERM)

    def request(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, request) for number in signals}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
