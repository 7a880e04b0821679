"""How few evaluations of the network (NFE) leave the verdict of the memorization rule as it is.

`python -m benchmarks solvers` takes two models that really memorize (small networks trained here once, on 100 and on
200 digits, in a quarter of an hour each, and kept in build/), samples the same 1,000 seeds with the protocol's sampler
(18 steps of Heun, 35 calls) and with others, and writes results/solvers.csv, a row per model and sampler: its calls,
the share of seeds on which the rule decides as it does for the protocol's images, R_mem, on what share of the copies
the copied image is the same one, and how far the images lie from the protocol's (rms, gray levels). What is measured
are values, not time. Samplers with more calls than the protocol's say how far the protocol itself is from the exact
flow, and so what agreement can be asked for at all. UniPC's noise levels were chosen on other seeds (from 10,000 on),
after a first look at seeds 0–399 of the model of 200 digits.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import RESULTS, Bench
from benchmarks.rows import write_table
from diffmem.data import ImageSet, load_images
from diffmem.memorization import Audit, audit
from diffmem.models import EDM, Denoiser, DenoiserConfig, UNetConfig, load, save
from diffmem.sampling import clip_range, round_sigmas, sample, sigmas_logistic

VALUES, MINUTES = "solvers.csv", 60
CHECKPOINTS = Path(__file__).parents[1] / "build"
TRAINING_IMAGES = (100, 200)
SEEDS = 1000
BATCH = 64
STEPS = 8000
LEARNING_RATE = 1e-3
EMA = 0.999
COLUMNS = (
    "training_images", "solver", "noise_levels", "nfe", "same_verdict", "R_mem", "same_source",
    "rms_to_protocol",
)  # fmt: skip
SAMPLERS: Any = [
    *[("heun", {"steps": steps}) for steps in (72, 36, 18, 9, 8, 7, 6, 5)],
    *[("dpm++", {"steps": steps, "rho": rho}) for steps in (14, 12, 10) for rho in (5.0, 7.0, 20.0, 1000.0)],
    *[("dpm++", {"steps": steps}) for steps in (35, 18)],
    *[("unipc", {"steps": steps}) for steps in (35, 18, 14, 12, 10, 8)],
    *[("unipc", {"steps": 14, "width": width}) for width in (1.0, 2.0)],  # of `sigmas_logistic`
    *[("unipc", {"steps": 14, "sigma_min": sigma_min}) for sigma_min in (0.002, 0.05)],
]


def run(bench: Bench) -> None:
    # The networks are small: one thread is faster than two that wait for each other.
    torch.set_num_threads(1)
    path = RESULTS / f"solvers{'.quick' if bench.quick else ''}.csv"
    rows = []
    for count in TRAINING_IMAGES:
        training = load_images("builtin:digits", limit=count)
        rows += compare(memorizing_model(training, bench.quick), training, range(10 if bench.quick else SEEDS))
    write_table(path, rows, COLUMNS)


def compare(denoiser: Denoiser, training: ImageSet, seeds: range) -> Iterator[dict[str, str]]:
    """A row per sampler."""

    def judged(**arguments) -> tuple[np.ndarray, Audit]:
        if width := arguments.pop("width", None):
            levels = sigmas_logistic(arguments["steps"], *clip_range(denoiser, 0.02, 80.0), width=width)
            arguments["sigmas"] = round_sigmas(levels, denoiser)
        images = sample(denoiser, seeds, batch=250, compile=False, **arguments).images.numpy()
        return images, audit(images, training)

    images, protocol = judged()
    print(f"protocol: {protocol.verdict()}")
    for solver, arguments in SAMPLERS:
        others, verdict = judged(solver=solver, **arguments)
        both = protocol.memorized & verdict.memorized
        sources = protocol.neighbors.indices[both, 0] == verdict.neighbors.indices[both, 0]
        steps = arguments["steps"]
        row = {
            "training_images": str(len(training)),
            "solver": solver,
            "noise_levels": ", ".join(f"{name} {value:g}" for name, value in arguments.items()),
            "nfe": str(2 * steps - 1 if solver == "heun" else steps),
            "same_verdict": f"{(verdict.memorized == protocol.memorized).mean():.4f}",
            "R_mem": f"{verdict.ratio:.4f}",
            "same_source": f"{sources.mean():.4f}" if len(sources) else "",
            "rms_to_protocol": f"{np.sqrt(np.mean((others.astype(float) - images) ** 2)):.3f}",
        }
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        yield row


def memorizing_model(training: ImageSet, quick: bool) -> Denoiser:
    """The model of this training set, trained unless it is kept in build/; quick: hardly trained."""
    if quick:
        return train(training, steps=20)
    folder = CHECKPOINTS / f"memorizing-{len(training)}-digits"
    if not folder.exists():
        save(train(training), folder)
    return load(folder)


def train(training: ImageSet, steps: int = STEPS) -> Denoiser:
    """A small DDPM++ that has seen the training set so often that it knows little else; its EMA weights.

    EDM's loss: λ(σ)·(D(y + σn; σ) − y)², ln σ ~ N(−1.2, 1.2²), λ = (σ² + σ_d²)/(σ·σ_d)²; Adam, the learning rate
    falling to 0 as a cosine.
    """
    torch.manual_seed(0)
    network = UNetConfig(
        resolution=8, channels=1, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0
    )
    denoiser = Denoiser(DenoiserConfig(network, EDM())).train()
    average = copy.deepcopy(denoiser).eval().requires_grad_(False)
    images = torch.from_numpy(training.images).float() / 127.5 - 1
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
