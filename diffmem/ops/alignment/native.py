"""The alignment of csrc/alignment, as an op that torch.compile knows."""

from __future__ import annotations

import torch

from diffmem.ops import core_arrays
from diffmem.ops.alignment.arguments import OP_NAME, check, check_kernel
from diffmem.ops.cpu_ops import cpu_op
from diffmem.ops.registry import available_core

MOST_WINDOWS = 1 << 31  # positions are 32 bits inside


def unavailable(device_type: str) -> str | None:
    """Why the compiled alignment cannot run on `device_type`, or None."""
    return core_arrays.alignment_unavailable(device_type)


def unfit(searched: torch.Tensor, templates: torch.Tensor) -> str | None:
    """Why the compiled alignment cannot take these, or None."""
    if searched.dtype != torch.float32:
        return f"{searched.dtype} is not float32"
    _, variants, _, height, width = searched.shape
    windows = variants * (height - templates.shape[3] + 1) * (width - templates.shape[4] + 1)
    if windows >= MOST_WINDOWS:
        return f"a query has {windows:,} windows, not fewer than 2^31"
    return None


@cpu_op("alignment_native")
def alignment(searched: torch.Tensor, templates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `diffmem.ops.alignment`."""
    _check(searched, templates)
    available_core(OP_NAME, unavailable("cpu"))
    correlations, positions = core_arrays.alignment(searched.detach().numpy(), templates.detach().numpy())
    return torch.from_numpy(correlations), torch.from_numpy(positions)


@torch.library.register_fake("diffmem::alignment_native")
def _(searched, templates):
    _check(searched, templates)
    correlations = searched.new_empty(templates.shape[:2])
    return correlations, torch.empty_like(correlations, dtype=torch.int64)


def _check(searched, templates):
    check(searched, templates)
    check_kernel(unfit(searched, templates))
