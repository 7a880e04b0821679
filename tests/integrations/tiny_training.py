"""Trainings of seconds, on digits, for the tests of frameworks."""

from __future__ import annotations

import torch
import torch.nn as nn

import diffmem
from diffmem.sampling import SamplerConfig

DIGITS = diffmem.load_images("builtin:digits", limit=40)
QUICK = SamplerConfig(solver="unipc", steps=4)


class TinyDenoiser(nn.Module):
    """EDM's preconditioning (sigma_data 0.5) around two layers, with dropout, so that modes and random states count."""

    channels, resolution = 1, 8

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(65, width), nn.SiLU(), nn.Dropout(0.1), nn.Linear(width, 64))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        sigma = sigma.reshape(-1, 1).expand(len(x), 1)
        scale = (sigma**2 + 0.25).sqrt()
        flat = x.flatten(1)
        out = self.layers(torch.cat([flat / scale, sigma.log() / 4], 1))
        return (flat * 0.25 / scale**2 + out * 0.5 * sigma / scale).reshape(x.shape)


def loss_of(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """EDM's loss, with noise of torch's generator."""
    sigma = (torch.randn(len(images), 1, 1, 1) * 1.2 - 1.2).exp()
    denoised = network(images + torch.randn_like(images) * sigma, sigma)
    return ((denoised - images) ** 2 * (sigma**2 + 0.25) / (0.5 * sigma) ** 2).mean()


def floats() -> torch.Tensor:
    """The training images in [-1, 1]."""
    return torch.from_numpy(DIGITS.images) / 127.5 - 1
