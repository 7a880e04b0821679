"""`align_pairs`: how a generated image and the training image beside it differ, once brought over one another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from diffmem.errors import InputError
from diffmem.features.aligned.geometry import SCALES, Geometry, variant_of
from diffmem.ops.alignment import alignment
from diffmem.search.rows import check_finite

BLOCK = 64


@dataclass(frozen=True)
class Alignments:
    """How n training images are brought to the n generated images beside them.

    A training image enlarged by `scale` about its center, moved by `shift`, mirrored where `mirrored`, its channels
    multiplied by `gain` and raised by `offset`, is `aligned_training`.

    Attributes:
        residuals: float32 [n], √(1 − correlation) after alignment: 0 for the same image, about 1 for others.
        mirrored: bool [n].
        scale: float32 [n].
        shift: float32 [n, 2], down and right, in pixels.
        gain: float32 [n, C].
        offset: float32 [n, C], in the generated images' units.
        aligned_training: [n, C, H, W], uint8 where the generated images are, else float32.
        difference: [n, C, H, W] of the same dtype, |generated − aligned_training|.
    """

    residuals: np.ndarray
    mirrored: np.ndarray
    scale: np.ndarray
    shift: np.ndarray
    gain: np.ndarray
    offset: np.ndarray
    aligned_training: np.ndarray
    difference: np.ndarray

    def __len__(self) -> int:
        return len(self.residuals)


def align_pairs(generated: np.ndarray | torch.Tensor, training: np.ndarray | torch.Tensor) -> Alignments:
    """Brings the i-th training image to the i-th generated image, in geometry, brightness and color.

    Args:
        generated: [n, C, H, W], uint8 or real.
        training: [n, C, H, W], of any range of values.

    Raises:
        InputError: Shapes differ, images are smaller than 4 pixels, or values are not finite.
    """
    generated, training = (as_tensor(each) for each in (generated, training))
    if generated.ndim != 4 or generated.shape != training.shape:
        raise InputError(
            f"generated and training must be images [n, C, H, W] of one shape, got {tuple(generated.shape)} and "
            f"{tuple(training.shape)}"
        )
    for what, images in (("generated images", generated), ("training images", training)):
        if len(images):
            check_finite(images.flatten(1), what)
    geometry = Geometry(*generated.shape[2:])
    parts = [
        _align(generated[start : start + BLOCK], training[start : start + BLOCK], geometry)
        for start in range(0, max(1, len(generated)), BLOCK)
    ]
    return Alignments(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def as_tensor(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    # Mirrored views have negative strides, which torch does not know.
    return images.cpu() if isinstance(images, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(images))


def _align(generated: torch.Tensor, training: torch.Tensor, geometry: Geometry) -> tuple[np.ndarray, ...]:
    small = geometry.reduce(generated)
    templates = geometry.templates(geometry.reduce(training))[:, None]
    correlation, position = alignment(geometry.variants(small), templates)
    mirrored, scale, down, right = variant_of(position[:, 0], geometry)
    scale = 1 / torch.tensor(SCALES)[scale]
    factors = [size / other for size, other in zip(generated.shape[2:], geometry.working, strict=True)]
    shift = torch.stack([down * scale * factors[0], right * scale * factors[1]], dim=1)
    brought, covered = bring(training.float(), mirrored, scale, shift)
    gain, offset = fit_colors(brought, generated.float(), covered)
    aligned = brought * gain[..., None, None] + offset[..., None, None]
    if generated.dtype == torch.uint8:
        aligned = aligned.round().clamp(0, 255)
    difference = (generated.float() - aligned).abs()
    kind = generated.dtype if generated.dtype == torch.uint8 else torch.float32
    return tuple(
        each.numpy()
        for each in (
            (1 - correlation[:, 0]).clamp(min=0).sqrt(), mirrored, scale, shift, gain, offset,
            aligned.to(kind), difference.to(kind),
        )
    )  # fmt: skip


def bring(
    images: torch.Tensor, mirrored: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, C, H, W] enlarged by `scale` about their center, moved by `shift` pixels, then mirrored.

    Also which pixels the image covers, bool [n, 1, H, W]; beyond its border its nearest pixel continues.
    """
    n, _, height, width = images.shape
    y, x = (torch.arange(size, dtype=torch.float32) - (size - 1) / 2 for size in (height, width))
    across = torch.where(mirrored[:, None], -x, x)
    down = (y - shift[:, :1]) / scale[:, None]
    across = (across - shift[:, 1:]) / scale[:, None]
    grid = torch.stack(
        [
            (across * (2 / width))[:, None, :].expand(n, height, width),
            (down * (2 / height))[:, :, None].expand(n, height, width),
        ],
        dim=-1,
    )
    covered = (grid.abs() <= 1).all(dim=-1)[:, None]
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False), covered


def fit_colors(images: torch.Tensor, wanted: torch.Tensor, covered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain and offset [n, C] that bring images to the wanted ones by least squares over the covered pixels."""
    weight = covered.to(images.dtype)
    count = weight.sum(dim=(2, 3)).clamp(min=1)
    mean, target = ((each * weight).sum(dim=(2, 3)) / count for each in (images, wanted))
    centered = (images - mean[..., None, None]) * weight
    variance = centered.square().sum(dim=(2, 3))
    covariance = (centered * (wanted - target[..., None, None])).sum(dim=(2, 3))
    gain = torch.where(variance > 0, covariance / variance.clamp(min=torch.finfo(variance.dtype).tiny), 0.0)
    return gain, target - gain * mean
