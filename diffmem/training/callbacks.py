"""What watches a run: callbacks of the loop, and two that come with it, TensorBoard and grids of sampled images."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from diffmem.atomic_io import atomic_file
from diffmem.models import Denoiser, WrappedDenoiser
from diffmem.plotting import grid
from diffmem.sampling import sample
from diffmem.training.planning import Plan
from diffmem.training.run_folder.stats import Stats


@dataclass(frozen=True)
class Snapshot:
    """A snapshot just written.

    Attributes:
        folder: The checkpoint.
        images: Images seen.
        epochs: Epochs.
        loss: Mean loss per pixel since the snapshot before.
        denoiser: The denoiser with the EMA weights, in evaluation mode, not to be changed.
    """

    folder: Path
    images: int
    epochs: float
    loss: float
    denoiser: Denoiser | WrappedDenoiser


@dataclass(frozen=True)
class StopDecision:
    """What a callback says of a snapshot.

    Attributes:
        score: Higher is better; the best snapshot is kept by it.
        stop: Whether to end the run.
        reason: Why, in words.
    """

    score: float | None = None
    stop: bool = False
    reason: str = ""


class Callback:
    """Callbacks of a run, all of them optional, called on the first process only and in this order.

    They may draw from torch's random generators: no draw of the run depends on them.
    """

    def on_start(self, plan: Plan) -> None:
        """Before the first step."""

    def on_log(self, stats: Stats) -> None:
        """After every line of `stats.jsonl`."""

    def on_snapshot(self, snapshot: Snapshot) -> StopDecision | None:
        """After every snapshot was written; the run waits."""

    def on_end(self) -> None:
        """After the last step, whatever ended the run."""


class Grids(Callback):
    """Writes `grids/<images>.png` in the run's folder: the images of fixed seeds at every snapshot.

    Args:
        out: The run's folder.
        count: Images in the grid, those of the first seeds.
    """

    def __init__(self, out: str | Path, count: int = 16) -> None:
        self.out, self.seeds = Path(out) / "grids", range(count)

    def on_snapshot(self, snapshot: Snapshot) -> None:
        images = sample(snapshot.denoiser, self.seeds, batch=len(self.seeds), compile=False).images.numpy()
        self.out.mkdir(exist_ok=True)
        with atomic_file(self.out / f"{snapshot.images:09d}.png", durable=False) as partial:
            grid(images).save(partial, "PNG")


class TensorBoard(Callback):
    """Writes scalars to `tensorboard/` in the run's folder. Needs the extra `tensorboard`; see `available`.

    Args:
        out: The run's folder.
    """

    def __init__(self, out: str | Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(Path(out) / "tensorboard"))

    @staticmethod
    def available() -> bool:
        """Whether the package is installed."""
        return importlib.util.find_spec("tensorboard") is not None

    def on_log(self, stats: Stats) -> None:
        for name, value in asdict(stats).items():
            self.writer.add_scalar(name, value, stats.images)

    def on_end(self) -> None:
        self.writer.close()


def combined(decisions: Sequence[StopDecision | None]) -> StopDecision:
    """One decision of several: the last score, a stop where any asks for one."""
    given = [decision for decision in decisions if decision is not None]
    scores = [decision.score for decision in given if decision.score is not None]
    reasons = [decision.reason for decision in given if decision.stop]
    return StopDecision(scores[-1] if scores else None, bool(reasons), "; ".join(filter(None, reasons)))
