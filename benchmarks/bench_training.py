"""A whole training step on the CPU: ours against the same step in plain, eager, contiguous PyTorch.

The baseline is written as a tutorial would: the network of `PlainUNet` below from PyTorch's own modules, NCHW, a
DataLoader-free uint8 batch, `torch.optim.Adam`, loops over parameters for sanitizing and averaging. It holds the same
weights under the same names; its loss and its gradients are compared with ours before anything is timed.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks.harness import Bench, Contender
from diffmem.data import ImageSet
from diffmem.models import Denoiser
from diffmem.models.networks import UNet
from diffmem.training import TrainingConfig, denoiser_config
from diffmem.training.losses import Draws, draw
from diffmem.training.trainer import Trainer

MINUTES = 2
ISAS = ("avx2",)
BATCH = 128
STEPS = 4  # per timing


class PlainBlock(nn.Module):
    """DDPM++'s residual block from torch.nn."""

    def __init__(self, inputs, outputs, emb, dropout, resample=None, attention=False) -> None:
        super().__init__()
        self.resample, self.dropout = resample, dropout
        self.norm0 = nn.GroupNorm(min(32, inputs // 4), inputs, eps=1e-6)
        self.conv0 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.affine = nn.Linear(emb, outputs)
        self.norm1 = nn.GroupNorm(min(32, outputs // 4), outputs, eps=1e-6)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs or resample else None
        self.attention = attention
        if attention:
            self.norm2 = nn.GroupNorm(min(32, outputs // 4), outputs, eps=1e-6)
            self.qkv = nn.Conv2d(outputs, 3 * outputs, 1)
            self.proj = nn.Conv2d(outputs, outputs, 1)

    def resampled(self, x):
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x

    def forward(self, x, emb):
        y = self.conv0(self.resampled(F.silu(self.norm0(x))))
        y = F.silu(self.norm1(y + self.affine(emb)[:, :, None, None]))
        y = self.conv1(F.dropout(y, self.dropout, self.training))
        skip = x if self.skip is None else self.skip(self.resampled(x))
        x = (y + skip) * math.sqrt(0.5)
        if self.attention:
            batch, channels = x.shape[:2]
            q, k, v = self.qkv(self.norm2(x)).reshape(batch, channels, 3, -1).unbind(2)
            weights = torch.softmax(torch.einsum("bcq,bck->bqk", q, k / math.sqrt(channels)), dim=-1)
            attended = torch.einsum("bqk,bck->bcq", weights, v).reshape(x.shape)
            x = (x + self.proj(attended)) * math.sqrt(0.5)
        return x


class PlainUNet(nn.Module):
    """DDPM++ from torch.nn, with the names of our network."""

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        width, emb = config.model_channels, 4 * config.model_channels
        self.map_layer0, self.map_layer1 = nn.Linear(width, emb), nn.Linear(emb, emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        channels, skips = width, []
        levels = [(config.resolution >> level, width * mult) for level, mult in enumerate(config.channel_mult)]
        for level, (size, wide) in enumerate(levels):
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = nn.Conv2d(config.channels, width, 3, padding=1)
            else:
                self.enc[f"{size}x{size}_down"] = PlainBlock(channels, channels, emb, config.dropout, "down")
            skips.append(channels)
            for index in range(config.num_blocks):
                attends = size in config.attn_resolutions
                self.enc[f"{size}x{size}_block{index}"] = PlainBlock(
                    channels, wide, emb, config.dropout, attention=attends
                )
                channels = wide
                skips.append(channels)
        for level, (size, wide) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                self.dec[f"{size}x{size}_in0"] = PlainBlock(channels, channels, emb, config.dropout, attention=True)
                self.dec[f"{size}x{size}_in1"] = PlainBlock(channels, channels, emb, config.dropout)
            else:
                self.dec[f"{size}x{size}_up"] = PlainBlock(channels, channels, emb, config.dropout, "up")
            for index in range(config.num_blocks + 1):
                attends = index == config.num_blocks and size in config.attn_resolutions
                self.dec[f"{size}x{size}_block{index}"] = PlainBlock(
                    channels + skips.pop(), wide, emb, config.dropout, attention=attends
                )
                channels = wide
        size = config.resolution
        self.dec[f"{size}x{size}_aux_norm"] = nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)
        self.dec[f"{size}x{size}_aux_conv"] = nn.Conv2d(channels, config.channels, 3, padding=1)

    @classmethod
    def like(cls, model: UNet) -> PlainUNet:
        """One with the weights of `model`."""
        made, weights = cls(model.config), model.state_dict()
        made.load_state_dict({name: weights[name] for name in made.state_dict()})
        return made

    def forward(self, x, c_noise):
        half = self.config.model_channels // 2
        frequencies = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, dtype=torch.float32))
        angles = c_noise[:, None] * frequencies
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, PlainBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if "aux" in name:
                x = F.silu(layer(x)) if "norm" in name else layer(x)
            else:
                x = layer(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
        return x


class PlainTraining:
    """VP training, step by step, in plain PyTorch."""

    def __init__(self, config: TrainingConfig, denoiser: Denoiser, images: np.ndarray) -> None:
        self.config, self.images = config, torch.from_numpy(images)
        self.net = PlainUNet.like(denoiser.model).train()
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=config.lr)

    def loss(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        t = 1 + draws.level * (1e-5 - 1)
        sigma = (0.5 * 19.9 * t**2 + 0.1 * t).expm1().sqrt()
        x = images + draws.noise * sigma
        c_noise = 999 * ((0.1**2 + 2 * 19.9 * (sigma**2).log1p()).sqrt() - 0.1) / 19.9
        denoised = x - sigma * self.net(x / (sigma**2 + 1).sqrt(), c_noise.flatten())
        return (denoised - images) ** 2 / sigma**2

    def step(self) -> None:
        images = self.images[torch.randint(len(self.images), (BATCH,))].to(torch.float32) / 127.5 - 1
        draws = draw(self.config.denoiser.preconditioning, images.shape)
        self.optimizer.zero_grad(set_to_none=True)
        (self.loss(images, draws).sum() / BATCH).backward()
        for parameter in self.net.parameters():
            torch.nan_to_num(parameter.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        self.optimizer.step()
        with torch.no_grad():
            for averaged, parameter in zip(self.ema.parameters(), self.net.parameters(), strict=True):
                averaged.copy_(parameter.lerp(averaged, 0.999))


def run(bench: Bench) -> None:
    for channels in (32,) if bench.quick else (32, 64):
        images = np.random.default_rng(0).integers(0, 256, (1000, 3, 8, 8), dtype=np.uint8)
        denoiser = denoiser_config(8, 3, model_channels=channels)
        config = TrainingConfig(denoiser, images=BATCH, batch=BATCH)
        ours = Trainer(config, ImageSet(images), "cpu")
        with torch.no_grad():  # a fresh network's last layers are all but zero
            ours.flat.values.add_(0.02 * torch.randn_like(ours.flat.values))
        plain = PlainTraining(config, ours.denoiser, images)
        compare_once(ours, plain)

        def steps(trainer: Trainer | PlainTraining) -> None:
            for _ in range(STEPS):
                trainer.step()

        workload = f"train 8x8, {channels} channels, batch {BATCH}, {STEPS} steps"
        contenders = [
            Contender("diffmem", lambda ours=ours: steps(ours), "eager"),
            Contender("plain PyTorch", lambda plain=plain: steps(plain), "eager, NCHW, Adam"),
        ]
        bench.compare(workload, contenders)


def compare_once(ours: Trainer, plain: PlainTraining) -> None:
    """Raises where the two disagree on a batch's loss or gradients (dropout off)."""
    images, _ = ours.data.batch(np.arange(16))
    draws = draw(ours.config.denoiser.preconditioning, images.shape, generator=torch.Generator().manual_seed(0))
    ours.denoiser.eval()
    plain.net.eval()
    mine = ours.objective(images, *draws, None, None).sum()
    theirs = plain.loss(images.contiguous(), draws).sum()
    mine.backward()
    theirs.backward()
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0)
    gradients = copy.deepcopy(ours.denoiser.model)  # theirs, laid out as ours are
    gradients.load_state_dict({name: each.grad for name, each in plain.net.named_parameters()}, strict=False)
    named = dict(gradients.named_parameters())
    for name, parameter in ours.denoiser.model.named_parameters():
        wanted = named[name].detach()
        if (parameter.grad - wanted).norm() > 1e-3 * wanted.norm() + 1e-4:
            raise AssertionError(f"gradient of {name} differs")
    ours.denoiser.train()
    plain.net.train()
