"""What, beside a run's settings, decides the last bits of its result: this code, and how this machine forms sums."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch

import diffmem
from diffmem.ops.registry import native_module


def arithmetic(device: torch.device) -> str:
    """The instruction sets in use on a CPU, "avx512, PyTorch AVX512", or the name of a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    core = native_module()
    return (
        f"{'no compiled core' if core is None else core.cpu_level()}, PyTorch {torch.backends.cpu.get_cpu_capability()}"
    )


@cache
def code_fingerprint() -> str:
    """16 hexadecimal digits that stand for the Python files of this installation."""
    root, found = Path(diffmem.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root).as_posix()}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
