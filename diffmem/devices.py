"""Which device a call runs on."""

from __future__ import annotations

import os

import torch

from diffmem.errors import InputError

SETTING = "DIFFMEM_DEVICE"  # the environment's choice of what "auto" stands for


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
