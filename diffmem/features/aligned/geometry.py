"""Sizes, windows and transforms of aligned search.

Images are compared at a working size of at most `WORKING_SIZE` pixels a side: enough to tell an image from all others,
and free of the noise and artifacts of large pictures. All lengths below scale with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from diffmem.errors import InputError
from diffmem.lazy import torch
from diffmem.ops import core_arrays
from diffmem.ops.core_arrays import LineTables

WORKING_SIZE = 32
LEAST_SIZE = 4
SCALES = (0.8, 0.862, 0.928, 1.0, 1.077, 1.16, 1.25)


@dataclass(frozen=True)
class Geometry:
    """How images of one size are compared.

    Attributes:
        height: Height of the images, in pixels.
        width: Width of the images, in pixels.
        largest: The longest side at which they are compared.
    """

    height: int
    width: int
    largest: int = WORKING_SIZE

    def __post_init__(self) -> None:
        if min(self.height, self.width) < LEAST_SIZE:
            raise InputError(
                f"images of {self.height}x{self.width} are too small to align: at least {LEAST_SIZE} pixels a side are "
                "needed; compare them with features='pixels'"
            )

    @cached_property
    def working(self) -> tuple[int, int]:
        """The size [h, w] at which images are compared."""
        factor = min(1.0, self.largest / max(self.height, self.width))
        return max(LEAST_SIZE, round(self.height * factor)), max(LEAST_SIZE, round(self.width * factor))

    @cached_property
    def margin(self) -> tuple[int, int]:
        """Largest shift of the second stage, an eighth of the image: the template is what lies within this margin."""
        return max(1, round(self.working[0] / 8)), max(1, round(self.working[1] / 8))

    @cached_property
    def step(self) -> tuple[int, int]:
        """Shift of the first stage, a sixteenth of the image."""
        return max(1, round(self.working[0] / 16)), max(1, round(self.working[1] / 16))

    def reduce(self, images: torch.Tensor) -> torch.Tensor:
        """Images [n, C, H, W] at the working size, float32."""
        images = images.float()
        if tuple(images.shape[2:]) == self.working:
            return images
        return torch.nn.functional.interpolate(
            images, size=self.working, mode="bilinear", antialias=True, align_corners=False
        )

    def templates(self, images: Any) -> Any:
        """The central windows of images [..., h, w] at the working size, of an array or a tensor."""
        (top, left), (height, width) = self.margin, self.working
        return images[..., top : height - top, left : width - left]

    def inner(self, images: torch.Tensor) -> torch.Tensor:
        """The central windows of the first stage, less a step on each side, of images [..., h, w]."""
        (down, right), (height, width) = self.step, self.working
        return images[..., down : height - down, right : width - right]

    def windows(self, images: torch.Tensor) -> torch.Tensor:
        """The nine windows of that size of images [n, C, h, w], moved by a step: [n, 9, C, y, x]."""
        (down, right), (height, width) = self.step, self.working
        windows = images.unfold(2, height - 2 * down, down).unfold(3, width - 2 * right, right)
        return windows.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)

    def variants(self, images: torch.Tensor) -> torch.Tensor:
        """Images [n, C, h, w] as they are and mirrored, each enlarged by `SCALES` about its center: [n, V, C, h, w].

        Variant m·len(SCALES) + s is mirrored where m = 1. Beyond the border the nearest pixel continues.
        """
        n, channels, height, width = images.shape
        if images.dtype == torch.float32 and core_arrays.alignment_unavailable(images.device.type) is None:
            return torch.from_numpy(variants_of_array(images.detach().numpy()))
        both = torch.stack([images, images.flip(-1)], dim=1)
        vertical, horizontal = (
            torch.stack([resampling(size, scale) for scale in SCALES]).to(images) for size in (height, width)
        )
        # Two large products instead of many small ones: along the lines for all scales, then down for each.
        across = (both.reshape(-1, width) @ horizontal.flatten(0, 1).T).view(-1, height, len(SCALES), width)
        across = across.permute(2, 0, 3, 1).reshape(len(SCALES), -1, height)
        down = torch.bmm(across, vertical.transpose(1, 2)).view(len(SCALES), n, 2, channels, width, height)
        return down.permute(1, 2, 0, 3, 5, 4).reshape(n, 2 * len(SCALES), channels, height, width)


def variants_of_array(images: np.ndarray) -> np.ndarray:
    """`Geometry.variants` of float32 images, by the compiled core."""
    height, width = images.shape[2:]
    return core_arrays.variants(images, _lines(height), _lines(width))


def resampling(size: int, scale: float) -> torch.Tensor:
    """The matrix [size, size] that enlarges a line of pixels by `scale` about its center, by linear interpolation."""
    below, weight = map(torch.from_numpy, _interpolated(size, scale))
    matrix = torch.zeros(size, size, dtype=torch.float64)
    rows = torch.arange(size)
    matrix[rows, below] += 1 - weight
    matrix[rows, (below + 1).clamp(max=size - 1)] += weight
    return matrix


def _interpolated(size: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel of the enlarged line the pixel of the line at or below it, and the weight of the next one."""
    center = (size - 1) / 2
    at = np.clip((np.arange(size, dtype=np.float64) - center) / scale + center, 0, size - 1)
    below = np.minimum(np.floor(at).astype(np.int64), max(0, size - 2))
    return below, at - below


@lru_cache(maxsize=64)
def _lines(size: int) -> LineTables:
    """`resampling` by all `SCALES`, as the compiled core takes it."""
    below, weight = (np.stack(each) for each in zip(*(_interpolated(size, scale) for scale in SCALES), strict=True))
    return LineTables(below.astype(np.int32), (1 - weight).astype(np.float32), weight.astype(np.float32))


def starts(position: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """What the positions [...] of the op `alignment` mean: mirrored, bool [...], and the map [..., 2, 3] that takes a
    template's pixel, counted from its center, to the image's (x before y)."""
    down, across = (2 * margin + 1 for margin in geometry.margin)
    x = position % across - geometry.margin[1]
    y = position // across % down - geometry.margin[0]
    variant = position // (across * down)
    enlarged = torch.tensor(SCALES, device=position.device)[variant % len(SCALES)]
    zero, one = torch.zeros_like(enlarged), torch.ones_like(enlarged)
    rows = torch.stack([one, zero, x.to(enlarged), zero, one, y.to(enlarged)], dim=-1)
    return variant >= len(SCALES), rows.unflatten(-1, (2, 3)) / enlarged[..., None, None]
