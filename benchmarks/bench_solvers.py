"""How few network calls leave the verdict of the memorization rule as it is.

`python -m benchmarks solvers` takes a model that really memorizes (trained here once, on 200 digits, in about ten
minutes, and kept in build/), samples the same 1,000 seeds with the protocol's sampler (18 steps of Heun, 35 calls) and
with others, and writes results/solvers.csv, a row per sampler: its calls, the share of seeds on which the rule decides
as it does for the protocol's images, R_mem, and how far the images lie from the protocol's. What is measured are
values, not time: rows do not depend on the machine beyond rounding. Samplers with more calls than the protocol's say
how far the protocol itself is from the exact flow, and with that what agreement can be asked for at all.
"""

from __future__ import annotations

import copy
import csv
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import RESULTS, Bench
from diffmem.data import ImageSet, load_images
from diffmem.memorization import Audit, audit
from diffmem.models import EDM, Denoiser, DenoiserConfig, UNetConfig, load, save
from diffmem.sampling import sample

CHECKPOINT = Path(__file__).parents[1] / "build" / "memorizing-digits"
TRAINING_IMAGES = 200
SEEDS = 1000
BATCH = 64
STEPS = 8000
LEARNING_RATE = 1e-3
EMA = 0.999
COLUMNS = ("solver", "steps", "rho", "network_calls", "same_verdict", "R_mem", "same_source", "rms_to_protocol")


def run(bench: Bench) -> None:
    # The network is small: one thread is faster than two that wait for each other.
    torch.set_num_threads(1)
    if bench.quick:
        denoiser, seeds, path = train(steps=20).eval(), range(10), RESULTS / "solvers.quick.csv"
    else:
        if not CHECKPOINT.exists():
            save(train(), CHECKPOINT)
        denoiser, seeds, path = load(CHECKPOINT), range(SEEDS), RESULTS / "solvers.csv"
    training = training_set()

    def judged(**arguments) -> tuple[np.ndarray, Audit]:
        images = sample(denoiser, seeds, batch=250, compile=False, **arguments).images.numpy()
        return images, audit(images, training)

    images, protocol = judged()
    print(f"protocol: {protocol.verdict()}")
    rows = []
    for solver, steps, rho in samplers():
        others, verdict = judged(solver=solver, steps=steps, rho=rho)
        both = protocol.memorized & verdict.memorized
        sources = protocol.neighbors.indices[both, 0] == verdict.neighbors.indices[both, 0]
        row = {
            "solver": solver,
            "steps": steps,
            "rho": rho,
            "network_calls": steps if solver == "dpm++" else 2 * steps - 1,
            "same_verdict": f"{(verdict.memorized == protocol.memorized).mean():.4f}",
            "R_mem": f"{verdict.ratio:.4f}",
            "same_source": f"{sources.mean():.4f}" if len(sources) else "",
            "rms_to_protocol": f"{np.sqrt(np.mean((others.astype(float) - images) ** 2)):.3f}",
        }
        rows.append(row)
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def samplers() -> Iterator[tuple[str, int, float]]:
    """Solver, steps, rho; the higher rho, the nearer the noise levels are to even spacing in ln σ."""
    yield from (("heun", steps, 7.0) for steps in (72, 36, 18, 9, 8, 7, 6, 5))
    yield from (("dpm++", steps, rho) for steps in (14, 12, 10, 8) for rho in (3.0, 5.0, 7.0, 10.0, 20.0, 1000.0))
    yield from (("dpm++", steps, 7.0) for steps in (35, 18))


def training_set() -> ImageSet:
    return load_images("builtin:digits", limit=TRAINING_IMAGES)


def train(steps: int = STEPS) -> Denoiser:
    """A small DDPM++ that has seen `training_set` so often that it knows little else; its EMA weights.

    EDM's loss: λ(σ)·(D(y + σn; σ) − y)², ln σ ~ N(−1.2, 1.2²), λ = (σ² + σ_d²)/(σ·σ_d)²; Adam, the learning rate
    falling to 0 as a cosine.
    """
    torch.manual_seed(0)
    network = UNetConfig(
        resolution=8, channels=1, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0
    )
    denoiser = Denoiser(DenoiserConfig(network, EDM())).train()
    average = copy.deepcopy(denoiser).eval().requires_grad_(False)
    images = torch.from_numpy(training_set().images).float() / 127.5 - 1
    optimizer = torch.optim.Adam(denoiser.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    sigma_data = denoiser.config.preconditioning.sigma_data
    began = time.perf_counter()
    for step in range(steps):
        clean = images[torch.randint(len(images), (BATCH,))]
        sigma = (torch.randn(BATCH, 1, 1, 1) * 1.2 - 1.2).exp()
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        denoised = denoiser(clean + sigma * torch.randn_like(clean), sigma.flatten())
        loss = (weight * (denoised - clean).square()).sum() / BATCH
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            decay = min(EMA, (1 + step) / (10 + step))
            for ours, theirs in zip(average.parameters(), denoiser.parameters(), strict=True):
                ours.lerp_(theirs, 1 - decay)
        if step % 200 == 199:
            print(f"step {step + 1}: loss {loss.item():.2f}, {time.perf_counter() - began:.0f} s", flush=True)
    return average
