"""Affine alignment pair by pair: the plain formulas, fit for float64."""

from __future__ import annotations

import math

import torch

from diffmem.ops.affine_alignment.arguments import (
    DAMPING,
    DEFORMATION,
    FLAT,
    LONGEST_SHIFT,
    LONGEST_STEP,
)
from diffmem.ops.core_arrays import SCALING


def affine_alignment(
    images: torch.Tensor, templates: torch.Tensor, start: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `diffmem.ops.affine_alignment`."""
    remainders, maps = torch.ones_like(start[:, 0, 0]), start.clone()
    for pair, (image, template) in enumerate(zip(images, templates, strict=True)):
        remainders[pair], maps[pair] = align(image, template, start[pair], iterations)
    return remainders, maps


def align(image: torch.Tensor, template: torch.Tensor, start: torch.Tensor, iterations: int):
    """What remains of one pair, and its best map [2, 3]."""
    sides = (torch.arange(size, dtype=image.dtype) - (size - 1) / 2 for size in template.shape[1:])
    y, x = torch.meshgrid(*sides, indexing="ij")
    down, across = gradients(image)
    wanted, best_remainder, best = centered(template), math.inf, start
    if not bool(wanted.any()):
        return 1.0, start
    wanted = wanted / wanted.norm()
    current = start
    for iteration in range(iterations + 1):
        at = [current[i, 0] * x + current[i, 1] * y + current[i, 2] for i in range(2)]
        values = centered(sample(image, *at))
        length = values.norm()
        correlation = float((values * wanted).sum() / length) if length > 0 else 0.0
        remainder = cost(correlation, current)
        if remainder < best_remainder:
            best_remainder, best = remainder, current
        if iteration == iterations or length == 0:
            break
        right, below = sample(across, *at), sample(down, *at)
        # How the values change with b, and with A, less what their means do.
        changes = [right, below, right * x, right * y, below * x, below * y]
        columns = torch.stack([values, *(each - each.mean(dim=(1, 2), keepdim=True) for each in changes)])
        columns = columns.flatten(1)
        normal = columns @ columns.T
        normal += torch.diag(normal.diagonal() * DAMPING + 1e-6 * normal[0, 0] / values.numel())
        gain, *steps = torch.linalg.solve(normal, columns @ wanted.flatten()).tolist()
        if not gain > 0:
            break
        shift = [max(-LONGEST_SHIFT, min(LONGEST_SHIFT, each / gain)) for each in steps[:2]]
        turn = [max(-LONGEST_STEP, min(LONGEST_STEP, each / gain)) for each in steps[2:]]
        current = current + current.new_tensor([[*turn[:2], shift[0]], [*turn[2:], shift[1]]])
    return min(best_remainder, 1.0) if math.isfinite(best_remainder) else 1.0, best


def centered(images: torch.Tensor) -> torch.Tensor:
    """An image [C, h, w] less the mean of each channel; zero where it has no variance."""
    values = images - images.mean(dim=(1, 2), keepdim=True)
    flat = values.square().sum() <= FLAT * images.square().sum()
    return torch.zeros_like(values) if flat else values


def gradients(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Central differences of an image [C, H, W] down and across, its border continued."""
    padded = torch.nn.functional.pad(image[None], (1, 1, 1, 1), mode="replicate")[0]
    return (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2, (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2


def sample(image: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """An image [C, H, W] read at points counted from its center, by linear interpolation, its border continued."""
    height, width = image.shape[1:]
    x, y = (x + (width - 1) / 2).clamp(0, width - 1), (y + (height - 1) / 2).clamp(0, height - 1)
    left, top = x.floor().clamp(max=max(0, width - 2)), y.floor().clamp(max=max(0, height - 2))
    u, v = x - left, y - top
    left, top = left.long(), top.long()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    upper = image[:, top, left] * (1 - u) + image[:, top, right] * u
    lower = image[:, bottom, left] * (1 - u) + image[:, bottom, right] * u
    return upper * (1 - v) + lower * v


def cost(correlation: float, current: torch.Tensor) -> float:
    """√(1 − correlation), the more the map [2, 3] deforms, turns or scales; infinite for one that mirrors."""
    (a, b, _), (c, d, _) = current.tolist()
    same, other = math.hypot((a + d) / 2, (c - b) / 2), math.hypot((a - d) / 2, (c + b) / 2)
    largest, least = same + other, same - other
    if least <= 1e-3:
        return math.inf
    deformation = math.log(largest / least) + abs(math.atan2(c - b, a + d))
    scaling = abs(math.log(largest * least)) / 2
    return math.sqrt(max(0.0, 1 - correlation)) * math.exp(DEFORMATION * deformation + SCALING * scaling)
