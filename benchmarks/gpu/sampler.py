"""The Heun sampler of DDPM++: eager and compiled, in float32, TF32 and bfloat16, with our ops and with PyTorch's."""

from __future__ import annotations

import statistics

import torch

from benchmarks.gpu.jobs import DRY_SAMPLER, IMPLEMENTATIONS, SAMPLER, Variant
from benchmarks.gpu.networks import by, config_of
from benchmarks.gpu.target import Target, dry_compile
from benchmarks.gpu.timing import Measured, elapsed, seconds_per_call
from diffmem.models import Denoiser
from diffmem.precision import AUTOCAST, float32_products
from diffmem.sampling import sample_latents

STEPS, CALLS = 3, 35  # of which 5 evaluations of the network are timed; of the protocol's 18 steps
# How far D(x; σ) may be from PyTorch's in float32, relative: rounding of the format, through some forty layers.
ALLOWED = {"ieee": 1e-4, "tf32": 1e-2, "bf16": 6e-2}
EXPECTED_SECONDS = {True: 22.0, False: 5.0}  # of a variant, compiled from the cache or not


def run(target: Target) -> list[str]:
    wrong = []
    for variant in DRY_SAMPLER if target.tiny else SAMPLER:
        wrong += measure(variant, target)
    return wrong


def denoiser_of(variant: Variant, target: Target) -> Denoiser:
    config, _ = config_of(variant, target)
    torch.manual_seed(0)
    denoiser = Denoiser(config).to(target.device).eval()
    with torch.no_grad():  # a fresh network's last layers are all but zero
        for parameter in denoiser.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    denoiser.autocast_dtype = AUTOCAST[variant.precision]
    return denoiser


def measure(variant: Variant, target: Target) -> list[str]:
    """Checks the network once against PyTorch's in float32, then times a short run of the sampler by each."""
    wrong: list[str] = []
    first = None
    for implementation in IMPLEMENTATIONS:
        name = f"Heun {variant.name.removeprefix('sampler ')}"
        if not target.fits(EXPECTED_SECONDS[variant.compiled], f"{name}, {implementation}"):
            continue
        torch._dynamo.reset()
        denoiser = denoiser_of(variant, target)
        x, latents = inputs(variant, target, denoiser)
        error = distance(variant, denoiser, x, implementation)
        if not error <= ALLOWED[variant.precision]:
            wrong.append(
                f"{name}, {implementation}: a call is off by {error:.1e}, allowed {ALLOWED[variant.precision]:.0e}"
            )
        try:
            found = timed(variant, denoiser, latents, implementation, target)
        except torch.OutOfMemoryError as memory:
            print(f"{name}, {implementation}: {str(memory).splitlines()[0]}")
            target.left_out.append(f"{name}, {implementation} (memory)")
            continue
        finally:
            target.empty_cache()
        first = found.seconds if first is None else first
        rate = len(latents) / found.seconds / CALLS
        target.record(
            "sampler", name, implementation, f"{rate:.4g} images/s at {CALLS} calls; a call {error:.0e} from float32",
            seconds=f"{found.seconds:.4g}", fastest=f"{found.fastest:.4g}", repeats="3",
            ratio=f"{found.seconds / first:.4g}",
        )  # fmt: skip
        del denoiser
    return wrong


def inputs(variant: Variant, target: Target, denoiser: Denoiser) -> tuple[torch.Tensor, torch.Tensor]:
    """A small batch of noisy images for the check, and latents."""
    batch = config_of(variant, target)[1]
    shape = (denoiser.channels, denoiser.resolution, denoiser.resolution)
    return target.normal(min(batch, 16), *shape), target.normal(batch, *shape, dtype=torch.float64, seed=1)


def distance(variant: Variant, denoiser: Denoiser, x: torch.Tensor, implementation: str) -> float:
    """Relative, of D(x; σ) in this variant's precision from PyTorch's in float32, eager."""
    sigma = torch.linspace(-3, 3, len(x), device=x.device).exp()
    with torch.inference_mode():
        with by(implementation), float32_products(variant.precision):
            found = denoiser(x, sigma)
        kept, denoiser.autocast_dtype = denoiser.autocast_dtype, None
        with by("PyTorch's"), float32_products("ieee"):
            exact = denoiser(x, sigma)
        denoiser.autocast_dtype = kept
    return float((found - exact).norm() / exact.norm())


def timed(
    variant: Variant, denoiser: Denoiser, latents: torch.Tensor, implementation: str, target: Target, repeats: int = 3
) -> Measured:
    """Seconds of an evaluation of the network with its step, of a run of STEPS."""
    steps = 2 if target.tiny else STEPS
    calls = 2 * steps - 1
    with dry_compile(target), by(implementation), float32_products(variant.precision):

        def sample() -> torch.Tensor:
            return sample_latents(denoiser, latents, steps=steps, compiled=variant.compiled)

        if target.device.type == "cuda":
            sample()  # compiles
            sample()  # captures graphs
        else:
            found = seconds_per_call([sample], target.device)
            return Measured(found.seconds / calls, found.fastest / calls, found.how)
        times = [elapsed(sample, 1) / calls for _ in range(repeats)]
    return Measured(statistics.median(times), min(times), "events")


def compile_variant(variant: Variant, implementation: str, target: Target) -> None:
    """Leaves the generated code in the cache."""
    denoiser = denoiser_of(variant, target)
    _, latents = inputs(variant, target, denoiser)
    with dry_compile(target), by(implementation), float32_products(variant.precision):
        sample_latents(denoiser, latents, steps=2, compiled=True)
