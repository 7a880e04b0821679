"""Images of many seeds, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from diffmem.errors import InputError
from diffmem.models import as_denoiser, evaluating
from diffmem.precision import AUTOCAST, float32_products, warn_where_slow
from diffmem.progress import Progress, silent
from diffmem.sampling.config import SamplerConfig
from diffmem.sampling.seeds import SeededGenerators
from diffmem.sampling.step import Callback, Noise, is_compilable, is_compiled, run_plan
from diffmem.timing import CompileCost, Timing, compiling_pays, timing_of

# When compile="auto" compiles.
_COMPILING = {"cpu": CompileCost(120.0, 0.2, 500_000), "cuda": CompileCost(90.0, 0.4, 500_000)}


class Samples(NamedTuple):
    """images (N, C, H, W) uint8 on the CPU; seeds (N,) int64; labels (N,) int64 or (N, label_dim), or None."""

    images: torch.Tensor
    seeds: torch.Tensor
    labels: torch.Tensor | None


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Gray levels of images in [-1, 1]: x·127.5 + 128, clipped to 0 … 255, truncated."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)


@contextmanager
def in_precision(denoiser: Any, precision: str) -> Iterator[None]:
    """The network's products in this precision (see `diffmem.precision`) for as long as this lasts.

    Raises:
        InputError: Where half precision is asked of a denoiser that is not a network.
    """
    with float32_products(precision):
        if not hasattr(denoiser, "autocast_dtype"):
            if AUTOCAST[precision] is not None:
                raise InputError(f"precision is {precision!r}, but this denoiser is not a network")
            yield
            return
        parameter = next(denoiser.parameters(), None)
        warn_where_slow(precision, "none" if parameter is None else parameter.device.type)
        before, denoiser.autocast_dtype = denoiser.autocast_dtype, AUTOCAST[precision] or denoiser.autocast_dtype
        try:
            yield
        finally:
            denoiser.autocast_dtype = before


def sample_latents(
    denoiser: Any,
    latents: torch.Tensor,
    config: SamplerConfig | None = None,
    *,
    labels: torch.Tensor | None = None,
    noise: Noise | None = None,
    callback: Callback | None = None,
    compiled: bool = False,
    **fields: Any,
) -> torch.Tensor:
    """Images of given latents: `sample_heun`, `sample_unipc`, … over the schedule of a configuration.

    Args:
        denoiser: Called as `denoiser(x, sigma, labels)`; its range and rounding count where it has them.
        latents: (B, C, H, W), standard normal.
        config: How to sample; its class_index, classes, batch, precision and compile are not looked at.
        labels: As the denoiser takes them.
        noise: Draws the noise of churn, float64 (B, C, H, W), once per step. Default: torch's own generator.
        callback: Called after each step with a `StepInfo`.
        compiled: Run the step through torch.compile.
        **fields: Fields of `SamplerConfig`, in place of `config`.

    Returns:
        (B, C, H, W) float64 in [-1, 1].

    Raises:
        InputError: For steps or ranges that make no sense.
    """
    plan = _config(config, fields).plan(denoiser)
    x = latents.to(torch.float64) * plan.sigma
    return run_plan(plan, denoiser, x, labels=labels, noise=noise, callback=callback, compiled=compiled)


def sample_batches(
    denoiser: Any,
    seeds: Sequence[int],
    config: SamplerConfig | None = None,
    *,
    labels: torch.Tensor | int | None = None,
    sigmas: Sequence[float] | None = None,
    callback: Callback | None = None,
    progress: Progress = silent,
    **fields: Any,
) -> Iterator[Samples]:
    """Yields the images of `seeds`, in order, a batch at a time. The plan is built, and the step compiled, once.

    An image depends on its seed only: its generator, on the denoiser's device, draws the latent, then, where the
    denoiser has labels, a class index, then the noise of the steps.

    Args:
        denoiser: A denoiser of `diffmem.models` or `diffmem.optimum`, or a module that denoises (see
            `diffmem.models.as_denoiser`); it is sampled in evaluation mode.
        seeds: Whole numbers, taken modulo 2³².
        config: How to sample. compile "auto": after two batches have shown that the rest takes long enough to pay for
            it. Every batch that is compiled has the same size, the last one filled up.
        labels: One class for all images or one entry per seed, in place of `config.class_index`. It replaces the class
            index after it was drawn: the images of class K are those that the seeds give when they draw K themselves,
            with added noise too.
        sigmas: Noise levels in place of the configuration's, see `diffmem.sampling.sigmas`.
        callback: Called after each step of each batch with a `StepInfo`.
        progress: Told how many images are done.
        **fields: Fields of `SamplerConfig`, in place of `config`.

    Raises:
        InputError: For labels, classes or noise levels that do not fit, and for images that are not finite.
    """
    config = _config(config, fields)
    if isinstance(denoiser, torch.nn.Module) or not hasattr(denoiser, "label_dim"):
        denoiser = as_denoiser(denoiser)
    seeds = [int(seed) for seed in seeds]
    plan = config.plan(denoiser, sigmas)
    given = _checked_labels(denoiser, config.class_index if labels is None else labels, len(seeds))
    device = next(denoiser.parameters()).device
    shape = (denoiser.channels, denoiser.resolution, denoiser.resolution)
    batch = config.batch
    compiled = config.compile == "on" or (config.compile == "auto" and is_compiled(denoiser))
    progress("sampling", 0, len(seeds))
    seconds: list[float] = []
    for start in range(0, len(seeds), batch):
        began = time.perf_counter()
        chosen = seeds[start : start + batch]
        size = len(chosen)
        filled = chosen + chosen[-1:] * (batch - size if compiled else 0)
        generators = SeededGenerators(filled, device)
        latents = generators.randn(shape)
        batch_labels = None
        if denoiser.label_dim:
            # Drawn also where it is given, so that noise drawn later does not depend on where the class came from.
            dim = denoiser.label_dim
            among = config.classes
            batch_labels = generators.randint(dim) if among is None else generators.randint_among(dim, among)
            if given is not None:
                batch_labels = given[start : start + size]
                batch_labels = torch.cat([batch_labels, batch_labels[-1:].expand(len(filled) - size, *given.shape[1:])])
                batch_labels = batch_labels.to(device)

        def noise(generators: SeededGenerators = generators) -> torch.Tensor:
            return generators.randn(shape, torch.float64)

        with in_precision(denoiser, config.precision), evaluating(denoiser):
            images = run_plan(
                plan, denoiser, latents.to(torch.float64) * plan.sigma, labels=batch_labels, noise=noise,
                callback=callback, compiled=compiled,
            )  # fmt: skip
        _check_finite(images[:size], chosen)
        images = to_uint8(images[:size]).cpu()
        yield Samples(
            images, torch.tensor(chosen), None if batch_labels is None else batch_labels[:size].to("cpu", copy=True)
        )
        done = start + size
        progress("sampling", done, len(seeds))
        seconds.append(time.perf_counter() - began)
        if config.compile == "auto" and not compiled and len(seconds) == 2 and is_compilable(denoiser):
            # The first batch warms up; the lesser of the two is nearer to what the rest will take.
            compiled = worth_compiling(denoiser, timing_of([min(seconds)]), -(-(len(seeds) - done) // batch))


def worth_compiling(denoiser: Any, each: Timing, times: int) -> bool:
    """Whether compiling the step pays where something that takes `each` without is still to be done so many times."""
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    return compiling_pays(each, times, parameters, _COMPILING.get(next(denoiser.parameters()).device.type))


def sample(denoiser: Any, seeds: Sequence[int], config: SamplerConfig | None = None, **arguments: Any) -> Samples:
    """The images of `seeds`, in order, with their seeds and labels; arguments as for `sample_batches`.

    Example:
        >>> from diffmem.models import Denoiser, preset
        >>> from diffmem.sampling import sample
        >>> denoiser = Denoiser(preset("ddpmpp_8", channels=1, model_channels=16))
        >>> sample(denoiser, range(4), solver="unipc", steps=8).images.shape
        torch.Size([4, 1, 8, 8])
    """
    parts = list(sample_batches(denoiser, seeds, config, **arguments))
    if not parts:
        raise InputError("seeds: none given")
    labels = None if parts[0].labels is None else torch.cat([part.labels for part in parts if part.labels is not None])
    return Samples(torch.cat([part.images for part in parts]), torch.cat([part.seeds for part in parts]), labels)


def _config(config: SamplerConfig | None, fields: dict[str, Any]) -> SamplerConfig:
    if config is not None and fields:
        raise InputError(f"config: {', '.join(fields)} given in addition; use dataclasses.replace(config, …)")
    return SamplerConfig(**fields) if config is None else config


def _check_finite(images: torch.Tensor, seeds: Sequence[int]) -> None:
    bad = (~images.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise InputError(
            f"seed {seeds[bad[0]]}{f' and {len(bad) - 1} more' if bad[1:] else ''}: the image is not finite (NaN or "
            "infinity): the checkpoint is damaged, or needs float32 or other noise levels"
        )


def _checked_labels(denoiser: Any, labels: torch.Tensor | int | None, count: int) -> torch.Tensor | None:
    if labels is None:
        return None
    if not denoiser.label_dim:
        raise InputError("labels: this denoiser is unconditional; remove them")
    if isinstance(labels, int):
        labels = torch.full((count,), labels)
    labels = torch.as_tensor(labels)
    if len(labels) != count:
        raise InputError(f"labels: {len(labels)} for {count} seeds; give one class, or one entry per seed")
    if not labels.is_floating_point() and count and not 0 <= labels.min() <= labels.max() < denoiser.label_dim:
        raise InputError(f"labels: classes must lie in 0 … {denoiser.label_dim - 1}")
    return labels
