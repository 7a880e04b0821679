"""Where a monitor's figures and pictures go: TensorBoard, Weights & Biases, MLflow, the loggers of Lightning, the
trackers of accelerate, transformers' Trainer, or a folder with a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from diffmem.atomic_io import atomic_file, check_output_folder
from diffmem.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from diffmem.integrations.monitor import MonitorResult

TABLE, PICTURE = "memorization.csv", "memorization/copies"
COLUMNS = (
    "step", "epoch", "count", "total", "ratio", "low", "high", "median", "stop", "sampling_seconds", "judging_seconds"
)  # fmt: skip


@runtime_checkable
class Logger(Protocol):
    """What a monitor tells each look: a class of one's own with this method will do."""

    def log(self, result: MonitorResult) -> None:
        """Takes what a look found.

        Args:
            result: Result of the look.
        """


class FolderLogger:
    """Writes a folder: `memorization.csv`, a line per look, and a picture of each, `step-….png`.

    A run that resumes adds its lines to those that are there.

    Args:
        folder: Made where it does not exist.

    Raises:
        InputError: It cannot be written to.
    """

    def __init__(self, folder: str | Path):
        self.folder = check_output_folder(Path(folder))
        self.name = f"the folder {folder}"

    def log(self, result: MonitorResult) -> None:
        """Adds a look.

        Args:
            result: What it found.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / TABLE
        values = result.to_dict()
        values["low"], values["high"] = values.pop("interval")
        with open(path, "a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(COLUMNS)
            writer.writerow([int(values[name]) if name == "stop" else values[name] for name in COLUMNS])
        save_picture(self.folder / f"step-{result.step:09d}.png", result.picture())


def save_picture(path: Path, picture: np.ndarray | None) -> None:
    """Writes a picture as PNG, where there is one."""
    from PIL import Image

    if picture is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, durable=False) as partial:
            Image.fromarray(picture).save(partial, "PNG")


def as_logger(target: Any) -> Logger:
    """A logger for what there is.

    Args:
        target: A folder's path; a `SummaryWriter`; a run of Weights & Biases; the module `mlflow` (its active run); a
            logger of Lightning; an `accelerate.Accelerator`; a `transformers.Trainer`; a function of a
            `MonitorResult`; or a `Logger`, which is returned.

    Raises:
        InputError: It is none of these.

    Example:
        >>> as_logger(print).log("a look")
        a look
    """
    if isinstance(target, (str, os.PathLike)):
        return FolderLogger(Path(target))
    for fits, wrapper in _KINDS:
        if fits(target):
            return wrapper(target)
    if isinstance(target, Logger):
        return target
    if callable(target):
        return _Function(target)
    raise InputError(
        f"loggers: a {type(target).__name__} is not a logger: give a folder, a SummaryWriter, a run of wandb, the "
        "module mlflow, a logger of Lightning, an Accelerator, a Trainer, or a function"
    )


class _Wrapped:
    """Around what does the logging."""

    kind = ""

    def __init__(self, target: Any):
        self.target = target
        self.name = self.kind or type(target).__name__

    def log(self, result: MonitorResult) -> None:
        self.figures(result.scalars(), result.step)
        picture = result.picture()
        if picture is not None:
            self.picture(picture, result.step)

    def figures(self, values: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def picture(self, picture: np.ndarray, step: int) -> None:
        """Most have a place for pictures."""


class _Function(_Wrapped):
    def log(self, result: MonitorResult) -> None:
        self.target(result)


class _TensorBoard(_Wrapped):
    kind = "TensorBoard"

    def figures(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.target.add_scalar(name, value, step)
        self.target.flush()

    def picture(self, picture: np.ndarray, step: int) -> None:
        self.target.add_image(PICTURE, picture, step, dataformats="HWC")


class _Wandb(_Wrapped):
    kind = "Weights & Biases"

    def figures(self, values: dict[str, float], step: int) -> None:
        # Not as W&B's own step, which only grows, with every line that anybody logs.
        self.target.log({**values, "memorization/step": step})

    def picture(self, picture: np.ndarray, step: int) -> None:
        import wandb

        self.target.log({PICTURE: wandb.Image(picture), "memorization/step": step})


class _MLflow(_Wrapped):
    kind = "MLflow"

    def figures(self, values: dict[str, float], step: int) -> None:
        self.target.log_metrics(values, step=step)

    def picture(self, picture: np.ndarray, step: int) -> None:
        self.target.log_image(picture, artifact_file=f"memorization/step-{step:09d}.png")


class _MLflowClient(_Wrapped):
    """A client and the run that it writes to."""

    kind = "MLflow"

    def __init__(self, client: Any, run: str):
        super().__init__(client)
        self.run = run

    def picture(self, picture: np.ndarray, step: int) -> None:
        self.target.log_image(self.run, picture, artifact_file=f"memorization/step-{step:09d}.png")


class _Lightning(_Wrapped):
    def figures(self, values: dict[str, float], step: int) -> None:
        self.target.log_metrics(values, step=step)

    def picture(self, picture: np.ndarray, step: int) -> None:
        experiment = getattr(self.target, "experiment", None)
        if _is_tensorboard(experiment):
            _TensorBoard(experiment).picture(picture, step)
        elif _is_wandb(experiment):
            _Wandb(experiment).picture(picture, step)
        elif hasattr(experiment, "log_image") and hasattr(self.target, "run_id"):
            _MLflowClient(experiment, self.target.run_id).picture(picture, step)
        elif folder := getattr(self.target, "log_dir", None):
            save_picture(Path(folder) / "memorization" / f"step-{step:09d}.png", picture)


class _Accelerate(_Wrapped):
    kind = "accelerate"

    def figures(self, values: dict[str, float], step: int) -> None:
        self.target.log(values, step=step)

    def picture(self, picture: np.ndarray, step: int) -> None:
        for tracker in self.target.trackers:
            inner = getattr(tracker, "tracker", None)
            if _is_tensorboard(inner):
                _TensorBoard(inner).picture(picture, step)
            elif _is_wandb(inner):
                _Wandb(inner).picture(picture, step)


class _Trainer(_Wrapped):
    """transformers' Trainer passes figures on to all that it reports to."""

    kind = "transformers.Trainer"

    def figures(self, values: dict[str, float], step: int) -> None:
        self.target.log(dict(values))


def _is_tensorboard(target: Any) -> bool:
    return hasattr(target, "add_scalar") and hasattr(target, "add_image")


def _is_wandb(target: Any) -> bool:
    return type(target).__module__.split(".")[0] == "wandb" and hasattr(target, "log")


_KINDS: list[tuple[Callable[[Any], bool], Callable[[Any], Logger]]] = [
    (_is_tensorboard, _TensorBoard),
    (_is_wandb, _Wandb),
    (lambda target: getattr(target, "__name__", "") == "mlflow" and hasattr(target, "log_metrics"), _MLflow),
    (lambda target: hasattr(target, "log_metrics") and hasattr(target, "log_hyperparams"), _Lightning),
    (lambda target: hasattr(target, "trackers") and hasattr(target, "unwrap_model"), _Accelerate),
    (lambda target: hasattr(target, "callback_handler") and hasattr(target, "log"), _Trainer),
]
