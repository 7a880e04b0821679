"""The affine alignment of csrc/affine_alignment, as an op that torch.compile knows."""

from __future__ import annotations

import torch

from diffmem.ops import core_arrays
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
    available_core(OP_NAME, unavailable("cpu"))
    remainders, maps = core_arrays.affine_alignment(
        images.detach().numpy(), templates.detach().numpy(), start.detach().numpy(), iterations
    )
    return torch.from_numpy(remainders), torch.from_numpy(maps)


@torch.library.register_fake("diffmem::affine_alignment_native")
def _(images, templates, start, iterations):
    _check(images, templates, start, iterations)
    return images.new_empty(images.shape[:1]), torch.empty_like(start, memory_format=torch.contiguous_format)


def _check(images, templates, start, iterations):
    check(images, templates, start, iterations)
    check_kernel(unfit(images, templates, start, iterations))
