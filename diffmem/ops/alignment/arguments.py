"""What the op `alignment` asks of its arguments."""

from __future__ import annotations

import torch

from diffmem.errors import InputError
from diffmem.ops.arguments import check_shape, check_tensor

OP_NAME = "alignment"
REAL = (torch.float32, torch.float64)


def check(searched: torch.Tensor, templates: torch.Tensor) -> None:
    """Raises InputError where the two do not fit together, TypeError for what is not a tensor."""
    check_tensor(OP_NAME, "searched", searched, REAL)
    check_tensor(OP_NAME, "templates", templates, (searched.dtype,), like=searched)
    check_shape(OP_NAME, "searched", searched, [None] * 5, "[Q, V, C, H, W]")
    queries, variants, channels, height, width = searched.shape
    check_shape(OP_NAME, "templates", templates, (queries, None, channels, None, None), "[Q, K, C, h, w]")
    h, w = templates.shape[3:]
    if min(variants, channels, h, w) < 1:
        raise InputError(
            f"{OP_NAME}: there must be at least one variant, channel and pixel, got searched "
            f"{tuple(searched.shape)} and templates {tuple(templates.shape)}"
        )
    if h > height or w > width:
        raise InputError(f"{OP_NAME}: templates of {h}x{w} do not fit into searched images of {height}x{width}")


def is_flat(squared: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Whether an image has no variance: Σ(x − mean)² = squared is at most a millionth of Σx² = total."""
    return squared <= total * 1e-6


def check_kernel(unfit: str | None) -> None:
    """unfit: why a kernel cannot take what `check` has let pass, or None."""
    if unfit is not None:
        raise InputError(f"{OP_NAME}: searched and templates are not supported: {unfit}")
