"""Affine alignment of batches of pairs with PyTorch, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffmem.ops.affine_alignment.arguments import (
    DAMPING,
    DEFORMATION,
    FLAT,
    LONGEST_SHIFT,
    LONGEST_STEP,
)
from diffmem.ops.core_arrays import SCALING

BLOCK_VALUES = 1 << 24  # values of the templates' derivatives held at a time


def affine_alignment(
    images: torch.Tensor, templates: torch.Tensor, start: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `diffmem.ops.affine_alignment`."""
    if len(images) == 0:
        return start[:, 0, 0].clone(), start.clone()
    block = max(1, BLOCK_VALUES // (7 * templates[0].numel()))
    parts = [
        _align(*(each[first : first + block] for each in (images, templates, start)), iterations)
        for first in range(0, len(images), block)
    ]
    remainders, maps = zip(*parts, strict=True)
    return torch.cat(remainders), torch.cat(maps)


def _align(images: torch.Tensor, templates: torch.Tensor, start: torch.Tensor, iterations: int):
    height, width = images.shape[2:]
    sides = (
        torch.arange(size, dtype=images.dtype, device=images.device) - (size - 1) / 2 for size in templates.shape[2:]
    )
    y, x = torch.meshgrid(*sides, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)])
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    across, down = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2], padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    stacked = torch.cat([images, across / 2, down / 2], dim=1)
    wanted, varies = _centered(templates)
    wanted = wanted / wanted.norm(dim=1, keepdim=True).clamp(min=torch.finfo(wanted.dtype).tiny)
    scale = torch.tensor([2 / width, 2 / height], dtype=images.dtype, device=images.device)
    current, best = start, start
    best_remainder = torch.full_like(start[:, 0, 0], torch.inf)
    for iteration in range(iterations + 1):
        at = torch.einsum("nij,jhw->nhwi", current, points) * scale
        sampled = F.grid_sample(stacked, at, mode="bilinear", padding_mode="border", align_corners=False)
        values, right, below = sampled.chunk(3, dim=1)
        values, not_flat = _centered(values)
        length = values.norm(dim=1)
        varies &= not_flat
        correlation = (values * wanted).sum(dim=1) / length.clamp(min=torch.finfo(length.dtype).tiny)
        remainder = _cost(correlation, current)
        better = varies & (remainder < best_remainder)
        best_remainder = torch.where(better, remainder, best_remainder)
        best = torch.where(better[:, None, None], current, best)
        if iteration == iterations:
            break
        changes = torch.stack([right, below, right * x, right * y, below * x, below * y], dim=1)
        changes = (changes - changes.mean(dim=(3, 4), keepdim=True)).flatten(2)
        columns = torch.cat([values[:, None], changes], dim=1)
        normal = columns @ columns.transpose(1, 2)
        damping = normal.diagonal(dim1=1, dim2=2) * DAMPING + 1e-6 * normal[:, :1, 0] / values.shape[1]
        solvable = varies[:, None, None]
        normal = torch.where(solvable, normal + torch.diag_embed(damping), torch.eye(7).to(normal))
        solution = torch.linalg.solve(normal, columns @ wanted[..., None])[..., 0]
        gain = solution[:, :1]
        varies &= gain[:, 0] > 0  # where it is not, no step is to be trusted, nor what would follow
        steps = torch.where(varies[:, None], solution[:, 1:] / torch.where(gain > 0, gain, 1.0), 0.0)
        shift = steps[:, :2].clamp(-LONGEST_SHIFT, LONGEST_SHIFT)
        turn = steps[:, 2:].clamp(-LONGEST_STEP, LONGEST_STEP).view(-1, 2, 2)
        current = current + torch.cat([turn, shift[..., None]], dim=2)
    return best_remainder.clamp(max=1), best


def _centered(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, C, h, w] less the mean of each channel, as rows, zero without variance; and whether they have some."""
    values = (images - images.mean(dim=(2, 3), keepdim=True)).flatten(1)
    varies = values.square().sum(dim=1) > FLAT * images.flatten(1).square().sum(dim=1)
    return torch.where(varies[:, None], values, 0.0), varies


def _cost(correlation: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    a, b, _, c, d, _ = current.flatten(1).unbind(1)
    same, other = torch.hypot((a + d) / 2, (c - b) / 2), torch.hypot((a - d) / 2, (c + b) / 2)
    largest, least = same + other, same - other
    allowed = least > 1e-3
    least = torch.where(allowed, least, 1.0)
    deformation = (largest / least).log() + torch.atan2(c - b, a + d).abs()
    scaling = (largest * least).log().abs() / 2
    remainder = (1 - correlation).clamp(min=0).sqrt() * (DEFORMATION * deformation + SCALING * scaling).exp()
    return torch.where(allowed, remainder, torch.inf)
