"""Seconds of work on a device, without what Python does around it.

On a GPU the calls are captured once into a CUDA graph, one after the other, each on buffers of its own which together
are larger than the L2 cache, and replays of the graph are timed by events. What cannot be captured (it synchronizes, or
is another library's) is timed by events around the calls. On a CPU, as in a dry run, calls are timed by the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

LEAST_SECONDS = 0.02  # of one timing; shorter runs are repeated
REPEATS = 5


@dataclass(frozen=True)
class Measured:
    """Seconds of one call: the median of REPEATS, and the fastest; how: "graph", "events" or "clock"."""

    seconds: float
    fastest: float
    how: str


def seconds_per_call(
    calls: Sequence[Callable[[], object]], device: torch.device, graph: bool = True, repeats: int = REPEATS
) -> Measured:
    """Of the same work on several buffers: `calls` in turn. They must have been run before."""
    if device.type != "cuda":
        began = time.perf_counter()
        calls[0]()
        seconds = time.perf_counter() - began
        return Measured(seconds, seconds, "clock")
    how = "events"

    def run() -> None:
        for call in calls:
            call()

    if graph:
        try:
            run, how = captured(calls), "graph"
        except RuntimeError as error:  # a synchronization, or memory of another pool
            print(f"not captured: {str(error).splitlines()[0][:100]}")
            torch.cuda.synchronize(device)
    once = elapsed(run, 1)
    count = max(1, round(LEAST_SECONDS / max(once, 1e-6)))
    times = [elapsed(run, count) / count / len(calls) for _ in range(repeats)]
    return Measured(statistics.median(times), min(times), how)


def elapsed(run: Callable[[], object], count: int) -> float:
    """Seconds of `count` runs on the current stream, by events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def captured(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """The replay of a CUDA graph of all calls; their results stay alive, so that each has memory of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [call() for call in calls]

    def replay(_kept=results) -> None:
        graph.replay()

    return replay
