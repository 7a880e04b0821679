"""What watches a run: callbacks of the loop, and two that come with it, TensorBoard and grids of sampled images."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from diffmem.atomic_io import atomic_file
from diffmem.models import Denoiser
from diffmem.plotting import grid
from diffmem.sampling import sample


@dataclass(frozen=True)
class Plan:
    """What a run will do and cost, measured on a few passes before it starts.

    Attributes:
        images: Of the complete run, images seen.
        steps: Of the complete run.
        images_left: What is left of it.
        size: N, images of the training set.
        epochs: Of the complete run.
        parameters: Of the network.
        device: "cpu" or "cuda".
        ranks: Processes.
        batch_gpu: Images per forward pass of a process.
        seconds_per_step: Without compiling, the median of several passes.
        seconds: All that is left, without compiling.
        seconds_range: From low to high, as far as the passes differed.
        compiled: Whether it will run through torch.compile.
        resident: Whether the training set lies on the device.
        resumed_at: Images seen before; 0 for a new run.
        snapshot_images: The interval of snapshots; None for one at the end.
        graphed: Whether its passes are replayed as a CUDA graph.
        precision: Of the network's products.
    """

    images: int
    steps: int
    images_left: int
    size: int
    epochs: float
    parameters: int
    device: str
    ranks: int
    batch_gpu: int
    seconds_per_step: float
    seconds: float
    seconds_range: tuple[float, float]
    compiled: bool
    resident: bool
    resumed_at: int = 0
    snapshot_images: int | None = None
    graphed: bool = False
    precision: str = "ieee"


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
    denoiser: Denoiser


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

    def __init__(self, out: str | Path, count: int = 16):
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

    def __init__(self, out: str | Path):
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
