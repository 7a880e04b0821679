"""What a run will do and cost, measured on a few passes before it starts, and what is decided by that."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from diffmem.timing import CompileCost, Timing, compiling_pays, measure
from diffmem.training.losses import draw
from diffmem.training.passes import forward_backward, unchanged
from diffmem.training.trainer import Trainer

# CPU: measured on a 32-channel network at 8×8 (122 s idle, 7 %) and, beside other work, on one of 78,000 parameters
# (168 s); GPU: not measured.
_COMPILING = {"cpu": CompileCost(170.0, 0.07, 500_000), "cuda": CompileCost(180.0, 0.3, 500_000)}
_MEASURING = 0.02  # of the run that is measured, in time; at most _LONGEST_MEASURING seconds
_LONGEST_MEASURING = 4.0
_GRAPH_BELOW = 0.1  # seconds of a pass above which its kernels hide their launches


@dataclass(frozen=True)
class Plan:
    """What a run will do and cost, measured on a few passes before it starts.

    Attributes:
        images: Images seen in the complete run.
        steps: Steps of the complete run.
        images_left: What is left of it.
        size: N, images of the training set.
        epochs: Epochs of the complete run.
        parameters: Number of parameters of the network.
        device: "cpu" or "cuda".
        ranks: Processes.
        batch_gpu: Images per forward pass of a process.
        seconds_per_step: Without compiling, the median of several passes.
        seconds: All that is left, without compiling.
        seconds_range: From low to high, as far as the passes differed.
        compiled: Whether it will run through torch.compile.
        resident: Whether the training set lies on the device.
        resumed_at: Images seen before; 0 for a new run.
        snapshot_images: The interval of snapshots; None for one at the end.
        graphed: Whether its passes are replayed as a CUDA graph.
        precision: Precision of the network's products.
    """

    images: int
    steps: int
    images_left: int
    size: int
    epochs: float
    parameters: int
    device: str
    ranks: int
    batch_gpu: int
    seconds_per_step: float
    seconds: float
    seconds_range: tuple[float, float]
    compiled: bool
    resident: bool
    resumed_at: int = 0
    snapshot_images: int | None = None
    graphed: bool = False
    precision: str = "ieee"


def measured_plan(trainer: Trainer, snapshot_images: int | None = None) -> Plan:
    """Measures a few passes, and settles whether the run is to be compiled; leaves no trace in the state."""
    with unchanged(list(trainer.buffers.values())):
        per_step = trainer.ranks.agree(partial(_seconds_per_step, trainer))
    left = trainer.total_steps - trainer.steps
    parameters = sum(parameter.numel() for parameter in trainer.denoiser.parameters())
    if trainer.cuda_graph == "auto":
        pays = partial(graph_pays, trainer, per_step.median)
        trainer.cuda_graph = trainer.device.type == "cuda" and trainer.ranks.agree(pays)
    if trainer.compile == "auto":
        trainer.compile = compiling_pays(per_step, left, parameters, _COMPILING.get(trainer.device.type))
    whole = per_step.times(left)
    return Plan(
        images=trainer.total_steps * trainer.config.batch,
        steps=trainer.total_steps,
        images_left=left * trainer.config.batch,
        size=len(trainer.data),
        epochs=trainer.total_steps * trainer.config.batch / len(trainer.data),
        parameters=parameters,
        device=str(trainer.device),
        ranks=trainer.ranks.size,
        batch_gpu=trainer.microbatch,
        seconds_per_step=per_step.median,
        seconds=whole.median,
        seconds_range=(whole.low, whole.high),
        compiled=bool(trainer.compile),
        precision=trainer.config.precision,
        graphed=bool(trainer.cuda_graph),
        resident=trainer.data.resident,
        resumed_at=trainer.images,
        snapshot_images=snapshot_images,
    )


def _seconds_per_step(trainer: Trainer) -> Timing:
    """Forward and backward passes, timed on as many images as do not take long."""
    count = min(trainer.microbatch, 8)
    left = max(trainer.total_steps - trainer.steps, 1)
    found = measure(partial(_pass, trainer, count), budget=0.0)
    budget = min(_LONGEST_MEASURING, _MEASURING * found.median * trainer.share / count * left)
    if count < trainer.microbatch and found.median * trainer.microbatch / count <= 1.0:
        count = trainer.microbatch
    found = measure(partial(_pass, trainer, count), budget)
    trainer.flat.gradient.zero_()
    found = found.times(trainer.share / count)
    # More images in a pass take less time each, as far as there is room in the processor.
    return found if count == trainer.microbatch else found._replace(low=found.low / 2)


def graph_pays(trainer: Trainer, seconds: float) -> bool:
    """Whether a graph of the passes is faster than launching each kernel, which takes `seconds` a step."""
    each = seconds * trainer.microbatch / trainer.share
    if each > _GRAPH_BELOW:
        return False
    trainer.cuda_graph = True
    try:
        with unchanged(list(trainer.buffers.values())):
            return measure(partial(_pass, trainer, trainer.microbatch, graphed=True), budget=1.0).median < each
    except RuntimeError:  # something in it cannot be captured
        return False
    finally:
        trainer.cuda_graph = "auto"
        trainer.passes = None
        trainer.flat.gradient.zero_()


def _pass(trainer: Trainer, count: int, graphed: bool = False) -> None:
    config = trainer.config
    torch.manual_seed(0)
    images, labels = trainer.data.batch(trainer.order.order[torch.arange(count).numpy() % len(trainer.data)])
    level, noise = draw(config.denoiser.preconditioning, images.shape, trainer.device)
    nothing_done = torch.zeros(count, config.denoiser.network.augment_dim, device=trainer.device)
    given = (images, level, noise, labels, nothing_done if config.augment else None)
    if graphed:
        trainer.forward_backward(given)
    else:
        forward_backward(trainer.objective, config.batch, given)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
