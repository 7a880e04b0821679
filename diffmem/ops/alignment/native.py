"""The alignment of csrc/alignment, as an op that torch.compile knows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from diffmem.ops import core_arrays
from diffmem.ops.alignment.arguments import OP_NAME, check, check_kernel
from diffmem.ops.cpu_ops import cpu_op
from diffmem.ops.registry import available_core, native_kernel_unavailable, native_unavailable


class Lines(NamedTuple):
    """Which lines the lines of enlarged images are made of: weights lower and upper (float32 [scales, size]) of line
    below (int32 [scales, size], at most size − 2) and the one after it."""

    below: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor


MOST_WINDOWS = 1 << 31  # positions are 32 bits inside


def unavailable(device_type: str) -> str | None:
    """Why the compiled alignment cannot run on `device_type`, or None."""
    return native_kernel_unavailable(device_type, OP_NAME, "AVX2 or NEON")


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
    core = available_core(OP_NAME, unavailable("cpu"))
    searched, templates = searched.contiguous(), templates.contiguous()
    correlations = torch.empty(templates.shape[:2])
    positions = torch.empty(templates.shape[:2], dtype=torch.int64)
    if correlations.numel():
        shape = [*searched.shape, templates.shape[1], *templates.shape[3:]]
        core.alignment(
            shape, searched.data_ptr(), templates.data_ptr(), correlations.data_ptr(), positions.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    return correlations, positions


@torch.library.register_fake("diffmem::alignment_native")
def _(searched, templates):
    _check(searched, templates)
    correlations = searched.new_empty(templates.shape[:2])
    return correlations, torch.empty_like(correlations, dtype=torch.int64)


def _check(searched, templates):
    check(searched, templates)
    check_kernel(unfit(searched, templates))


def variants(images: torch.Tensor, down: Lines, across: Lines) -> torch.Tensor:
    """Images as they are and mirrored, enlarged by linear interpolation.

    Args:
        images: float32 [n, C, h, w], h, w >= 2.
        down: How the lines of each scale are made of those of the image, for all h.
        across: The same of its columns, for all w.

    Returns:
        [n, 2·scales, C, h, w]: all scales, then those of the mirror image.
    """
    core, images = available_core(OP_NAME, unavailable("cpu")), images.contiguous()
    n, *rest = images.shape
    scales = len(down.below)
    made = images.new_empty((n, 2 * scales, *rest))
    if n:
        tables = ([each.data_ptr() for each in lines] for lines in (down, across))
        core.alignment_variants(
            [*images.shape, scales], images.data_ptr(), *tables, made.data_ptr(), torch.get_num_threads()
        )
    return made


def pool_bytes(images: np.ndarray, rows: np.ndarray, factor: int) -> torch.Tensor:
    """Means of squares of pixels of some images.

    Args:
        images: uint8 [N, C, h, w], C-contiguous.
        rows: int64 [n], which of them.
        factor: Pixels a side of a square; divides h and w.

    Returns:
        float32 [n, C, h // factor, w // factor].
    """
    available_core(OP_NAME, native_unavailable("cpu"))
    return torch.from_numpy(core_arrays.pool_bytes(images, rows, factor))
