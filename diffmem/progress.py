"""Progress of long work, told to whoever wants to know.

A progress callback is called as `progress(stage, done, total)`: `stage` a short English phrase ("reading images"),
`done` and `total` whole numbers in the stage's own units. It may be called often (callers limit themselves to a few
calls a second or one a block) and from the calling thread only. `total` may be 0 when there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """The callback that shows nothing."""


@contextmanager
def progress_bars(enabled: bool = True) -> Iterator[Progress]:
    """A callback that draws one bar per stage on standard error, where that is a terminal."""
    if not enabled:
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with RichProgress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, int] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks or (done == 0 and bars.tasks[tasks[stage]].finished):
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show
