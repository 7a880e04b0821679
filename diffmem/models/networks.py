"""The networks F inside a denoiser: UNet (DDPM++ and NCSN++) and ADM.

Both are called as `network(x, c_noise, labels, augment_labels)`: x (B, C, H, W) scaled images, c_noise (B,) or (1,),
labels class indices (B,) int64 or vectors (B, label_dim), None for all zeros. Written from the papers: Song et al.
(arXiv 2011.13456), Dhariwal and Nichol (arXiv 2105.05233), appendix F of Karras et al. (arXiv 2206.00364).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffmem.models.blocks import (
    BlockStyle,
    FourierEmbedding,
    GroupNorm,
    LabelEmbedding,
    QueryKeyValue,
    Resample,
    ResampleConv2d,
    UNetBlock,
    initialize,
    positional_embedding,
)
from diffmem.models.config import ADMConfig, UNetConfig


class UNet(nn.Module):
    """A DDPM++ or NCSN++ network F.

    Args:
        config: Its options.
        out_channels: Channels of the output; None: those of the images.
    """

    def __init__(self, config: UNetConfig, out_channels: int | None = None) -> None:
        super().__init__()
        self.config = config
        out_channels = config.channels if out_channels is None else out_channels
        noise_channels = config.model_channels * config.channel_mult_noise
        emb_channels = config.model_channels * config.channel_mult_emb
        style = BlockStyle(
            eps=1e-6,
            skip_scale=math.sqrt(0.5),
            adaptive=False,
            channels_per_head=None,
            resample_skip=False,
            taps=config.resample_filter,
            dropout=config.dropout,
            emb_channels=emb_channels,
        )

        if config.embedding == "fourier":
            self.map_noise = FourierEmbedding(noise_channels)
        if config.label_dim:
            self.map_label = LabelEmbedding(config.label_dim, noise_channels, True, math.sqrt(config.label_dim))
        if config.augment_dim:
            self.map_augment = nn.Linear(config.augment_dim, noise_channels, bias=False)
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)

        # Encoder. `stored` lists what feeds the decoder: channels, and whether the connection is enabled.
        self.enc = nn.ModuleDict()
        stored: list[tuple[int, bool]] = []
        count = len(config.channel_mult) * (config.num_blocks + 1)
        enabled = iter(config.skip_connections or (True,) * count)
        resolutions = [config.resolution >> level for level in range(len(config.channel_mult))]
        channels = config.model_channels
        aux_channels = config.channels
        for level, (resolution, multiplier) in enumerate(zip(resolutions, config.channel_mult, strict=True)):
            name = f"{resolution}x{resolution}"
            if level == 0:
                self.enc[f"{name}_conv"] = nn.Conv2d(config.channels, channels, 3, padding=1)
            else:
                self.enc[f"{name}_down"] = UNetBlock(channels, channels, style, resample="down")
                if config.encoder == "skip":
                    self.enc[f"{name}_aux_down"] = Resample("down", config.resample_filter)
                    self.enc[f"{name}_aux_skip"] = nn.Conv2d(aux_channels, channels, 1)
                elif config.encoder == "residual":
                    self.enc[f"{name}_aux_residual"] = ResampleConv2d(
                        aux_channels, channels, 3, "down", config.resample_filter, fused=True
                    )
                    aux_channels = channels
            stored.append((channels, next(enabled)))
            for index in range(config.num_blocks):
                width = config.model_channels * multiplier
                attends = resolution in config.attn_resolutions
                self.enc[f"{name}_block{index}"] = UNetBlock(channels, width, style, attention=attends)
                channels = width
                stored.append((channels, next(enabled)))
        self._enabled = [is_enabled for _, is_enabled in stored]

        self.dec = nn.ModuleDict()
        for level, resolution in reversed(list(enumerate(resolutions))):
            name = f"{resolution}x{resolution}"
            if level == len(resolutions) - 1:
                self.dec[f"{name}_in0"] = UNetBlock(channels, channels, style, attention=True)
                self.dec[f"{name}_in1"] = UNetBlock(channels, channels, style)
            else:
                self.dec[f"{name}_up"] = UNetBlock(channels, channels, style, resample="up")
            for index in range(config.num_blocks + 1):
                width = config.model_channels * config.channel_mult[level]
                skip_channels, is_enabled = stored.pop()
                self.dec[f"{name}_block{index}"] = UNetBlock(
                    channels + skip_channels,
                    width,
                    style,
                    attention=index == config.num_blocks and resolution in config.attn_resolutions,
                    zero_channels=0 if is_enabled else skip_channels,
                )
                channels = width
            if config.decoder == "skip" or level == 0:
                if config.decoder == "skip" and level < len(resolutions) - 1:
                    self.dec[f"{name}_aux_up"] = Resample("up", config.resample_filter)
                self.dec[f"{name}_aux_norm"] = GroupNorm(channels, style.eps)
                self.dec[f"{name}_aux_conv"] = nn.Conv2d(channels, out_channels, 3, padding=1)
        self._initialize()

    def _initialize(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear | LabelEmbedding | QueryKeyValue):
                last = name.rpartition(".")[2]
                gain = math.sqrt(0.2) if last == "qkv" else 1.0
                if last in ("conv1", "proj") or last.endswith("aux_conv"):
                    gain = 1e-5
                initialize(module, gain, "xavier")

    def _embed(
        self, c_noise: torch.Tensor, labels: torch.Tensor | None, augment_labels: torch.Tensor | None
    ) -> torch.Tensor:
        if self.config.embedding == "fourier":
            emb = self.map_noise(c_noise)
        else:
            emb = positional_embedding(c_noise, self.map_layer0.in_features, endpoint=True)
        emb = emb.roll(emb.shape[1] // 2, dims=1)  # sines first
        if self.config.label_dim:
            emb = emb + self.map_label(labels)
        if self.config.augment_dim and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(
        self,
        x: torch.Tensor,
        c_noise: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        emb = self._embed(c_noise, labels, augment_labels)
        skips: list[torch.Tensor | None] = []
        enabled = iter(self._enabled)
        aux = x
        for name, layer in self.enc.items():
            if name.endswith("aux_down"):
                aux = layer(aux)
            elif name.endswith(("aux_skip", "aux_residual")):
                x = x + layer(aux)
                if name.endswith("aux_residual"):
                    x = aux = x * math.sqrt(0.5)
                if skips[-1] is not None:
                    skips[-1] = x
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x if next(enabled) else None)

        image: Any = None  # the first block of the decoder ends in an image
        normalized: Any = None
        for name, layer in self.dec.items():
            if name.endswith("aux_up"):
                image = layer(image)
            elif name.endswith("aux_norm"):
                normalized = layer(x)
            elif name.endswith("aux_conv"):
                image = layer(normalized) if image is None else image + layer(normalized)
            else:
                if "_block" in name and (skip := skips.pop()) is not None:
                    x = torch.cat([x, skip], dim=1)
                x = layer(x, emb)
        return image


class ADM(nn.Module):
    """An ADM network F of the EDM family.

    Args:
        config: Its options.
        out_channels: Channels of the output; None: those of the images.
    """

    def __init__(self, config: ADMConfig, out_channels: int | None = None) -> None:
        super().__init__()
        self.config = config
        out_channels = config.channels if out_channels is None else out_channels
        emb_channels = config.model_channels * config.channel_mult_emb
        style = BlockStyle(
            eps=1e-5,
            skip_scale=1.0,
            adaptive=True,
            channels_per_head=64,
            resample_skip=True,
            taps=(1, 1),
            dropout=config.dropout,
            emb_channels=emb_channels,
        )
        if config.augment_dim:
            self.map_augment = nn.Linear(config.augment_dim, config.model_channels, bias=False)
        self.map_layer0 = nn.Linear(config.model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        if config.label_dim:
            self.map_label = LabelEmbedding(config.label_dim, emb_channels, bias=False)

        self.enc = nn.ModuleDict()
        stored: list[int] = []
        resolutions = [config.resolution >> level for level in range(len(config.channel_mult))]
        channels = config.model_channels * config.channel_mult[0]
        for level, (resolution, multiplier) in enumerate(zip(resolutions, config.channel_mult, strict=True)):
            name = f"{resolution}x{resolution}"
            if level == 0:
                self.enc[f"{name}_conv"] = nn.Conv2d(config.channels, channels, 3, padding=1)
            else:
                self.enc[f"{name}_down"] = UNetBlock(channels, channels, style, resample="down")
            stored.append(channels)
            for index in range(config.num_blocks):
                width = config.model_channels * multiplier
                attends = resolution in config.attn_resolutions
                self.enc[f"{name}_block{index}"] = UNetBlock(channels, width, style, attention=attends)
                channels = width
                stored.append(channels)

        self.dec = nn.ModuleDict()
        for level, resolution in reversed(list(enumerate(resolutions))):
            name = f"{resolution}x{resolution}"
            if level == len(resolutions) - 1:
                self.dec[f"{name}_in0"] = UNetBlock(channels, channels, style, attention=True)
                self.dec[f"{name}_in1"] = UNetBlock(channels, channels, style)
            else:
                self.dec[f"{name}_up"] = UNetBlock(channels, channels, style, resample="up")
            for index in range(config.num_blocks + 1):
                width = config.model_channels * config.channel_mult[level]
                attends = resolution in config.attn_resolutions
                self.dec[f"{name}_block{index}"] = UNetBlock(channels + stored.pop(), width, style, attention=attends)
                channels = width
        self.out_norm = GroupNorm(channels, style.eps)
        self.out_conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self._initialize()

    def _initialize(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, LabelEmbedding):
                nn.init.normal_(module.weight)
            elif isinstance(module, nn.Conv2d | nn.Linear | QueryKeyValue):
                gain = 0.0 if name.rpartition(".")[2] in ("conv1", "proj", "out_conv") else 1.0
                initialize(module, gain, "default")

    def forward(
        self,
        x: torch.Tensor,
        c_noise: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        emb = positional_embedding(c_noise, self.config.model_channels, endpoint=False)
        if self.config.augment_dim and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.config.label_dim and labels is not None:
            emb = emb + self.map_label(labels)
        emb = F.silu(emb)

        skips: list[torch.Tensor] = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return self.out_conv(self.out_norm(x))
