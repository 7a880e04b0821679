"""What every op with Triton kernels needs around them: are they usable here, and how are they launched.

The ops themselves are `torch.library.custom_op`s with a fake implementation and their own backward op, opaque to
`torch.compile`, and not `triton_op`s, which it looks into: there is nothing in it to be fused with these kernels,
and what a compiled network then runs is, to the line, what the interpreter checked (TRITON_INTERPRET=1 runs kernels on
the CPU, slowly); a `triton_op` is traced by other code, which needs a GPU. Nothing here imports triton.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch


@cache
def triton_unavailable(device_type: str) -> str | None:
    """Why Triton kernels cannot serve `device_type`, or None."""
    if device_type not in ("cpu", "cuda"):
        return f"not tried on device {device_type!r}"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "") not in ("1", "true", "on"):
        return "GPU kernels; with TRITON_INTERPRET=1 in the environment they run in the interpreter, for tests"
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'diffmem[triton]')"
    return None


def launch(kernel: Any, grid: tuple[int, ...], first: torch.Tensor, *arguments: Any, **options: Any) -> None:
    """kernel[grid](first, *arguments, **options) on the GPU that holds `first`, on torch's current stream."""
    if first.device.type == "cuda" and torch.cuda.device_count() > 1:
        with torch.cuda.device(first.device):  # Triton launches on the current device
            kernel[grid](first, *arguments, **options)
    else:
        kernel[grid](first, *arguments, **options)
