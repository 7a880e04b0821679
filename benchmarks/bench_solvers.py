"""How few network calls leave the verdict of the memorization rule as it is.

`python -m benchmarks.bench_solvers [--checkpoint FOLDER] [--seeds 1000]` takes a model that really memorizes (trained
here once, on 200 digits, and kept in build/), samples the same seeds with the protocol's sampler (18 steps of Heun, 35
calls) and with cheaper ones, and writes results/solvers.csv: calls, and on how many seeds the rule decides as it does
for the protocol's images.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch

from diffmem.data import ImageSet, load_images
from diffmem.models import EDM, Denoiser, DenoiserConfig, UNetConfig, load, save

CHECKPOINT = Path(__file__).parents[1] / "build" / "memorizing-digits"
TRAINING_IMAGES = 200
BATCH = 64
STEPS = 8000
LEARNING_RATE = 1e-3
EMA = 0.999


def training_set() -> ImageSet:
    return load_images("builtin:digits", limit=TRAINING_IMAGES)


def train(steps: int = STEPS) -> Denoiser:
    """A small DDPM++ that has seen `training_set` so often that it knows little else; its EMA weights.

    EDM's loss: λ(σ)·(D(y + σn; σ) − y)², ln σ ~ N(−1.2, 1.2²), λ = (σ² + σ_d²)/(σ·σ_d)²; Adam, the learning rate
    falling to 0 as a cosine.
    """
    torch.manual_seed(0)
    network = UNetConfig(
        resolution=8,
        channels=1,
        model_channels=32,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(4,),
        dropout=0.0,
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
