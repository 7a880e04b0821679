"""The denoiser D(x; σ): a network inside its preconditioning, the one interface that samplers and losses see."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn as nn

from diffmem.errors import InputError
from diffmem.models.config import DenoiserConfig, ModuleConfig, UNetConfig
from diffmem.models.networks import ADM, UNet
from diffmem.models.preconditioning import IDDPM


class Denoiser(nn.Module):
    """D(x; σ) = c_skip·x + c_out·F(c_in·x; c_noise), an estimate of the clean images behind x = y + σ·noise.

    `model` is the network F, whose state dict has EDM's names under `model.`. `autocast_dtype` (None, torch.bfloat16 or
    torch.float16) runs F in mixed precision on devices that have it; the rest stays float32.

    Args:
        config: What it is made of.

    Example:
        >>> net = Denoiser(preset("ddpmpp_8", channels=1, model_channels=16)).eval()
        >>> net(torch.zeros(2, 1, 8, 8), 1.0).shape
        torch.Size([2, 1, 8, 8])
    """

    levels: torch.Tensor | None

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        self.autocast_dtype: torch.dtype | None = None
        if isinstance(config.network, ModuleConfig):
            raise InputError(f"the network is {config.network.name}, your own network: pass it to as_denoiser")
        channels = config.network.channels * (2 if isinstance(config.preconditioning, IDDPM) else 1)
        self.model: UNet | ADM
        if isinstance(config.network, UNetConfig):
            self.model = UNet(config.network, channels)
        else:
            self.model = ADM(config.network, channels)
        levels = None
        if isinstance(config.preconditioning, IDDPM):
            # On a device with memory even where the network is laid out on "meta".
            levels = torch.tensor(config.preconditioning.levels, device="cpu")
        self.register_buffer("levels", levels, persistent=False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stubs lack it

    @property
    def resolution(self) -> int:
        """Height and width of the images."""
        return self.config.network.resolution

    @property
    def channels(self) -> int:
        """Color channels of the images."""
        return self.config.network.channels

    @property
    def label_dim(self) -> int:
        """Number of classes, or length of label vectors; 0: unconditional."""
        return self.config.network.label_dim

    @property
    def sigma_min(self) -> float:
        """The lowest noise level the denoiser knows."""
        return self.config.preconditioning.sigma_min

    @property
    def sigma_max(self) -> float:
        """The highest noise level the denoiser knows."""
        return self.config.preconditioning.sigma_max

    def summary(self) -> str:
        """One line for a person: network, preconditioning, image size, parameters, classes."""
        size = f"{self.channels}x{self.resolution}x{self.resolution}"
        parameters = sum(parameter.numel() for parameter in self.parameters())
        classes = f"label_dim {self.label_dim}" if self.label_dim else "unconditional"
        network, around = type(self.model).__name__, type(self.config.preconditioning).__name__
        return f"{network} with {around} preconditioning, images {size}, {parameters:,} parameters, {classes}"

    def round_sigma(self, sigma: float) -> float:
        """The noise level the network really sees for `sigma`: the nearest discrete one for iDDPM, else itself."""
        preconditioning = self.config.preconditioning
        if isinstance(preconditioning, IDDPM):
            return min(preconditioning.levels, key=lambda level: abs(level - sigma))
        return sigma

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The denoised images (B, C, H, W), in the parameters' dtype (float32).

        x (B, C, H, W) noisy images, noise added to [-1, 1]; sigma the noise level, one number or one per image; labels
        class indices (B,) int64, or vectors (B, label_dim) floating, or None, which counts as all zeros;
        augment_labels (B, augment_dim) or None. Raises InputError where shapes do not fit the network.
        """
        self._check(x, labels)
        dtype = self.model.map_layer0.weight.dtype
        x = x.to(dtype)
        sigma = torch.as_tensor(sigma, device=x.device).to(dtype).reshape(-1, 1, 1, 1)
        if sigma.shape[0] not in (1, x.shape[0]):
            raise InputError(
                f"sigma: {sigma.shape[0]} noise levels for {x.shape[0]} images; give one, or one per image"
            )
        around = self.config.preconditioning
        if isinstance(around, IDDPM):
            assert self.levels is not None
            c = around.coefficients(sigma, self.levels)
        else:
            c = around.coefficients(sigma)
        # With EDM's shapes (B, 3, H, W) the layout of x is what every convolution after it follows.
        scaled = (c.in_ * x).contiguous(memory_format=torch.channels_last)
        with self._autocast(x.device.type):
            output = self.model(scaled, c.noise.reshape(-1), labels, augment_labels)
        return c.skip * x + c.out * output[:, : x.shape[1]].to(dtype)

    def _autocast(self, device_type: str) -> contextlib.AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device_type, self.autocast_dtype)

    def _check(self, x: torch.Tensor, labels: torch.Tensor | None) -> None:
        network = self.config.network
        if x.ndim != 4 or x.shape[1:] != (network.channels, network.resolution, network.resolution):
            size = f"{network.channels}, {network.resolution}, {network.resolution}"
            raise InputError(f"x: shape {tuple(x.shape)}, but this denoiser takes (B, {size})")
        if labels is None:
            return
        if not network.label_dim:
            raise InputError("labels: this denoiser is unconditional; pass None")
        wanted = (len(x), network.label_dim) if labels.is_floating_point() else (len(x),)
        if tuple(labels.shape) != wanted:
            raise InputError(
                f"labels: shape {tuple(labels.shape)}, but it must be ({len(x)},) class indices "
                f"or ({len(x)}, {network.label_dim}) vectors"
            )
