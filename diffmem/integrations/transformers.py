"""A callback of transformers' `Trainer` that looks at a model as it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from diffmem.errors import MissingExtraError
from diffmem.integrations.isolation import evaluating_all
from diffmem.integrations.monitor import MemorizationMonitor, MonitorResult
from diffmem.models import as_denoiser
from diffmem.sampling import SamplerConfig, sample_batches

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise MissingExtraError("transformers", "transformers", "diffmem.integrations.transformers") from None

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from diffmem.data import ImageSource
    from diffmem.memorization import CopyDetector, CopyRate, SequentialTest

__all__ = ["MemorizationCallback"]


class MemorizationCallback(TrainerCallback):
    """Samples the model at the end of every so many epochs, and logs R_mem, its 95 % interval and pictures.

    Args:
        training: The training images: anything that `diffmem.load_images` reads, or a `diffmem.CopyDetector`.
        sampler: A function of the model and a list of seeds that returns that many images; or a `SamplerConfig`, for
            models that denoise (see `diffmem.models.as_denoiser`).
        samples: As for `diffmem.integrations.MemorizationMonitor`, and so are all others.
        every: Likewise, in epochs.
        stop: Likewise: the trainer stops, on all ranks.
        loggers: Likewise; with the `Trainer` itself, `add_to` does that, figures go to all that it reports to.
        value_range: Likewise.
        detector: Likewise.

    Raises:
        InputError: When training begins, for all that concerns the training set.

    Example:
        >>> callback = MemorizationCallback("train.zip", sampler=lambda model, seeds: …)  # doctest: +SKIP
        >>> callback.add_to(trainer)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        training: ImageSource | CopyDetector,
        *,
        sampler: Callable[[Any, Sequence[int]], Any] | SamplerConfig = SamplerConfig(),  # noqa: B008 (frozen)
        samples: int = 64,
        every: int = 1,
        stop: float | SequentialTest | Callable[[CopyRate], bool] | None = None,
        loggers: Any = (),
        value_range: tuple[float, float] | None = None,
        detector: Mapping[str, Any] | None = None,
    ):
        self.training, self.sampler = training, sampler
        self._options = {
            "samples": samples, "every": every, "stop": stop, "loggers": loggers, "value_range": value_range,
            "detector": detector,
        }  # fmt: skip
        self._trainers: list[Any] = []
        self._model: Any = None
        self.monitor: MemorizationMonitor | None = None

    def add_to(self, trainer: Any) -> None:
        """Adds the callback to a trainer, which logs what it finds.

        Args:
            trainer: A `transformers.Trainer`.
        """
        trainer.add_callback(self)
        self._trainers.append(trainer)

    @property
    def results(self) -> list[MonitorResult]:
        """All looks."""
        return [] if self.monitor is None else self.monitor.results

    @property
    def latest(self) -> MonitorResult | None:
        """The last look; its `audit` has the images."""
        return None if self.monitor is None else self.monitor.latest

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reads and indexes the training set, once; a run that resumes goes on counting its looks."""
        if self.monitor is None:
            self.monitor = MemorizationMonitor(self._sample, self.training, **self._options)
        if state.global_step and not self.monitor.looks:
            self.monitor.looks = round(state.epoch or 0) // self._options["every"]
        self.monitor.also_log_to(self._trainers)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Looks where one is due."""
        monitor, self._model = self.monitor, model
        if monitor is None:  # added while the trainer ran
            return
        try:
            result = monitor.on_epoch_end(round(state.epoch) - 1, state.global_step)
        finally:
            self._model = None
        if result is not None and result.stop:
            control.should_training_stop = True

    def _sample(self, seeds: Sequence[int]) -> Any:
        with evaluating_all([self._model]):
            if callable(self.sampler):
                return self.sampler(self._model, list(seeds))
            batches = list(sample_batches(as_denoiser(self._model), seeds, self.sampler))
        return torch.cat([batch.images for batch in batches])
