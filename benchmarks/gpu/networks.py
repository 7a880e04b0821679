"""Networks by our kernels, and by PyTorch's operations alone."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from unittest import mock

from benchmarks.gpu.jobs import Variant
from benchmarks.gpu.target import Target
from diffmem.models import DenoiserConfig, UNetConfig, preset
from diffmem.models.preconditioning import VP

OPS = ("group_norm_silu", "attention")


@contextlib.contextmanager
def by(implementation: str) -> Iterator[None]:
    """Every op of a network by PyTorch, for "PyTorch's"; as it chooses, for "diffmem"."""
    if implementation == "diffmem":
        yield
        return
    with contextlib.ExitStack() as stack:
        for op in OPS:
            module = importlib.import_module(f"diffmem.ops.{op}")
            stack.enter_context(mock.patch.object(module, "OP", module.OP.only("torch")))
        yield


def config_of(variant: Variant, target: Target) -> tuple[DenoiserConfig, int]:
    """The denoiser's configuration without dropout, which would make the ways incomparable, and the batch."""
    if target.tiny:
        small = UNetConfig(4, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(4,), dropout=0)
        return DenoiserConfig(small, VP()), 1
    return preset(variant.preset, dropout=0.0), variant.batch
