"""Data parallelism under `torchrun`: what the processes of a run tell each other. Without one, a single process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from diffmem.errors import InputError

T = TypeVar("T")


class Ranks:
    """The processes that share a run; each computes its slice of every batch. `rank` of `size`; 0 writes and speaks."""

    def __init__(self) -> None:
        running = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if running else 0
        self.size = dist.get_world_size() if running else 1

    def sum(self, tensor: torch.Tensor) -> None:
        """Adds up `tensor` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def agree(self, decide: Callable[[], T]) -> T:
        """What `decide()` returns on the first process, on all; an InputError there is one everywhere."""
        if self.size == 1:
            return decide()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = decide()
            except InputError as error:
                answer[1] = str(error)
            except BaseException as error:
                answer[1] = f"the first process failed: {error!r}"
                dist.broadcast_object_list(answer)
                raise
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise InputError(answer[1])
        return answer[0]
