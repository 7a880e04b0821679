"""`stats.jsonl`: a line of statistics every so many steps."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from diffmem.atomic_io import atomic_write

STATS = "stats.jsonl"


@dataclass(frozen=True)
class Stats:
    """A line of `stats.jsonl`.

    Attributes:
        images: Images seen.
        epochs: Epochs.
        steps: Steps of the optimizer.
        loss: Mean loss per pixel since the line before.
        lr: Learning rate of the last step.
        ema_beta: β of the EMA weights at the last step.
        images_per_second: Since the line before.
        seconds: Wall time since the run was started or resumed.
    """

    images: int
    epochs: float
    steps: int
    loss: float
    lr: float
    ema_beta: float
    images_per_second: float
    seconds: float


def append_stats(out: Path, stats: Stats) -> None:
    """Adds a line to those of the run in the folder `out`."""
    with (out / STATS).open("a") as stream:
        stream.write(json.dumps(asdict(stats)) + "\n")


def read_stats(out: Path) -> list[Stats]:
    """The lines of the run in the folder `out`; one that was cut off by a crash is left out."""
    lines = []
    path = out / STATS
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            stats = Stats(**json.loads(line))
            if all(isinstance(value, (int, float)) for value in vars(stats).values()):
                lines.append(stats)
    return lines


def truncate_stats(out: Path, images: int) -> None:
    """Removes lines of steps that will be done again, and a half-written last one."""
    path = out / STATS
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            if json.loads(line)["images"] <= images:
                kept.append(line + "\n")
    atomic_write(path, "".join(kept))
