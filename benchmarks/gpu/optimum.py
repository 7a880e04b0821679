"""The closed-form optimum: posterior means at high, middle and low noise, and 18 steps of Heun from end to end."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from unittest import mock

import torch

from benchmarks.gpu.cases import Case, Values, measure
from benchmarks.gpu.target import Target
from benchmarks.gpu.timing import seconds_per_call
from diffmem.data import ImageSet
from diffmem.ops.posterior_mean import PosteriorRows, blocked
from diffmem.ops.posterior_mean.reference import posterior_mean_reference
from diffmem.ops.triton_ops import triton_unavailable
from diffmem.optimum import OptimalDenoiser
from diffmem.precision import float32_products
from diffmem.sampling import sample_latents

SIGMAS, TOLERANCES = (2000.0, 200.0, 2.0), (1e-3, 1e-5)


def run(target: Target) -> list[str]:
    wrong = []
    rows = images_like(target, *((1100, 48) if target.tiny else (50_000, 3072)))
    for case in cases(target, rows):
        wrong += measure(case, target, "optimum")
    return wrong + end_to_end(target, rows)


def images_like(target: Target, n: int, d: int) -> torch.Tensor:
    """uint8 rows [n, d] whose spectrum is that of images."""
    factors = target.normal(n, 64) * torch.logspace(3.3, 2, 64, device=target.device)
    rows = 128 + factors @ target.normal(64, d, seed=1) / d**0.5 + 4 * target.normal(n, d, seed=2)
    return rows.round_().clip_(0, 255).to(torch.uint8)


def cases(target: Target, rows: torch.Tensor) -> Iterator[Case]:
    count, (n, d) = 5 if target.tiny else 256, rows.shape
    center = rows.float().mean(dim=0, dtype=torch.float64).round().cpu()
    near = center.to(target.device)
    floats = rows.float() - near.float()
    names = ("torch",) if triton_unavailable(target.device.type) else ("triton", "torch")
    ready = {name: PosteriorRows(rows, center, target.device, impl=name) for name in names}
    pairs = zip(SIGMAS[::2], TOLERANCES, strict=True) if target.tiny else product(SIGMAS, TOLERANCES)
    for sigma, tolerance in pairs:
        name = f"posterior mean of {n} rows, d = {d}, {count} queries, sigma {sigma:g}, tolerance {tolerance:g}"
        if not target.fits(3.0, name):
            continue
        x = rows[:count].double() + sigma * target.normal(count, d, seed=3)
        levels = torch.full((count,), sigma, dtype=torch.float64, device=target.device)

        def direct(_: int, x=x, sigma=sigma) -> Values:
            with float32_products("ieee"):
                weights = torch.cdist(x.float() - near.float(), floats).square_().mul_(-0.5 / sigma**2)
                return [torch.softmax(weights, dim=1) @ floats]

        def by(impl: str, _: int, x=x, levels=levels, tolerance=tolerance) -> Values:
            with mock.patch.object(blocked, "SMALL", 0):  # what is tiny would not reach the kernels
                return [ready[impl].mean(x, levels, tolerance).mean - near]

        def exact(x=x, levels=levels) -> Values:
            few = 16  # each costs as much as all others by the kernels
            found = posterior_mean_reference(x[:few], levels[:few], rows)[0] - near
            rest = ready["torch"].mean(x[few:], levels[few:], 1e-6).mean - near if len(x) > few else found[:0]
            return [torch.cat([found, rest])]

        yield Case(
            name, {impl: partial(by, impl) for impl in names} | {"cdist, softmax": direct}, exact, "cdist, softmax",
            names, operations=4.0 * count * n * d, matrix="float32 ieee", capturable=False, tolerance=tolerance,
        )  # fmt: skip


def end_to_end(target: Target, rows: torch.Tensor) -> list[str]:
    """18 steps of Heun (35 calls) by `OptimalDenoiser`, and by cdist, softmax and a product in float32."""
    channels, side = (3, 4) if target.tiny else (3, 32)
    batch, steps = (3, 3) if target.tiny else (256, 18)
    shape = (channels, side, side)
    images = ImageSet(rows.cpu().numpy().reshape(len(rows), *shape))
    latents = target.normal(batch, *shape, dtype=torch.float64, seed=9)
    values = rows.float() / 127.5 - 1

    def direct(x: torch.Tensor, sigma: torch.Tensor, labels: None = None) -> torch.Tensor:
        weights = torch.cdist(x.flatten(1).float(), values).square_().mul_(-0.5 / sigma.float() ** 2)
        return (torch.softmax(weights, dim=1) @ values).view(x.shape)

    direct.sigma_min, direct.sigma_max = 0.0, float("inf")  # type: ignore[attr-defined]
    name = f"optimum of {len(rows)} images, {batch} images, {steps} steps of Heun"
    first, wrong = None, []
    for tolerance in TOLERANCES:
        if not target.fits(10.0, f"{name}, tolerance {tolerance:g}"):
            continue
        denoiser = OptimalDenoiser(images, tolerance=tolerance, device=str(target.device), labels=False)

        def sample(denoiser=denoiser) -> torch.Tensor:
            return sample_latents(denoiser, latents, steps=steps)

        def plainly() -> torch.Tensor:
            with float32_products("ieee"):
                return sample_latents(direct, latents, steps=steps)

        gap = float(((sample() - plainly()).flatten(1).norm(dim=1) / shape[0] / side).median())
        if not gap < 0.1:  # images, not roundings: most paths end at the same image
            wrong.append(f"{name}: half of the images are {gap:.2g} from those of cdist, softmax")
        first = None
        for contender, way in (("diffmem", sample), ("cdist, softmax, matmul", plainly)):
            found = seconds_per_call([way], target.device, graph=False, repeats=3)
            first = found.seconds if first is None else first
            target.record(
                "optimum", f"{name}, tolerance {tolerance:g}", contender, f"{batch / found.seconds:.4g} images/s",
                seconds=f"{found.seconds:.4g}", fastest=f"{found.fastest:.4g}", repeats="3",
                ratio=f"{found.seconds / first:.4g}",
            )  # fmt: skip
    return wrong
