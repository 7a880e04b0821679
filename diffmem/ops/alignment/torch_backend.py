"""The alignment of images as matrix products of PyTorch, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffmem.ops.alignment.arguments import is_flat
from diffmem.ops.alignment.reference import normalized

WINDOW_VALUES = 1 << 23  # values of windows that are laid out at a time


def alignment(searched: torch.Tensor, templates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `diffmem.ops.alignment`."""
    queries, variants, channels, height, width = searched.shape
    count, h, w = templates.shape[1], templates.shape[3], templates.shape[4]
    down, across = height - h + 1, width - w + 1
    best = templates.new_zeros((queries, count))
    positions = torch.zeros((queries, count), dtype=torch.int64, device=templates.device)
    if queries == 0 or count == 0:
        return best, positions
    block = max(1, WINDOW_VALUES // (variants * down * across * channels * h * w))
    for start in range(0, queries, block):
        part = slice(start, start + block)
        images = searched[part].flatten(0, 1)
        # Templates have no mean, so that windows may keep theirs in the products; a part of it, for less rounding.
        images, inverse = images - images.mean(dim=(2, 3), keepdim=True), inverse_lengths(images, h, w)
        windows = images.unfold(2, h, 1).unfold(3, w, 1).permute(0, 2, 3, 1, 4, 5)  # [b·V, down, across, C, h, w]
        rows = windows.reshape(-1, variants * down * across, channels * h * w)
        columns = normalized(templates[part]).flatten(2)
        correlation = torch.bmm(columns, rows.transpose(1, 2)) * inverse.reshape(-1, 1, variants * down * across)
        best[part], positions[part] = correlation.max(dim=2)
    return best.clamp_(-1, 1), positions


def inverse_lengths(images: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """1/√(Σ_c ‖window_c − mean‖²) of all windows [n, down, across] of images [n, C, H, W]; 0 without variance."""
    wide = images.double()
    center = wide.mean(dim=(2, 3), keepdim=True)
    pixels = h * w
    mean, square = (F.avg_pool2d(each, (h, w), stride=1) for each in (wide - center, (wide - center).square()))
    squared = (square - mean.square()).sum(dim=1) * pixels
    total = (F.avg_pool2d(wide.square(), (h, w), stride=1) * pixels).sum(dim=1)
    flat = is_flat(squared, total)
    return torch.where(flat, 0.0, torch.where(flat, 1.0, squared).rsqrt()).to(images.dtype)
