"""Forward and backward pass of a part of a batch; on a GPU, where the network is small, as one CUDA graph.

A small network's step is hundreds of kernels that take less time than their launches. A graph launches them all at
once. It is captured from the first part of a batch and replayed for all others, which have its shape: they are copied
to where the first one lay. Random numbers go on as they would: a replay draws from the generator as it is then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

Tensors = tuple[torch.Tensor | None, ...]
# Runs a function, records what it launches, and returns (replay, the recorded run's result).
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]

WARM_UP = 3  # runs before a capture: choices that are measured, workspaces, lazily loaded kernels


def forward_backward(objective: Callable[..., torch.Tensor], batch: int, tensors: Tensors) -> torch.Tensor:
    """Adds the gradient of this part's loss, a share of a `batch`, to the parameters' and returns its summed loss."""
    losses = objective(*tensors)
    (losses.sum() / batch).backward()
    return losses.detach().sum()


def capture_cuda(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """A CUDA graph of `run`, after some runs to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # On the same stream: gradients are added up on the stream where a parameter was first used.
    with torch.cuda.graph(graph, stream=stream):
        result = run()
    return graph.replay, result


@contextlib.contextmanager
def unchanged(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Gives tensors back the values that they had."""
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)


class GraphedPass:
    """`run(tensors)` from a graph of its first call.

    changing: what `run` changes, the gradient first; capturing leaves it, and the random numbers, as they were.
    capture: how a graph is made.
    """

    def __init__(
        self, run: Callable[[Tensors], torch.Tensor], changing: Sequence[torch.Tensor], capture: Capture = capture_cuda
    ):
        self.run, self.changing, self.capture = run, changing, capture
        self.held: Tensors = ()
        self.replay: Callable[[], None] | None = None
        self.result: torch.Tensor | None = None

    def __call__(self, tensors: Tensors) -> torch.Tensor:
        """The summed loss, in memory that the next call writes to."""
        if self.replay is None:
            self._capture(tensors)
        for held, given in zip(self.held, tensors, strict=True):
            if held is not None and given is not None:
                held.copy_(given)
        assert self.replay is not None
        assert self.result is not None
        self.replay()
        return self.result

    def _capture(self, tensors: Tensors) -> None:
        held = tuple(None if each is None else each.clone(memory_format=torch.preserve_format) for each in tensors)
        device = self.changing[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), unchanged(self.changing):
            self.replay, self.result = self.capture(lambda: self.run(held))
        self.held = held
