"""The affine alignment of csrc/affine_alignment, as an op that torch.compile knows."""

from __future__ import annotations

import torch

from diffmem.ops.affine_alignment.arguments import OP_NAME, check, check_kernel
from diffmem.ops.cpu_ops import cpu_op
from diffmem.ops.registry import available_core, native_unavailable


def unavailable(device_type: str) -> str | None:
    """Why the compiled alignment cannot run on `device_type`, or None."""
    return "written for the CPU" if device_type != "cpu" else native_unavailable("cpu")


def unfit(images: torch.Tensor, templates: torch.Tensor, start: torch.Tensor, iterations: int) -> str | None:
    """Why the compiled alignment cannot take these, or None."""
    return None if images.dtype == torch.float32 else f"{images.dtype} is not float32"


@cpu_op("affine_alignment_native")
def affine_alignment(
    images: torch.Tensor, templates: torch.Tensor, start: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `diffmem.ops.affine_alignment`."""
    _check(images, templates, start, iterations)
    core = available_core(OP_NAME, unavailable("cpu"))
    images, templates, start = images.contiguous(), templates.contiguous(), start.contiguous()
    remainders, maps = torch.empty(len(images)), torch.empty(len(images), 2, 3)
    if len(images):
        core.affine_alignment(
            [*images.shape, *templates.shape[2:]], images.data_ptr(), templates.data_ptr(), start.data_ptr(),
            iterations, remainders.data_ptr(), maps.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return remainders, maps


@torch.library.register_fake("diffmem::affine_alignment_native")
def _(images, templates, start, iterations):
    _check(images, templates, start, iterations)
    return images.new_empty(images.shape[:1]), torch.empty_like(start, memory_format=torch.contiguous_format)


def _check(images, templates, start, iterations):
    check(images, templates, start, iterations)
    check_kernel(unfit(images, templates, start, iterations))
