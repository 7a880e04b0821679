"""Speed of a UNet's forward pass and training step on this device, eager and compiled, against a network of PyTorch's
own modules (`PlainUNet`) with the same weights: eager in NCHW, and torch.compile in channels_last."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.bench_training import PlainUNet
from benchmarks.harness import Bench, Contender
from diffmem.models import Denoiser, preset
from diffmem.models.networks import UNet

MINUTES = 12
ISAS = ("avx2",)
BASELINE = "PyTorch eager, NCHW"
COMPILED = "torch.compile, channels_last"  # what a user would do instead
# Image size: preset, changes, images per batch.
WORKLOADS = {
    32: ("ddpmpp_cifar10", {}, 8),
    16: ("ddpmpp_16", {}, 32),
    8: ("ddpmpp_8", {}, 64),
}


def network(size: int) -> UNet:
    name, changes, _ = WORKLOADS[size]
    torch.manual_seed(0)
    # Dropout would make the ways incomparable; it costs the same in each.
    made = Denoiser(preset(name, dropout=0.0, **changes)).model
    with torch.no_grad():  # a fresh network's last layers are all but zero
        for parameter in made.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return made.to(memory_format=torch.channels_last)


def forward(model: Callable, x: torch.Tensor, c_noise: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(x, c_noise)

    return run


def training_step(module: torch.nn.Module, x: torch.Tensor, c_noise: torch.Tensor) -> Callable[[], torch.Tensor]:
    # A learning rate of 0 keeps the values comparable and costs what any other does.
    optimizer = torch.optim.Adam(module.parameters(), lr=0.0)

    def run() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        module(x, c_noise).square().mean().backward()
        optimizer.step()
        return module.map_layer0.weight.grad

    return run


def run(bench: Bench) -> None:
    for size, (_, _, batch) in WORKLOADS.items():
        torch._dynamo.reset()  # beyond eight versions of a function torch.compile leaves it uncompiled
        generator = torch.Generator().manual_seed(1)
        x, c_noise = (
            torch.randn(batch, 3, size, size, generator=generator),
            torch.rand(batch, generator=generator) * 999,
        )
        last = x.to(memory_format=torch.channels_last)
        ours = network(size)
        plain = PlainUNet.like(ours)
        name = f"UNet {size}×{size}, {ours.config.model_channels} channels, batch {batch}"
        baseline = Contender(BASELINE, forward(plain, x, c_noise))
        bench.compare(f"{name}, forward", [Contender("diffmem", forward(ours, last, c_noise)), baseline], agree)
        if not bench.quick and bench.wants(f"{name}, forward, compiled"):  # compiling takes minutes
            compiled = Contender("diffmem, compiled", forward(torch.compile(ours), last, c_noise))
            other = torch.compile(PlainUNet.like(ours).to(memory_format=torch.channels_last))
            rival = Contender(COMPILED, forward(other, last, c_noise))
            bench.compare(f"{name}, forward, compiled", [compiled, rival, baseline], agree)
        steps = [
            Contender("diffmem", training_step(ours, last, c_noise)),
            Contender(BASELINE, training_step(plain, x, c_noise)),
        ]
        bench.compare(f"{name}, training step", steps, agree, repeats=3)


def agree(answers: dict[str, torch.Tensor]) -> None:
    """Raises where an answer differs from the baseline's by more than float32 rounding."""
    expected = answers[BASELINE]
    for name, answer in answers.items():
        difference = float((answer - expected).norm() / expected.norm())
        if not difference < 1e-4:
            raise SystemExit(f"{name} differs from the baseline by {difference:.1e}")
