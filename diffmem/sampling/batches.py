"""Images of many seeds, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from diffmem.errors import InputError
from diffmem.models import as_denoiser, evaluating
from diffmem.precision import float32_products
from diffmem.progress import Progress, silent
from diffmem.sampling.seeds import SeededGenerators
from diffmem.sampling.solvers import dpmpp_sample, heun_sample, is_compilable, is_compiled, unipc_sample
from diffmem.timing import CompileCost, Timing, compiling_pays, timing_of

SAMPLERS = {"heun": heun_sample, "dpm++": dpmpp_sample, "unipc": unipc_sample}

# When compile="auto" compiles.
_COMPILING = {"cpu": CompileCost(120.0, 0.2, 500_000), "cuda": CompileCost(90.0, 0.4, 500_000)}


class Samples(NamedTuple):
    """images (N, C, H, W) uint8 on the CPU; seeds (N,) int64; labels (N,) int64 or (N, label_dim), or None."""

    images: torch.Tensor
    seeds: torch.Tensor
    labels: torch.Tensor | None


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Grey levels of images in [-1, 1]: x·127.5 + 128, clipped to 0 … 255, truncated."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)


def sample_batches(
    denoiser: Any,
    seeds: Sequence[int],
    *,
    solver: str = "heun",
    labels: torch.Tensor | int | None = None,
    batch: int = 64,
    compile: bool | str = "auto",
    precision: str = "ieee",
    progress: Progress = silent,
    **solver_arguments: Any,
) -> Iterator[Samples]:
    """Yields the images of `seeds`, in order, `batch` at a time.

    denoiser: of `diffmem.models` or `diffmem.optimum`, or a module that denoises (see `diffmem.models.as_denoiser`); it
    is sampled in evaluation mode.

    An image depends on its seed only: its generator, on the denoiser's device, draws the latent, then, where the
    denoiser has labels, a class index, then the noise of the steps. `labels`, one class for all images or one entry per
    seed, replaces the class index after it was drawn: the images of class K are those that the seeds give when they
    draw K themselves, with added noise too.
    `solver` "heun" (18 steps, 35 network calls), "unipc" or "dpm++" (14 steps and calls); solver_arguments go to it,
    see `diffmem.sampling.solvers`. compile: True, False, or "auto": after two batches have shown that the rest
    takes long enough to pay for it. Every batch that is compiled has the same size, the last one filled up. precision:
    of products of float32, "ieee" or "tf32", see `diffmem.precision`. Raises InputError for labels or classes that do
    not fit, and for images that are not finite.
    """
    if solver not in SAMPLERS:
        raise InputError(f"solver is {solver!r}, but must be one of {', '.join(SAMPLERS)}")
    if batch < 1:
        raise InputError(f"batch is {batch}, but must be at least 1")
    if compile not in (True, False, "auto"):
        raise InputError(f"compile is {compile!r}, but must be True, False or 'auto'")
    if isinstance(denoiser, torch.nn.Module) or not hasattr(denoiser, "label_dim"):
        denoiser = as_denoiser(denoiser)
    seeds = [int(seed) for seed in seeds]
    given = _checked_labels(denoiser, labels, len(seeds))
    device = next(denoiser.parameters()).device
    shape = (denoiser.channels, denoiser.resolution, denoiser.resolution)
    compiled = compile is True or (compile == "auto" and is_compiled(denoiser))
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
            batch_labels = generators.randint(denoiser.label_dim)
            if given is not None:
                batch_labels = given[start : start + size]
                batch_labels = torch.cat([batch_labels, batch_labels[-1:].expand(len(filled) - size, *given.shape[1:])])
                batch_labels = batch_labels.to(device)
        arguments = dict(solver_arguments)
        if arguments.get("S_churn"):
            arguments["noise"] = lambda g=generators: g.randn(shape, torch.float64)
        with float32_products(precision), evaluating(denoiser):
            images = SAMPLERS[solver](denoiser, latents, labels=batch_labels, compiled=compiled, **arguments)
        _check_finite(images[:size], chosen)
        images = to_uint8(images[:size]).cpu()
        yield Samples(
            images, torch.tensor(chosen), None if batch_labels is None else batch_labels[:size].to("cpu", copy=True)
        )
        done = start + size
        progress("sampling", done, len(seeds))
        seconds.append(time.perf_counter() - began)
        if compile == "auto" and not compiled and len(seconds) == 2 and is_compilable(denoiser):
            # The first batch warms up; the lesser of the two is nearer to what the rest will take.
            compiled = worth_compiling(denoiser, timing_of([min(seconds)]), -(-(len(seeds) - done) // batch))


def worth_compiling(denoiser: Any, each: Timing, times: int) -> bool:
    """Whether compiling the step pays where something that takes `each` without is still to be done so many times."""
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    return compiling_pays(each, times, parameters, _COMPILING.get(next(denoiser.parameters()).device.type))


def sample(denoiser: Any, seeds: Sequence[int], **arguments: Any) -> Samples:
    """The images of `seeds`, in order, with their seeds and labels; arguments as for `sample_batches`."""
    parts = list(sample_batches(denoiser, seeds, **arguments))
    if not parts:
        raise InputError("seeds: none given")
    labels = None if parts[0].labels is None else torch.cat([part.labels for part in parts])
    return Samples(torch.cat([part.images for part in parts]), torch.cat([part.seeds for part in parts]), labels)


def _check_finite(images: torch.Tensor, seeds: Sequence[int]) -> None:
    bad = (~images.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise InputError(
            f"seed {seeds[bad[0]]}{f' and {len(bad) - 1} more' if bad[1:] else ''}: the image is not finite (NaN or "
            "infinity); the checkpoint is damaged, or needs float32 or other noise levels"
        )


def _checked_labels(denoiser: Any, labels: torch.Tensor | int | None, count: int) -> torch.Tensor | None:
    if labels is None:
        return None
    if not denoiser.label_dim:
        raise InputError("labels: this denoiser is unconditional; leave them out")
    if isinstance(labels, int):
        labels = torch.full((count,), labels)
    labels = torch.as_tensor(labels)
    if len(labels) != count:
        raise InputError(f"labels: {len(labels)} for {count} seeds; give one class, or one entry per seed")
    if not labels.is_floating_point() and count and not 0 <= labels.min() <= labels.max() < denoiser.label_dim:
        raise InputError(f"labels: classes must lie in 0 … {denoiser.label_dim - 1}")
    return labels
