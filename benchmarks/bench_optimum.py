"""The theoretical optimum of CIFAR-10 (JPEG) against the direct computation.

`python -m benchmarks optimum` samples 256 images with 18 steps of Heun (35 calls of the denoiser over all 50,000
training images) and times single calls along the way. The baseline is what one writes first, in float32 with all
threads: torch.cdist (by matrix product) of the queries and the whole set, kept as contiguous float32 rows; softmax;
matmul. Values are checked against float64 on 32 of the queries before anything is timed, the baseline's own error is in
its note. Queries of a call are those that the sampler meets there. Preparing the rows is not timed; the note says what
it takes. "torch fallback" is what there is without the compiled core. Small sets, of 500 to 5,000 images of 64 to 3,072
values, are asked for 1, 16 and 256 images at nine noise levels; the row is of the level at which diffmem gains least.

    python -m benchmarks.bench_optimum --impl torch --sizes 500,2000 --values 64,768

sweeps such sets alone, up to 20,000 images of 12,288 values, for both tolerances, and lists the cases that take longer
than the direct computation, and than the same with products of matrices and known norms in place of cdist.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch

from benchmarks.harness import Bench, Contender
from diffmem.data import load_images
from diffmem.optimum import OptimalDenoiser
from diffmem.sampling import SamplerConfig, SeededGenerators, sample_latents

MINUTES = 15
ISAS = ("avx2",)
CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10-train.zip"
QUERIES, CHECKED = 256, 32
SIZES, VALUES_OF_ROWS, BATCHES = (500, 1000, 2000, 5000), (64, 768, 3072), (1, 16, 256)
SHAPES = (*VALUES_OF_ROWS, 12288)  # values of images that `shaped` makes
LEVELS = (80.0, 20.0, 8.0, 3.0, 1.0, 0.5, 0.2, 0.05, 0.002)
TIE = 0.97  # of the direct computation's time over ours: what timing cannot tell apart


class Direct:
    """cdist, softmax, matmul."""

    def __init__(self, images: torch.Tensor) -> None:
        self.rows = images.flatten(1).float().div_(127.5).sub_(1)

    def __call__(self, x: torch.Tensor, sigma, labels=None) -> torch.Tensor:
        squared = torch.cdist(x.float().flatten(1), self.rows).square_()
        weights = torch.softmax(squared.mul_(-0.5 / float(sigma) ** 2), dim=1)
        return (weights @ self.rows).reshape(x.shape)


class Products(Direct):
    """matmul, softmax, matmul, with the norms of the rows computed beforehand."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__(images)
        self.half_norms = self.rows.square().sum(dim=1) / 2

    def __call__(self, x: torch.Tensor, sigma, labels=None) -> torch.Tensor:
        logits = (x.flatten(1) @ self.rows.T - self.half_norms) / float(sigma) ** 2
        return (torch.softmax(logits, dim=1) @ self.rows).reshape(x.shape)


def run(bench: Bench) -> None:
    if not CIFAR10.exists():
        print(f"optimum: no {CIFAR10}")
        return
    training = load_images(CIFAR10, limit=8000 if bench.quick else None)
    queries = 32 if bench.quick else QUERIES
    direct = Direct(torch.from_numpy(training.images))
    denoisers = {}
    for tolerance in (1e-3, 1e-5):
        began = time.perf_counter()
        denoisers[tolerance] = OptimalDenoiser(training, labels=False, tolerance=tolerance)
        prepared = time.perf_counter() - began
    latents = SeededGenerators(range(queries)).randn((3, 32, 32))
    met = states(denoisers[1e-5], latents)
    errors = dict.fromkeys((*denoisers, "direct"), 0.0)
    for x, sigma in met:
        expected = exact(direct.rows, x[:CHECKED], sigma)
        for name, denoiser in (*denoisers.items(), ("direct", direct)):
            gap = denoiser(x, sigma)[:CHECKED].double() - expected
            error = float((gap.flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max())
            errors[name] = max(errors[name], error)
            print(f"sigma {sigma:.4g}, {name}: relative error {error:.1e}", flush=True)
    assert all(errors[tolerance] <= tolerance for tolerance in denoisers), errors

    def contenders(tolerance: float, do) -> list[Contender]:
        note = f"relative error at most {errors[tolerance]:.1e}; prepared in {prepared:.1f} s"
        return [
            Contender("diffmem", lambda: do(denoisers[tolerance]), note),
            Contender("cdist, softmax, matmul", lambda: do(direct), f"relative error {errors['direct']:.1e}"),
        ]

    for tolerance in denoisers:
        name = f"optimum, {queries} images, 18 steps of Heun, tolerance {tolerance:g}"
        bench.compare(name, contenders(tolerance, lambda d: sample_latents(d, latents)), repeats=1)
    for x, sigma in met[::3]:
        for tolerance in denoisers:
            name = f"optimum, one call at sigma {sigma:.3g}, tolerance {tolerance:g}"
            bench.compare(name, contenders(tolerance, lambda d, x=x, sigma=sigma: d(x, sigma)), repeats=2)
    name = f"optimum, {queries} images, 18 steps of Heun, tolerance 1e-05, torch fallback"
    if bench.wants(name):
        denoisers[1e-5] = OptimalDenoiser(training, labels=False, tolerance=1e-5, impl="torch")
        bench.compare(name, contenders(1e-5, lambda d: sample_latents(d, latents)), repeats=1)
    small_sets(bench, training.images)


def small_sets(bench: Bench, images: np.ndarray) -> None:
    pixels = torch.from_numpy(images[: 500 if bench.quick else 5000])
    ways = (("", None), (", torch fallback", "torch"))
    for d, count, (text, impl) in itertools.product(VALUES_OF_ROWS, SIZES, ways):
        names = {b: f"optimum, {count} images of {d} values, batch {b}{text}" for b in BATCHES}
        if count > len(pixels) or not any(map(bench.wants, names.values())):
            continue
        training = shaped(pixels[:count], d)
        direct, denoiser = Direct(training), OptimalDenoiser(training.numpy(), labels=False, impl=impl)
        for batch, name in names.items():
            gains = {}
            for sigma, x in noisy(training, batch):
                seconds = shortest([direct, denoiser], x, sigma)
                gains[sigma] = seconds[0] / seconds[1], x
            sigma = min(gains, key=lambda level: gains[level][0])
            note, x = f"tolerance 1e-05, at sigma {sigma:g}, the one with the least gain", gains[sigma][1]
            contenders = [
                Contender("diffmem", lambda d=denoiser, x=x, s=sigma: d(x, s), note),
                Contender("cdist, softmax, matmul", lambda d=direct, x=x, s=sigma: d(x, s)),
            ]
            bench.compare(name, contenders, repeats=9)


def shaped(pixels: torch.Tensor, d: int) -> torch.Tensor:
    """Images of d values each, uint8: averages of pixels, or, for more values than there are, what lies between."""
    if d == 64:
        return shrunk(pixels.float().mean(dim=1, keepdim=True), 4)
    if d > pixels[0].numel():
        larger = torch.nn.functional.interpolate(pixels.float(), scale_factor=2, mode="bicubic", align_corners=False)
        return larger.round_().clip_(0, 255).to(torch.uint8)
    return pixels if d == pixels[0].numel() else shrunk(pixels, 2)


def shrunk(pixels: torch.Tensor, times: int) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(pixels.float(), times).round().to(torch.uint8)


def noisy(training: torch.Tensor, batch: int) -> list[tuple[float, torch.Tensor]]:
    """Images of the set with noise of each level."""
    generator = torch.Generator().manual_seed(0)
    clean = training[torch.randint(0, len(training), (batch,), generator=generator)].float() / 127.5 - 1
    return [(sigma, clean + sigma * torch.randn(clean.shape, generator=generator)) for sigma in LEVELS]


def shortest(ways: list[Callable[..., object]], x: torch.Tensor, sigma: float, rounds: int = 5) -> list[float]:
    """Seconds of each way's shortest run, taken in turns; a run is repeated until it takes a millisecond."""
    found, repeats = [], []
    for way in ways:
        way(x, sigma)
        began = time.perf_counter()
        way(x, sigma)
        found.append(time.perf_counter() - began)
        repeats.append(1 + int(1e-3 / found[-1]))
    for _ in range(rounds if max(found) < 0.1 else 2):
        for number, way in enumerate(ways):
            began = time.perf_counter()
            for _ in range(repeats[number]):
                way(x, sigma)
            found[number] = min(found[number], (time.perf_counter() - began) / repeats[number])
    return found


def numbers(name: str, default: tuple[int, ...], text: str) -> Callable[[Callable], Callable]:
    """An option of numbers with commas between them."""

    def parsed(_context: object, _option: object, given: str) -> list[int]:
        try:
            return [int(part) for part in given.split(",")]
        except ValueError:
            raise click.BadParameter(f"{given!r} is not numbers with commas between them") from None

    return click.option(name, default=",".join(map(str, default)), callback=parsed, show_default=True, help=text)


@click.command()
@click.option("--impl", help="Backend of the posterior mean, such as torch.")
@numbers("--sizes", SIZES, "Numbers of images.")
@numbers("--values", VALUES_OF_ROWS, f"Values of an image, of {', '.join(map(str, SHAPES))}.")
@numbers("--batches", BATCHES, "Images per call.")
@click.option("--all", "everything", is_flag=True, help="List all cases.")
def sweep(impl: str | None, sizes: list[int], values: list[int], batches: list[int], everything: bool) -> None:
    """Time single calls beside the direct computation, and list those that take longer."""
    if unknown := sorted(set(values) - set(SHAPES)):
        raise click.BadParameter(f"there are no images of {unknown[0]} values", param_hint="--values")
    pixels = torch.from_numpy(load_images(CIFAR10, limit=max(sizes)).images)
    slower, cases = {"cdist": 0, "products": 0}, 0
    for d, count in itertools.product(values, sizes):
        training = shaped(pixels[:count], d)
        ours = {t: OptimalDenoiser(training.numpy(), labels=False, impl=impl, tolerance=t) for t in (1e-3, 1e-5)}
        ways = [Direct(training), Products(training), *ours.values()]
        for batch in batches:
            for sigma, x in noisy(training, batch):
                direct, products, *seconds = shortest(ways, x, sigma)
                for tolerance, taken in zip(ours, seconds, strict=True):
                    cases += 1
                    slower["cdist"] += direct / taken < TIE
                    slower["products"] += products / taken < TIE
                    if everything or min(direct, products) / taken < TIE:
                        print(
                            f"{count} x {d}, batch {batch}, sigma {sigma:g}, tolerance {tolerance:g}: "
                            f"{1e6 * taken:.0f} us, x{direct / taken:.2f} cdist, x{products / taken:.2f} products",
                            flush=True,
                        )
    print(f"{cases} cases; slower than with cdist {slower['cdist']}, than with products {slower['products']}")


def states(denoiser: OptimalDenoiser, latents: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
    """What the sampler asks for: the first call at each noise level."""
    met: dict[float, torch.Tensor] = {}

    class Recorder:
        sigma_min, sigma_max = denoiser.sigma_min, denoiser.sigma_max

        def __call__(self, x, sigma, labels=None):
            met.setdefault(float(sigma), x.clone())
            return denoiser(x, sigma, labels)

    sample_latents(Recorder(), latents)
    assert len(met) == len({stage.sigma for stage in SamplerConfig().plan(denoiser).stages})
    return [(x, sigma) for sigma, x in met.items()]


def exact(rows: torch.Tensor, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The formula in float64."""
    flat = x.double().flatten(1)
    blocks = [block.double() for block in rows.split(10000)]
    logits = torch.cat([flat @ y.T - 0.5 * y.square().sum(dim=1) for y in blocks], dim=1) / sigma**2
    weights = torch.softmax(logits, dim=1)
    return sum(w @ y for w, y in zip(weights.split(10000, dim=1), blocks, strict=True)).reshape(x.shape)


if __name__ == "__main__":
    sweep()
