"""Commands under `torchrun`: one process group per command; only the first rank prints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def is_first_rank() -> bool:
    """Whether this process is the one that prints and writes (there is no other without torchrun)."""
    return int(os.environ.get("RANK", "0")) == 0


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group() -> Iterator[bool]:
    """The process group that torchrun announced in the environment, NCCL on GPUs and gloo without; yields whether
    there is one."""
    if ranks() == 1:
        yield False
        return
    import torch
    import torch.distributed as dist

    from diffmem.devices import pick_device

    gpus = pick_device("auto").type == "cuda"
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("nccl" if gpus else "gloo")
    try:
        yield True
    finally:
        dist.destroy_process_group()
