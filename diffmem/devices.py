"""Which device a call runs on."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

from diffmem.errors import InputError
from diffmem.lazy import torch

SETTING = "DIFFMEM_DEVICE"  # the environment's choice of what "auto" stands for


def is_cpu(device: str | torch.device = "auto") -> bool:
    """Whether `pick_device` would pick the CPU; PyTorch is imported only where there may be a GPU."""
    setting = os.environ.get(SETTING) if device == "auto" else None
    if (setting or str(device)) == "cpu":
        return True
    if device == "auto" and not setting and "torch" not in sys.modules and not _has_driver():
        return True
    return pick_device(device).type == "cpu"


@cache
def _has_driver() -> bool:
    """Whether there is a driver of NVIDIA GPUs, or of AMD's, without which PyTorch sees none."""
    if any(map(os.path.exists, ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))):
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device that `device` names: "cpu", "cuda", "cuda:1", or "auto": what DIFFMEM_DEVICE in the environment names,
    else a GPU where there is one.

    Raises InputError for names that torch does not know and for devices that are not available.
    """
    if device == "auto":
        device = os.environ.get(SETTING) or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise InputError(f'device {device!r} is unknown: choose "cpu", "cuda" or "auto"') from error
    if picked.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (picked.index or 0) >= count:
            raise InputError(
                f'device {device!r} is not available (this torch sees {count} GPUs): choose "cpu" or "auto"'
            )
    elif picked.type != "cpu":
        raise InputError(f'device {device!r} is not supported: choose "cpu", "cuda" or "auto"')
    return picked
