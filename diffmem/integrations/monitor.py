"""`MemorizationMonitor`: looks at a model as it trains, in any loop; those of the frameworks are made of it."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffmem.data import ImageSet, load_images
from diffmem.errors import InputError
from diffmem.integrations.images import gray_levels
from diffmem.integrations.isolation import (
    ema_weights,
    evaluating_all,
    gathered,
    random_states_kept,
    ranks,
    seeds_of_rank,
    shared,
)
from diffmem.integrations.loggers import as_logger
from diffmem.memorization import Audit, CopyDetector, CopyRate, ReportsRate, SequentialTest, is_index
from diffmem.models import as_denoiser
from diffmem.plotting import grid
from diffmem.sampling import SamplerConfig, sample_batches

if TYPE_CHECKING:
    from diffmem.data import ImageSource

PICTURE_ROWS = 8  # images in a picture, the most certain copies first
STOP_CONFIDENCE = 0.95
RED, GRAY, WHITE = (208, 32, 32), (160, 160, 160), (255, 255, 255)  # frames: copies, other images, training images


@dataclass(frozen=True, eq=False)
class MonitorResult(ReportsRate):
    """What a look at a model found.

    Attributes:
        step: Step of training, as the loop counts.
        epoch: Likewise, or None.
        copies: How many of the images sampled are copies; `rate`, `ratio`, `interval`, … tell it too.
        median: Median of the images' scores: of d1/d2 by the default rule, lower = more like a copy.
        stop: Whether training is to end.
        sampling_seconds: What sampling took.
        judging_seconds: What searching and deciding took.
        audit: The audit of the images; None on ranks other than the first, and in what is left of earlier looks.
    """

    step: int
    epoch: float | None
    copies: CopyRate
    median: float
    stop: bool = False
    sampling_seconds: float = 0.0
    judging_seconds: float = 0.0
    audit: Audit | None = None

    @property
    def rate(self) -> CopyRate:
        return self.copies

    def scalars(self, prefix: str = "memorization/") -> dict[str, float]:
        """The figures that loggers are told, by name.

        Args:
            prefix: Prefix of the names.
        """
        low, high = self.interval
        values = {"R_mem": self.ratio, "R_mem_low": low, "R_mem_high": high, "median_score": self.median}
        return {f"{prefix}{name}": float(value) for name, value in values.items()}

    def picture(self) -> np.ndarray | None:
        """The images most like copies, each beside its nearest and second nearest training image; copies have a
        red frame.

        Returns:
            uint8 [H, W, 3], or None where there are no pictures.
        """
        audit = self.audit
        if audit is None:
            return None
        training, generated = audit.training, audit.generated
        originals = getattr(training, "originals", None)  # of an index of features, read from its sources
        if not isinstance(generated, ImageSet) or (originals is None and not isinstance(training, ImageSet)):
            return None
        order = np.argsort(audit.scores, kind="stable")[:PICTURE_ROWS]
        indices = audit.neighbors.indices[order][:, :2]
        if originals is None:
            assert isinstance(training, ImageSet)
            images = {index: training.images[index] for index in indices.ravel().tolist()}
        else:
            images = originals.read(indices.ravel())
            blank = np.full_like(generated.images[0], 255)
            images |= {index: blank for index in indices.ravel().tolist() if index not in images}
        rows = []
        for row, nearest in zip(order, indices.tolist(), strict=True):
            near = [_framed(images[index], WHITE) for index in nearest]
            rows.append([_framed(generated.images[row], RED if audit.memorized[row] else GRAY), *near])
        same = len({image.shape for row in rows for image in row}) == 1  # features compare images of any size
        shown = [image for row in rows for image in (row if same else row[:1])]
        return np.asarray(grid(np.stack(shown), columns=len(shown) // len(rows)).convert("RGB"))

    def to_dict(self) -> dict[str, Any]:
        """The figures in plain JSON types."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            **self.rate.to_dict(),
            "median": self.median,
            "stop": self.stop,
            "sampling_seconds": self.sampling_seconds,
            "judging_seconds": self.judging_seconds,
        }

    def _repr_html_(self) -> str:
        """What notebooks show: the verdict and the most certain copies."""
        return f"<p>{self}</p>" if self.audit is None else self.audit._repr_html_()

    def __str__(self) -> str:
        return f"step {self.step}: R_mem {self.rate}"


class MemorizationMonitor:
    """Samples a few images of a model every so often as it trains, and says how many are copies of training images.

    The same seeds each time, so that pictures can be compared. Training is left alone: random states, the modules'
    modes and weights are what they were. The training set's index is built once. Under a process group every rank
    makes each call and samples its share; the first one holds the training set and judges; all learn whether to stop.
    What goes wrong in a look is said in one warning, and training goes on; so is what speaks against its verdict, such
    as images that are all black.

    Args:
        sample: What makes images: a function of a list of seeds that returns that many; or a denoiser (see
            `diffmem.models.as_denoiser`), which `sampler` samples.
        training: The training images: anything that `diffmem.load_images` reads, or a `diffmem.CopyDetector`.
        samples: Images per look.
        every: Look at the end of every so many epochs; see `on_epoch_end`.
        stop: Ends training once R_mem is shown to be at least this share (0.5, or a `SequentialTest` with a confidence
            of its own): the probability that any look ends it wrongly is at most 5 %. Or a function of a look's
            `CopyRate`. `should_stop` and the looks say so; the loop has to end.
        loggers: Where figures and pictures go: one or several of what `diffmem.integrations.as_logger` takes.
        accelerator: An `accelerate.Accelerator`: its trackers are told too, and its checkpoints hold the monitor.
        sampler: How a denoiser is sampled.
        ema: The EMA weights to sample with, of a denoiser: see `diffmem.integrations.isolation.ema_weights`.
        value_range: The values of black and white of floats. None: by the values, (0, 1), (-1, 1) or (0, 255).
        detector: Options of `diffmem.CopyDetector`, such as features, rule or holdout.

    Raises:
        InputError: On all ranks, before training begins, for all that concerns the training set.

    Example:
        >>> digits = load_images("builtin:digits", limit=100)
        >>> def sample(seeds):  # a model that copies
        ...     return digits.images[seeds]
        >>> monitor = MemorizationMonitor(sample, digits, samples=16, stop=0.5)
        >>> for epoch in range(3):
        ...     result = monitor.on_epoch_end(epoch, step=100 * epoch)
        ...     if monitor.should_stop:
        ...         break
        >>> print(result)
        step 0: R_mem 16 of 16: 100 % (95 % interval 80.6 % to 100 %)
    """

    def __init__(
        self,
        sample: Callable[[Sequence[int]], Any] | torch.nn.Module,
        training: ImageSource | CopyDetector,
        *,
        samples: int = 64,
        every: int = 1,
        stop: float | SequentialTest | Callable[[CopyRate], bool] | None = None,
        loggers: Any = (),
        accelerator: Any = None,
        sampler: SamplerConfig = SamplerConfig(),  # noqa: B008 (frozen)
        ema: Any = None,
        value_range: tuple[float, float] | None = None,
        detector: Mapping[str, Any] | None = None,
    ):
        for name, value in (("samples", samples), ("every", every)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} is {value!r}, but must be a whole number from 1")
        if ema is not None and not isinstance(sample, torch.nn.Module):
            raise InputError("ema is for denoisers: a sampling function must use the EMA weights itself")
        self.sample, self.samples, self.every = sample, samples, every
        self.stop = SequentialTest(stop, STOP_CONFIDENCE) if isinstance(stop, (int, float)) else stop
        self.sampler, self.ema, self.value_range = sampler, ema, value_range
        self.accelerator = accelerator
        targets = list(loggers) if isinstance(loggers, (list, tuple)) else [loggers]
        self.loggers = [as_logger(target) for target in [*targets, *([] if accelerator is None else [accelerator])]]
        self._further: list[Any] = []
        self.results: list[MonitorResult] = []
        self.looks = 0
        self.should_stop = False
        self._said: set[str] = set()
        self._told: tuple[Any, dict[str, Any]] | None = (training, dict(detector or {}))
        self._detector: CopyDetector | None = None
        self.prepare()
        if accelerator is not None:
            accelerator.register_for_checkpointing(self)

    def prepare(self) -> None:
        """Reads and indexes the training set on the first rank, once; a failure is every rank's."""
        failure = None
        if self._told is not None and ranks()[0] == 0:
            training, options = self._told
            try:
                self._detector = _detector_of(training, options)
            except Exception as error:
                if ranks()[1] == 1:
                    raise
                failure = _in_one_line(error)
        self._told = None
        if (failure := shared(failure)) is not None:
            raise InputError(failure)

    def also_log_to(self, loggers: Sequence[Any]) -> None:
        """Tells these loggers too, in place of those that were named here before.

        Args:
            loggers: As for `diffmem.integrations.as_logger`.
        """
        self._further = [as_logger(each) for each in loggers]

    @property
    def latest(self) -> MonitorResult | None:
        """The last look."""
        return self.results[-1] if self.results else None

    def on_epoch_end(self, epoch: int, step: int | None = None) -> MonitorResult | None:
        """Looks where `every` epochs are over.

        Args:
            epoch: From 0.
            step: Step of the optimizer, for loggers; None: `epoch`.

        Returns:
            What was found; None where no look was due, or where it failed.
        """
        if (epoch + 1) % self.every:
            return None
        return self.look(epoch if step is None else step, epoch)

    def look(self, step: int, epoch: float | None = None) -> MonitorResult | None:
        """Looks now.

        Args:
            step: Step of training, as the loop counts; loggers are told.
            epoch: Likewise.

        Returns:
            What was found, or None where the look failed, which a warning says.
        """
        with random_states_kept(), torch.no_grad():
            return self._look(step, epoch)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the run holds of the monitor: the figures of all looks."""
        return {
            "looks": self.looks,
            "should_stop": self.should_stop,
            "results": [result.to_dict() for result in self.results],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`.

        Args:
            state: What it returned.
        """
        self.looks, self.should_stop = int(state["looks"]), bool(state["should_stop"])
        self.results = [
            MonitorResult(
                each["step"], each["epoch"], CopyRate(each["count"], each["total"]), each["median"], each["stop"],
                each["sampling_seconds"], each["judging_seconds"],
            )
            for each in state["results"]
        ]  # fmt: skip

    def _look(self, step: int, epoch: float | None) -> MonitorResult | None:
        rank, size = ranks()
        self.looks += 1
        began = time.perf_counter()
        made, failure = None, None
        try:
            made = self._sampled(list(seeds_of_rank(self.samples, rank, size)))
        except Exception as error:  # whatever a model, a pipeline or a device raises: training goes on
            failure = f"sampling failed: {_in_one_line(error)}"
        everybody = gathered((made, failure))
        result = None
        if everybody is not None:
            seconds = time.perf_counter() - began
            try:
                if failures := [each for _, each in everybody if each is not None]:
                    raise InputError(failures[0])
                result = self._judged([images for images, _ in everybody], step, epoch, seconds)
            except Exception as error:
                self._warn(f"the audit at step {step} failed; training continues: {_in_one_line(error)}")
            if result is not None:
                for warning in result.audit.warnings if result.audit is not None else ():
                    kind = "".join(each for each in warning if not each.isdigit())
                    self._warn(f"of the look at step {step}: {warning}", key=kind[:40])
                self._log(result)
        told = shared(None if result is None else replace(result, audit=None))
        if told is None:
            return None
        if self.results:  # the pictures of one look only are kept
            self.results[-1] = replace(self.results[-1], audit=None)
        self.results.append(result or told)
        self.should_stop |= told.stop
        return self.results[-1]

    def _sampled(self, seeds: list[int]) -> Any:
        """The images of seeds, as an array [n, C, H, W] of gray levels or floats."""
        if isinstance(self.sample, torch.nn.Module):
            with ema_weights(self.ema, self.sample) as module, evaluating_all([module]):
                batches = list(sample_batches(as_denoiser(module), seeds, self.sampler))
            return np.concatenate([batch.images.numpy() for batch in batches])
        made = self.sample(seeds)
        made = getattr(made, "images", made)
        if made is None or (hasattr(made, "__len__") and not len(made)):
            raise InputError(f"sample made no images for {len(seeds)} seeds")
        images = load_images(made).images
        if len(images) != len(seeds):
            raise InputError(f"sample made {len(images)} images for {len(seeds)} seeds")
        return images

    def _judged(self, parts: list[np.ndarray], step: int, epoch: float | None, seconds: float) -> MonitorResult:
        shapes = {part.shape[1:] for part in parts}
        if len(shapes) > 1:
            raise InputError(f"the ranks made images of the sizes {', '.join(map(str, sorted(shapes)))}")
        images = gray_levels(np.concatenate(parts)[: self.samples], self.value_range, layout="NCHW")
        began = time.perf_counter()
        detector = self._detector
        assert detector is not None  # the first rank's
        detector.reset()
        try:
            with _detector_silent():
                detector.update(replace(images, source="sampled"))
                audit = detector.compute()
        finally:
            detector.reset()
        judging, stop = time.perf_counter() - began, self._answer(audit, images.images)
        return MonitorResult(step, epoch, audit.rate, float(np.median(audit.scores)), stop, seconds, judging, audit)

    def _answer(self, audit: Audit, images: np.ndarray) -> bool:
        if self.stop is None:
            return False
        if not isinstance(self.stop, SequentialTest):
            return bool(self.stop(audit.rate))
        # Images that are the same are one sample. The looks, of which nobody knows how many there will be, share the
        # error: Σ 1/(k(k + 1)) = 1.
        distinct = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)[1]
        error = (1 - self.stop.confidence) / (self.looks * (self.looks + 1))
        test = replace(self.stop, confidence=1 - error)
        return test.answer(int(audit.memorized[distinct].sum()), len(distinct)) is True

    def _log(self, result: MonitorResult) -> None:
        for logger in (*self.loggers, *self._further):
            try:
                logger.log(result)
            except Exception as error:
                name = getattr(logger, "name", type(logger).__name__)
                self._warn(f"{name} could not log the audit; training continues: {_in_one_line(error)}", key=name)

    def _warn(self, message: str, key: str | None = None) -> None:
        """A warning, once for each logger and each kind of failure."""
        key = key or message.partition("training continues: ")[2]
        if key not in self._said:
            self._said.add(key)
            warnings.warn(f"diffmem: {message}", UserWarning, stacklevel=5)


@contextmanager
def _detector_silent() -> Iterator[None]:
    """What the detector logs of each set is said by the monitor, once."""

    def nothing(record: logging.LogRecord) -> bool:
        return False

    logger = logging.getLogger("diffmem.memorization.detector")
    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)


def _framed(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """An image (C, H, W) in color, with a frame around it, and white around that."""
    colors = image[:3] if len(image) >= 3 else image[:1].repeat(3, axis=0)
    for shade in (color, WHITE):
        width = max(1, max(image.shape[1:]) // 32)
        framed = np.empty((3, colors.shape[1] + 2 * width, colors.shape[2] + 2 * width), np.uint8)
        framed[:] = np.array(shade, np.uint8)[:, None, None]
        framed[:, width:-width, width:-width] = colors
        colors = framed
    return colors


def _detector_of(training: Any, options: dict[str, Any]) -> CopyDetector:
    """The detector, which keeps the images of a look for its pictures."""
    if isinstance(training, CopyDetector):
        if options:
            raise InputError("training is a CopyDetector, which has its own options: remove detector")
        _check_for_images(training)
        own = object.__new__(type(training))  # with the same index, and images of its own
        own.__dict__.update(training.__dict__)
        own.keep_images = True
        own.reset()
        return own
    if is_index(training):
        options = {"exact": True, **options}
    else:
        training = gray_levels(training)
    if options.get("holdout") is not None:
        options["holdout"] = gray_levels(options["holdout"])
    detector = CopyDetector(training, keep_images=True, **options)
    _check_for_images(detector)
    return detector


def _check_for_images(detector: CopyDetector) -> None:
    if detector.compared.vectors_only:
        raise InputError(
            f"training: {detector.training.source} holds vectors that were computed elsewhere, which nothing here "
            "makes of sampled images: give the training images, or an index of pixels, hashes or a network's features"
        )


def _in_one_line(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return said if isinstance(error, InputError) and said else f"{type(error).__name__}: {said or 'no message'}"
