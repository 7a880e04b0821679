"""The alignment of images as a loop over windows: the plain formula, fit for float64."""

from __future__ import annotations

import torch

from diffmem.ops.alignment.arguments import is_flat


def alignment(searched: torch.Tensor, templates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `diffmem.ops.alignment`."""
    queries, variants, _, height, width = searched.shape
    count, h, w = templates.shape[1], templates.shape[3], templates.shape[4]
    best = templates.new_full((queries, count), -2.0)
    positions = torch.zeros((queries, count), dtype=torch.int64, device=templates.device)
    normal = normalized(templates)
    position = 0
    for v in range(variants):
        for y in range(height - h + 1):
            for x in range(width - w + 1):
                window = normalized(searched[:, v, :, y : y + h, x : x + w])
                correlation = torch.einsum("qchw,qkchw->qk", window, normal).clamp(-1, 1)
                better = correlation > best
                best = torch.where(better, correlation, best)
                positions[better] = position
                position += 1
    return best, positions


def normalized(images: torch.Tensor) -> torch.Tensor:
    """Images [..., C, h, w] less the mean of each channel, of length 1; zero where they have no variance."""
    centered = images - images.mean(dim=(-2, -1), keepdim=True)
    squared = centered.square().sum(dim=(-3, -2, -1), keepdim=True)
    flat = is_flat(squared, images.square().sum(dim=(-3, -2, -1), keepdim=True))
    return torch.where(flat, 0.0, centered / torch.where(flat, 1.0, squared).sqrt())
