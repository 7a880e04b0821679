"""The training step as `diffmem train` makes it: data, noise, passes, optimizer and averages; of DDPM++ at 32², and of
a small network, whose passes a CUDA graph launches at once."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import torch

from benchmarks.gpu.jobs import DRY_TRAINING, IMPLEMENTATIONS, TRAINING, Variant
from benchmarks.gpu.networks import by, config_of
from benchmarks.gpu.target import Target, dry_compile
from diffmem.data import ImageSet
from diffmem.training import TrainingConfig
from diffmem.training.trainer import Trainer

ALLOWED = {"ieee": 1e-3, "tf32": 1e-2, "bf16": 3e-2}  # between the losses of two ways after a few steps, relative
CHECKED = 3  # steps
EXPECTED_SECONDS = {True: 20.0, False: 5.0}


def run(target: Target) -> list[str]:
    wrong = []
    for variant in DRY_TRAINING if target.tiny else TRAINING:
        wrong += measure(variant, target)
    return wrong


def trainer_of(variant: Variant, target: Target) -> Trainer:
    denoiser, batch = config_of(variant, target)
    network = denoiser.network
    count = 20 if target.tiny else 4096
    shape = (count, network.channels, network.resolution, network.resolution)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    config = TrainingConfig(denoiser, images=1 << 30, batch=batch, warmup_epochs=0, precision=variant.precision)
    trainer = Trainer(config, ImageSet(images), target.device, compile=variant.compiled, cuda_graph=False)
    trainer.cuda_graph = variant.graph and not target.tiny
    if variant.compiled:
        trainer.objective = torch.compile(trainer.objective, dynamic=False)
    return trainer


@contextlib.contextmanager
def ready(variant: Variant, implementation: str, target: Target):
    """The trainer, with all that holds while it trains."""
    torch._dynamo.reset()
    with dry_compile(target), by(implementation), contextlib.ExitStack() as stack:
        trainer = trainer_of(variant, target)
        trainer.enter(stack)
        yield trainer


def measure(variant: Variant, target: Target) -> list[str]:
    name = f"train {variant.name.removeprefix('training ')}"
    losses: dict[str, float] = {}
    first = None
    for implementation in IMPLEMENTATIONS:
        if not target.fits(EXPECTED_SECONDS[variant.compiled], f"{name}, {implementation}"):
            continue
        try:
            with ready(variant, implementation, target) as trainer:
                for _ in range(1 if target.tiny else CHECKED):
                    trainer.step()
                losses[implementation] = trainer.mean_losses()[0]
                seconds = seconds_per_step(trainer, target)
        except torch.OutOfMemoryError as memory:
            print(f"{name}, {implementation}: {str(memory).splitlines()[0]}")
            target.left_out.append(f"{name}, {implementation} (memory)")
            continue
        finally:
            target.empty_cache()
        first = seconds if first is None else first
        rate = trainer.config.batch / seconds
        target.record(
            "training", name, implementation, f"{rate:.4g} images/s; loss {losses[implementation]:.5g}",
            seconds=f"{seconds:.4g}", repeats="3", ratio=f"{seconds / first:.4g}",
        )  # fmt: skip
    values = list(losses.values())
    if len(values) == 2 and not abs(values[0] - values[1]) <= ALLOWED[variant.precision] * abs(values[1]):
        return [f"{name}: losses {values[0]:.6g} and {values[1]:.6g} differ"]
    return []


def seconds_per_step(trainer: Trainer, target: Target) -> float:
    """The median of three timings by the clock of as many steps as take a quarter of a second: Python is part of it."""

    def steps(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            trainer.step()
        if target.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / count

    once = steps(1)
    if target.tiny:
        return once
    count = max(2, min(100, round(0.25 / once)))
    return sorted(steps(count) for _ in range(3))[1]


def compile_variant(variant: Variant, implementation: str, target: Target) -> None:
    """Leaves the generated code in the cache."""
    with ready(variant, implementation, target) as trainer:
        trainer.step()
