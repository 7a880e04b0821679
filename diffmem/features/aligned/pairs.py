"""`align_pairs`: how a generated image and the training image beside it differ, once brought over one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffmem.errors import InputError
from diffmem.features.aligned import byte_images
from diffmem.features.aligned.geometry import LEAST_SIZE, WORKING_SIZE, Geometry, starts
from diffmem.lazy import torch
from diffmem.search.rows import check_finite

BLOCK = 64
ITERATIONS = 8
FINEST = 4 * WORKING_SIZE  # the largest size at which pairs are aligned


@dataclass(frozen=True)
class Alignments:
    """How n training images are brought to the n generated images beside them.

    A training image under the map x → A·x + b, counted from its center, mirrored where `mirrored`, its channels
    multiplied by `gain` and raised by `offset`, is `aligned_training`.

    Attributes:
        residuals: float32 [n], as those of `AlignedMatcher`: 0 for the same image, 1 for one that has nothing to do
            with it.
        mirrored: bool [n].
        scale: float32 [n], by which the training image is enlarged, √det A.
        shift: float32 [n, 2], b: how far it then lies down and right of the center, in pixels.
        maps: float32 [n, 2, 3], A beside b, x before y, in pixels.
        gain: float32 [n, C].
        offset: float32 [n, C], in the generated images' units.
        aligned_training: [n, C, H, W], uint8 where the generated images are, else float32.
        difference: [n, C, H, W] of the same dtype, |generated − aligned_training|.
    """

    residuals: np.ndarray
    mirrored: np.ndarray
    scale: np.ndarray
    shift: np.ndarray
    maps: np.ndarray
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
    if (found := _of_bytes(generated, training)) is not None:
        return found
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


def _of_bytes(generated: Any, training: Any) -> Alignments | None:
    """The answer where it can be had without PyTorch."""
    if np.ndim(generated) != 4 or np.shape(generated) != np.shape(training) or min(generated.shape[2:]) < LEAST_SIZE:
        return None
    geometry = Geometry(*generated.shape[2:])
    if not (byte_images.fit(generated, geometry) and byte_images.fit(training, geometry)):
        return None
    return Alignments(*byte_images.pairs(generated, training, geometry, ITERATIONS))


def as_tensor(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(images, torch.Tensor):
        return images.cpu()
    # Mirrored views have negative strides, and memory maps must not be written to: torch knows neither.
    # An axis of length 1 may have one in an array that counts as contiguous.
    usable = images.flags.c_contiguous and images.flags.writeable and min(images.strides) >= 0
    return torch.from_numpy(images if usable else np.array(images, order="C"))


def _align(generated: torch.Tensor, training: torch.Tensor, geometry: Geometry) -> tuple[np.ndarray, ...]:
    from diffmem.ops.affine_alignment import affine_alignment
    from diffmem.ops.alignment import alignment

    small, goal = geometry.reduce(generated), geometry.reduce(training)
    templates = geometry.templates(goal)
    _, position = alignment(geometry.variants(small), templates[:, None])
    mirrored, maps = starts(position[:, 0], geometry)
    remainders, maps = affine_alignment(mirror(small, mirrored), templates, maps, ITERATIONS)
    while geometry.working != tuple(generated.shape[2:]):  # once more at twice the size, until nothing is reduced
        finer = Geometry(*generated.shape[2:], largest=2 * geometry.largest)
        maps = rescaled(maps, geometry.working, finer.working)
        geometry = finer
        if geometry.largest <= FINEST:
            templates = geometry.templates(geometry.reduce(training))
            _, maps = affine_alignment(mirror(geometry.reduce(generated), mirrored), templates, maps, ITERATIONS)
    brought, covered = bring(training.float(), mirrored, maps)
    gain, offset = fit_colors(brought, generated.float(), covered)
    aligned = brought * gain[..., None, None] + offset[..., None, None]
    if generated.dtype == torch.uint8:
        aligned = aligned.round().clamp(0, 255)
    difference = (generated.float() - aligned).abs()
    kind = generated.dtype if generated.dtype == torch.uint8 else torch.float32
    scale = torch.linalg.det(maps[:, :, :2]).clamp(min=0).sqrt()
    return tuple(
        each.numpy()
        for each in (
            remainders, mirrored, scale, maps[:, :, 2].flip(1), maps, gain, offset, aligned.to(kind),
            difference.to(kind),
        )
    )  # fmt: skip


def mirror(images: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """The images [n, C, H, W], those of them mirrored that are to be."""
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def rescaled(maps: torch.Tensor, before: tuple[int, int], after: tuple[int, int]) -> torch.Tensor:
    """Maps [n, 2, 3] of images of one size [h, w] as maps of the same images at another size."""
    factors = torch.tensor([after[1] / before[1], after[0] / before[0]])
    columns = torch.cat([1 / factors, torch.ones(1)])
    return maps * factors[:, None] * columns


def bring(images: torch.Tensor, mirrored: torch.Tensor, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, C, H, W] under their maps, then mirrored where they are to be.

    Also which pixels the image covers, bool [n, 1, H, W]; beyond its border its nearest pixel continues.
    """
    height, width = images.shape[2:]
    sides = (torch.arange(size, dtype=torch.float32) - (size - 1) / 2 for size in (height, width))
    y, x = torch.meshgrid(*sides, indexing="ij")
    back = torch.linalg.inv(maps[:, :, :2])
    sign = torch.where(mirrored, -1.0, 1.0)[:, None, None]
    points = torch.stack([sign * x, y.expand(len(images), height, width)], dim=-1) - maps[:, None, None, :, 2]
    grid = torch.einsum("nij,nhwj->nhwi", back, points) * torch.tensor([2 / width, 2 / height])
    covered = (grid.abs() <= 1).all(dim=-1)[:, None]
    return torch.nn.functional.grid_sample(
        images, grid, mode="bicubic", padding_mode="border", align_corners=False
    ), covered


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
