"""Progress of long work, told to whoever wants to know.

A progress callback is called as `progress(stage, done, total)`: `stage` a short English phrase ("reading images"),
`done` and `total` whole numbers in the stage's own units. It may be called often (callers limit themselves to a few
calls a second or one a block) and from the calling thread only. `total` may be 0 when there is nothing to do. What
follows a colon in `stage` may change as the work goes on ("sampling: 93.4% copies so far").
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from diffmem.timing import TimeLeft, duration_range

Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """The callback that shows nothing."""


@contextmanager
def progress_bars(enabled: bool = True) -> Iterator[Progress]:
    """A callback that draws one bar per stage, with speed and time left, on standard error; where that is not a
    terminal (a log file), stages that take long print a line now and then."""
    if not enabled:
        yield silent
        return
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.text import Text

    class SpeedColumn(rich_progress.ProgressColumn):
        def render(self, task: rich_progress.Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{_digits(speed)}/s" if speed else "")

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Log(console.file)
        return
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        SpeedColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    # Speed is that of the last minutes: a step of the work may take that long.
    with rich_progress.Progress(*columns, console=console, speed_estimate_period=300) as bars:
        tasks: dict[str, rich_progress.TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            name = stage.partition(":")[0]
            if name not in tasks or (done == 0 and bars.tasks[tasks[name]].finished):
                tasks[name] = bars.add_task(stage, total=total)
            bars.update(tasks[name], description=stage, completed=done, total=total)

        yield show


class _Log:
    """Lines about stages that take longer than `INTERVAL` seconds, at most one per stage in that time."""

    INTERVAL = 30.0

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.begun: dict[str, tuple[float, int]] = {}  # when a stage began, and how much was done by then
        self.told: dict[str, float] = {}
        self.last: dict[str, tuple[float, int]] = {}
        self.left: dict[str, TimeLeft] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        name, now = stage.partition(":")[0], time.monotonic()
        if done == 0:  # the stage begins, perhaps again
            self.begun.pop(name, None)
            for known in (self.told, self.last, self.left):
                known.pop(name, None)
        began, before = self.begun.setdefault(name, (now, done))
        time_before, done_before = self.last.get(name, (began, before))
        if done > done_before and now - time_before >= 1.0:
            self.left.setdefault(name, TimeLeft()).add((done - done_before) / (now - time_before))
            self.last[name] = now, done
        if now - self.told.setdefault(name, now) < self.INTERVAL:
            return
        self.told[name] = now
        line = f"{stage}: {done:,} of {total:,}"
        if done > before:
            speed = (done - before) / (now - began)
            line += f", {_digits(speed)}/s"
            if name in self.left and (seconds := self.left[name].range(total - done)) is not None:
                line += f", {duration_range(*seconds)} left"
        print(line, file=self.file, flush=True)


def _digits(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
