"""A monitor for trainings with diffusers: any pipeline is sampled as it learns, and judged."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn

from diffmem.data import load_images
from diffmem.errors import InputError
from diffmem.integrations.isolation import ema_weights, evaluating_all
from diffmem.integrations.monitor import MemorizationMonitor as _MemorizationMonitor

if TYPE_CHECKING:
    from diffmem.data import ImageSource
    from diffmem.memorization import CopyDetector, CopyRate, SequentialTest

__all__ = ["MemorizationMonitor", "pipeline_images"]

BATCH = 16
_NETWORKS = ("unet", "transformer", "prior")


class MemorizationMonitor(_MemorizationMonitor):
    """Samples a pipeline every so often as it is trained, and says how many of its images are copies.

    For `train_unconditional`, text-to-image and LoRA loops: three lines, one before the loop and two at the end of an
    epoch (`on_epoch_end`, and a `break` where `should_stop`). Each image has a generator of its own, seeded with its
    number, so that images do not depend on the batch size or on how many processes there are. Networks are sampled in
    evaluation mode, schedulers are copied, and everything is left as it was.

    Args:
        pipeline: A pipeline, or a function without arguments that makes one from the networks as they are, called at
            each look: `lambda: DDPMPipeline(unet=accelerator.unwrap_model(unet), scheduler=noise_scheduler)`.
        training: The training images, of the size that the pipeline makes: anything that `diffmem.load_images` reads
            (such as `load_images(folder, resize=64, center_crop=True)`), or a `diffmem.CopyDetector`.
        prompts: For pipelines that take one: image number i gets prompt i, around and around.
        batch: Images at a time.
        ema: The EMA weights to sample with, such as `diffusers.training_utils.EMAModel`.
        ema_part: The pipeline's network that these are of; None: "unet" or "transformer".
        call: Further arguments of the pipeline's call, such as num_inference_steps or guidance_scale. A list of
            class_labels goes around as prompts do.
        samples: As for `diffmem.integrations.MemorizationMonitor`, and so are all others.
        every: Likewise.
        stop: Likewise.
        loggers: Likewise.
        accelerator: Likewise: its trackers are told, and its checkpoints hold the monitor.
        value_range: Likewise.
        detector: Likewise.

    Raises:
        InputError: Before training begins, for all that concerns the training set.

    Example:
        >>> monitor = MemorizationMonitor(make_pipeline, "train.zip", accelerator=accelerator)  # doctest: +SKIP
        >>> monitor.on_epoch_end(epoch, global_step)  # doctest: +SKIP
        >>> if monitor.should_stop:  # doctest: +SKIP
        ...     break
    """

    def __init__(
        self,
        pipeline: Any | Callable[[], Any],
        training: ImageSource | CopyDetector,
        *,
        prompts: Sequence[str] | None = None,
        batch: int = BATCH,
        ema: Any = None,
        ema_part: str | None = None,
        call: Mapping[str, Any] | None = None,
        samples: int = 64,
        every: int = 1,
        stop: float | SequentialTest | Callable[[CopyRate], bool] | None = None,
        loggers: Any = (),
        accelerator: Any = None,
        value_range: tuple[float, float] | None = None,
        detector: Mapping[str, Any] | None = None,
    ):
        if not callable(pipeline):
            raise InputError(
                f"pipeline is a {type(pipeline).__name__}, but must be a pipeline or a function that makes one"
            )
        self.pipeline, self.prompts, self.batch = pipeline, prompts, batch
        self.pipeline_ema, self.ema_part, self.call = ema, ema_part, dict(call or {})
        super().__init__(
            self._images, training, samples=samples, every=every, stop=stop, loggers=loggers, accelerator=accelerator,
            value_range=value_range, detector=detector,
        )  # fmt: skip

    def _images(self, seeds: Sequence[int]) -> np.ndarray:
        makes = inspect.isroutine(self.pipeline) or isinstance(self.pipeline, functools.partial)
        made = self.pipeline() if makes else self.pipeline
        with _ema_in(made, self.pipeline_ema, self.ema_part):
            return pipeline_images(made, seeds, prompts=self.prompts, batch=self.batch, **self.call)


def pipeline_images(
    pipeline: Any,
    seeds: Sequence[int],
    *,
    prompts: Sequence[str] | None = None,
    batch: int = BATCH,
    **call: Any,
) -> np.ndarray:
    """The images that a pipeline of diffusers makes, one generator per seed; for `diffmem.audit`.

    Args:
        pipeline: Any `DiffusionPipeline`. Its networks are sampled in evaluation mode, and it is left as it was.
        seeds: Whole numbers.
        prompts: For pipelines that take one: image number i gets prompt i, around and around.
        batch: Images at a time.
        **call: Further arguments of the pipeline's call. A list of class_labels goes around as prompts do.

    Returns:
        uint8 or float32 [n, C, H, W].

    Raises:
        InputError: The pipeline wants prompts, or takes none, or makes no images.
    """
    seeds = [int(seed) for seed in seeds]
    known = inspect.signature(type(pipeline).__call__).parameters
    if prompts is not None and (isinstance(prompts, str) or not len(prompts)):
        raise InputError("prompts must be a list of at least one prompt")
    if prompts is not None and "prompt" not in known:
        raise InputError(f"prompts: {type(pipeline).__name__} takes no prompts: remove them")
    if prompts is None and "prompt" in known and not {"prompt", "prompt_embeds"} & set(call):
        raise InputError(f"prompts: {type(pipeline).__name__} needs prompts, such as prompts=['a photo of a dog']")
    networks = [part for part in getattr(pipeline, "components", {}).values() if isinstance(part, nn.Module)]
    # numpy has no bfloat16, and pipelines convert to it as they compute.
    brief = any(weight.dtype == torch.bfloat16 for network in networks for weight in network.parameters())
    output_type, parts = "pt" if brief else "np", []
    with _undisturbed(pipeline):
        for start in range(0, len(seeds), batch):
            chosen = seeds[start : start + batch]
            arguments = dict(call)
            if "output_type" in known:
                arguments.setdefault("output_type", output_type)
            if "generator" in known:
                arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in chosen]
            else:  # the caller keeps the state of torch's own generator
                torch.manual_seed(chosen[0])
            if prompts is not None:
                arguments["prompt"] = [prompts[seed % len(prompts)] for seed in chosen]
            elif "batch_size" in known:
                arguments["batch_size"] = len(chosen)
            if isinstance(classes := call.get("class_labels"), (list, tuple, range)):
                arguments["class_labels"] = [classes[seed % len(classes)] for seed in chosen]
            with torch.no_grad():
                made = pipeline(**arguments)
            parts.append(_as_array(made, len(chosen), type(pipeline).__name__))
    if len({(part.shape[1:], part.dtype) for part in parts}) > 1:
        raise InputError(f"{type(pipeline).__name__} makes images of several sizes: give the height and width in call")
    return np.concatenate(parts)


def _as_array(made: Any, count: int, name: str) -> np.ndarray:
    """What a pipeline returned, as images [n, C, H, W]."""
    made = getattr(made, "images", made[0] if isinstance(made, tuple) else made)
    if made is None or not hasattr(made, "__len__") or not len(made):
        raise InputError(f"{name} made no images")
    images = load_images(made).images
    if images.shape[1] not in (1, 3) and images.dtype != np.uint8:
        raise InputError(
            f"{name} made {images.shape[1]} channels of floats, which look like latents: remove output_type, or decode "
            "them"
        )
    if len(images) != count:
        raise InputError(f"{name} made {len(images)} images instead of {count}")
    return images


@contextlib.contextmanager
def _undisturbed(pipeline: Any) -> Iterator[None]:
    """Networks in evaluation mode, copies in place of schedulers, no progress bar; all as it was afterwards."""
    parts = dict(getattr(pipeline, "components", {}))
    schedulers = {name: part for name, part in parts.items() if hasattr(part, "set_timesteps")}
    bars = getattr(pipeline, "_progress_bar_config", None)
    for name, scheduler in schedulers.items():
        setattr(pipeline, name, copy.deepcopy(scheduler))
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(disable=True)
    try:
        with evaluating_all(parts.values()):
            yield
    finally:
        for name, scheduler in schedulers.items():
            setattr(pipeline, name, scheduler)
        if bars is not None:
            pipeline._progress_bar_config = bars
        elif hasattr(pipeline, "_progress_bar_config"):
            del pipeline._progress_bar_config


@contextlib.contextmanager
def _ema_in(pipeline: Any, ema: Any, name: str | None) -> Iterator[None]:
    """The EMA weights in the place of a pipeline's network."""
    if ema is None:
        yield
        return
    parts = getattr(pipeline, "components", {})
    if name is None:
        name = next((each for each in _NETWORKS if isinstance(parts.get(each), nn.Module)), None)
    network = parts.get(name)
    if name is None or not isinstance(network, nn.Module):
        raise InputError(f"ema_part: the pipeline has no network {name or ' or '.join(_NETWORKS)}")
    with ema_weights(ema, network) as averaged:
        if averaged is not network:
            setattr(pipeline, name, averaged)
        try:
            yield
        finally:
            if averaged is not network:
                setattr(pipeline, name, network)
