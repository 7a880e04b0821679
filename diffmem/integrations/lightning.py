"""A callback of Lightning that looks at a model as it trains, and can end the run once it copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch

from diffmem.errors import InputError, MissingExtraError
from diffmem.integrations.isolation import ema_weights, evaluating_all, find_ema, named_part
from diffmem.integrations.monitor import MemorizationMonitor, MonitorResult
from diffmem.models import as_denoiser
from diffmem.sampling import SamplerConfig, sample_batches

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:
    if error.name not in ("lightning", "lightning.pytorch"):
        raise
    try:
        import pytorch_lightning as pl
    except ModuleNotFoundError:
        raise MissingExtraError("lightning", "lightning", "diffmem.integrations.lightning") from None

if TYPE_CHECKING:
    from diffmem.data import ImageSource
    from diffmem.memorization import CopyDetector, CopyRate, SequentialTest

__all__ = ["MemorizationCallback"]


class MemorizationCallback(pl.Callback):
    """Samples the module every so many epochs or steps, and logs R_mem, its 95 % interval and pictures of the copies.

    The run is the same to the bit as without it: it draws from no generator of the run, and leaves modes and weights as
    they were. Figures go to all loggers of the trainer, and to `callback_metrics` ("memorization/R_mem"), where
    `ModelCheckpoint` and `EarlyStopping` find them. The state of the looks is part of the trainer's checkpoints.

    Args:
        training: The training images: anything that `diffmem.load_images` reads, or a `diffmem.CopyDetector`.
        every: Look at the end of every so many epochs, or after so many steps.
        unit: What `every` counts: "epoch" or "step" (of the optimizer).
        samples: Images per look, the same seeds each time.
        sampler: How to sample: a `SamplerConfig`, for modules that denoise; or a function of the module and a list of
            seeds that returns that many images. The module it is given is the one with the EMA weights.
        denoiser: What of the module denoises, where that is not the module itself: the name of an attribute
            ("network", "model.net"), or a function of the module; `diffmem.models.as_denoiser` says what it has to be
            like.
        ema: The EMA weights: "auto" takes those of Lightning's `WeightAveraging` callbacks, the module's
            `ema_scope()`, or what it has under a usual name ("ema", "ema_model", …); or the name of an attribute; None:
            the weights as trained. What stores and restores weights averages those of `denoiser`, where one is named,
            or of the part of the module that has the same parameters.
        stop: Ends the run once R_mem is shown to be at least this share; see `MemorizationMonitor`.
        loggers: Others than the trainer's; see `diffmem.integrations.as_logger`.
        value_range: The values of black and white of a function's floats; None: by the values.
        detector: Options of `diffmem.CopyDetector`.

    Raises:
        InputError: When training begins, for all that concerns the training set and the module's attributes.

    Example:
        >>> callback = MemorizationCallback("train.zip", every=5, denoiser="net", stop=0.5)  # doctest: +SKIP
        >>> Trainer(callbacks=[callback]).fit(module)  # doctest: +SKIP
        >>> callback.latest.audit.save("report")  # doctest: +SKIP
    """

    def __init__(
        self,
        training: ImageSource | CopyDetector,
        *,
        every: int = 1,
        unit: Literal["epoch", "step"] = "epoch",
        samples: int = 64,
        sampler: SamplerConfig | Callable[[Any, Sequence[int]], Any] = SamplerConfig(),  # noqa: B008 (frozen)
        denoiser: str | Callable[[Any], Any] | None = None,
        ema: str | None = "auto",
        stop: float | SequentialTest | Callable[[CopyRate], bool] | None = None,
        loggers: Any = (),
        value_range: tuple[float, float] | None = None,
        detector: Mapping[str, Any] | None = None,
    ):
        if unit not in ("epoch", "step"):
            raise InputError(f'unit is {unit!r}, but must be "epoch" or "step"')
        self.training, self.sampler, self.denoiser, self.ema, self.unit = training, sampler, denoiser, ema, unit
        self._options = {
            "samples": samples, "every": every, "stop": stop, "loggers": loggers, "value_range": value_range,
            "detector": detector,
        }  # fmt: skip
        self._monitor: MemorizationMonitor | None = None
        self._restored: dict[str, Any] | None = None
        self._module: Any = None
        self._averages: Any = None
        self._last_step = 0

    @property
    def results(self) -> list[MonitorResult]:
        """All looks."""
        return [] if self._monitor is None else self._monitor.results

    @property
    def latest(self) -> MonitorResult | None:
        """The last look; its `audit` has the images."""
        return None if self._monitor is None else self._monitor.latest

    @property
    def state_key(self) -> str:
        """Under which checkpoints hold the callback's state."""
        return self._generate_state_key(every=self._options["every"], unit=self.unit, samples=self._options["samples"])

    def state_dict(self) -> dict[str, Any]:
        """The figures of all looks."""
        return {} if self._monitor is None else self._monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a checkpoint."""
        self._restored = state_dict or None
        if self._monitor is not None and self._restored:
            self._monitor.load_state_dict(self._restored)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads and indexes the training set, once."""
        if self._monitor is None:
            self._monitor = MemorizationMonitor(self._sample, self.training, **self._options)
        if self._restored:
            self._monitor.load_state_dict(self._restored)
        self._restored = None  # a second fit goes on from the first
        if not callable(self.sampler):
            named_part(pl_module, self.denoiser, "denoiser")
        self._last_step = trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks where one is due."""
        if self.unit == "epoch" and (trainer.current_epoch + 1) % self._options["every"] == 0:
            self._look(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks where one is due; batches that are accumulated are one step."""
        step = trainer.global_step
        if self.unit == "step" and step != self._last_step and step % self._options["every"] == 0:
            self._look(trainer, pl_module)
        self._last_step = step

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        monitor = self._monitor
        if monitor is None:
            return
        monitor.also_log_to(trainer.loggers if trainer.is_global_zero else [])
        self._module, self._averages = pl_module, self._found_ema(trainer, pl_module)
        try:
            result = monitor.look(trainer.global_step, trainer.current_epoch)
        finally:
            self._module = self._averages = None
        if result is None:
            return
        for name, value in result.scalars().items():
            # The same on all ranks; the mean over them is for Lightning, which warns where ranks do not meet.
            by_epoch = self.unit == "epoch"
            pl_module.log(
                name, value, logger=False, on_step=not by_epoch, on_epoch=by_epoch, sync_dist=True, batch_size=1
            )
        if result.stop:
            trainer.should_stop = True

    def _found_ema(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        if self.ema is None:
            return None
        if self.ema != "auto":
            return named_part(pl_module, self.ema, "ema")
        for callback in trainer.callbacks:
            average = getattr(callback, "_average_model", None)
            if isinstance(average, torch.optim.swa_utils.AveragedModel):
                return average if average.n_averaged > 0 else None
        return find_ema(pl_module)

    @contextmanager
    def _sampled_module(self) -> Iterator[Any]:
        """The module to sample, or what of it denoises, with the EMA weights."""
        ema, module = self._averages, self._module
        part = None if self.denoiser is None else named_part(module, self.denoiser, "denoiser")
        function = callable(self.sampler)
        swaps = any(hasattr(ema, name) for name in ("copy_to", "average_parameters", "ema_scope"))
        if isinstance(ema, torch.nn.Module) and not swaps:
            inner = ema.module if isinstance(ema, torch.optim.swa_utils.AveragedModel) else ema
            whole = isinstance(inner, type(module))
            if function and not whole:
                raise InputError(
                    f"ema averages a {type(inner).__name__}, which a function of the module cannot use: use the EMA "
                    "weights inside the function, with ema=None"
                )
            yield named_part(inner, self.denoiser, "denoiser") if whole and not function else inner
            return
        with ema_weights(ema, module if part is None else part):
            yield module if function or part is None else part

    def _sample(self, seeds: Sequence[int]) -> Any:
        with self._sampled_module() as module:
            if callable(self.sampler):
                with evaluating_all([module]):
                    return self.sampler(module, list(seeds))
            with evaluating_all([module]):
                batches = list(sample_batches(as_denoiser(module), seeds, self.sampler))
            return torch.cat([batch.images for batch in batches])
