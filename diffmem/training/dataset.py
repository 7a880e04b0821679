"""The training set on the device: uint8 pixels, gathered by index, no loader."""

from __future__ import annotations

import numpy as np
import torch

from diffmem.data import ImageSet
from diffmem.errors import InputError
from diffmem.models.config import ADMConfig, ModuleConfig, UNetConfig

Network = UNetConfig | ADMConfig | ModuleConfig
_SHARE_OF_MEMORY = 0.5  # of a GPU's free memory that pixels may take


class TrainingImages:
    """An image set laid out for training: as uint8, channels last, on `device` where it fits, else in pinned memory.

    With `xflip` item N + i is image i mirrored, and there are 2N items. Raises InputError where images or labels do not
    fit the network.
    """

    def __init__(
        self,
        images: ImageSet,
        network: Network,
        device: torch.device,
        xflip: bool = False,
    ):
        _check(images, network)
        self.source, self.fingerprint = images.source, images.fingerprint
        self.device = device
        self.count = len(images)
        self.xflip = xflip
        pixels = torch.from_numpy(np.ascontiguousarray(images.images.transpose(0, 2, 3, 1)))
        self.resident = device.type == "cpu"
        if device.type == "cuda":
            self.resident = pixels.nbytes <= _SHARE_OF_MEMORY * torch.cuda.mem_get_info(device)[0]
        self._pixels = pixels.to(device) if self.resident else pixels.pin_memory()
        labels = images.labels if network.label_dim else None
        self._labels = None if labels is None else torch.from_numpy(np.array(labels)).to(device)

    def __len__(self) -> int:
        return self.count * (2 if self.xflip else 1)

    def batch(self, items: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(images (B, C, H, W) float32 in [-1, 1], channels_last; labels (B,) int64 or (B, label_dim), or None)."""
        chosen = torch.from_numpy(items % self.count)
        pixels = self._pixels.index_select(0, chosen.to(self._pixels.device, non_blocking=True))
        images = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
        if self.xflip and (items >= self.count).any():
            mirrored = torch.from_numpy(items >= self.count).to(self.device, non_blocking=True)
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        if self._labels is None:
            return images, None
        return images, self._labels.index_select(0, chosen.to(self.device, non_blocking=True))


def _check(images: ImageSet, network: Network) -> None:
    if len(images) == 0:
        raise InputError(f"{images.source}: no images to train on")
    if images.images.dtype != np.uint8:
        raise InputError(f"{images.source}: {images.images.dtype} images, but training takes uint8 gray levels 0–255")
    wanted = (network.channels, network.resolution, network.resolution)
    if images.image_shape != wanted:
        raise InputError(
            f"{images.source}: images have shape {images.image_shape}, but the network takes {wanted}: resize or "
            "convert the images, or change the network's resolution and channels"
        )
    if not network.label_dim:
        return
    if images.labels is None:
        raise InputError(f"{images.source}: no labels, but the network has label_dim {network.label_dim}")
    if images.labels.ndim == 2:
        if images.labels.shape[1] != network.label_dim:
            raise InputError(
                f"{images.source}: label vectors of length {images.labels.shape[1]}, but label_dim is "
                f"{network.label_dim}"
            )
    elif not 0 <= images.labels.min() <= images.labels.max() < network.label_dim:
        raise InputError(
            f"{images.source}: class indices {images.labels.min()} … {images.labels.max()}, but label_dim is "
            f"{network.label_dim}"
        )
