"""Speed of a UNet's forward pass and training step: channels_last and compiled against contiguous eager.

`python -m benchmarks.bench_unet [--sizes 8 16 32] [--modes forward train] [--repeats 5]` prints one line per network
and way. Baseline: the same weights in NCHW, eager, every operation PyTorch's own. Values are compared before anything
is timed; figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

from diffmem.models import Denoiser, preset
from diffmem.ops.conv3x3 import native

# Image size: preset, changes, images per batch.
WORKLOADS = {
    32: ("ddpmpp_cifar10", {}, 8),
    16: ("ddpmpp_16", {}, 32),
    8: ("ddpmpp_8", {}, 64),
}


def network(size: int, memory_format: torch.memory_format) -> torch.nn.Module:
    name, changes, _ = WORKLOADS[size]
    torch.manual_seed(0)
    # Dropout would make the ways incomparable; it costs the same in each.
    made = Denoiser(preset(name, dropout=0.0, **changes)).model
    with torch.no_grad():  # a fresh network's last layers are all but zero
        for parameter in made.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return made.to(memory_format=memory_format)


def forward(model: Callable, x: torch.Tensor, c_noise: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(x, c_noise)

    return run


def training_step(
    model: Callable, module: torch.nn.Module, x: torch.Tensor, c_noise: torch.Tensor
) -> Callable[[], torch.Tensor]:
    # A learning rate of 0 keeps the values comparable and costs what any other does.
    optimizer = torch.optim.Adam(module.parameters(), lr=0.0)

    def run() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        model(x, c_noise).square().mean().backward()
        optimizer.step()
        return module.map_layer0.weight.grad

    return run


def with_pytorch_convolutions(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """`run` without our own convolution."""

    def plain() -> torch.Tensor:
        with mock.patch.object(native, "fits", return_value=False):
            return run()

    return plain


def medians(ways: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Seconds per call, the ways taking turns so that a busy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(size: int, mode: str, repeats: int, skip_compiled: bool = False) -> list[dict]:
    """One row per way: size, mode, way, milliseconds, speedup over the baseline, relative difference from it."""
    batch = WORKLOADS[size][2]
    generator = torch.Generator().manual_seed(1)
    x, c_noise = torch.randn(batch, 3, size, size, generator=generator), torch.rand(batch, generator=generator) * 999
    last = x.to(memory_format=torch.channels_last)
    plain, ours = network(size, torch.contiguous_format), network(size, torch.channels_last)
    compiled = torch.compile(ours)

    def way(model: Callable, module: torch.nn.Module, inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
        return forward(model, inputs, c_noise) if mode == "forward" else training_step(model, module, inputs, c_noise)

    ways = {
        "eager NCHW": with_pytorch_convolutions(way(plain, plain, x)),
        "eager channels_last": way(ours, ours, last),
        "compiled channels_last": way(compiled, ours, last),
    }
    if skip_compiled:
        del ways["compiled channels_last"]
    values = {}
    for name, run in ways.items():
        run()
        values[name] = run().clone()
    baseline = values["eager NCHW"]
    differences = {name: ((value - baseline).norm() / baseline.norm()).item() for name, value in values.items()}
    for name, difference in differences.items():
        if not difference < 1e-4:
            raise SystemExit(f"{size}×{size} {mode}: {name} differs from the baseline by {difference:.1e}")
    seconds = medians(ways, repeats)
    return [
        {
            "size": size,
            "batch": batch,
            "mode": mode,
            "way": name,
            "milliseconds": 1e3 * seconds[name],
            "speedup": seconds["eager NCHW"] / seconds[name],
            "difference": differences[name],
        }
        for name in ways
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--modes", nargs="+", choices=["forward", "train"], default=["forward", "train"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager-only", action="store_true", help="without compiling, which takes minutes")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    for size in options.sizes:
        for mode in options.modes:
            for row in compare(size, mode, options.repeats, options.eager_only):
                print(
                    f"{row['size']:2d}×{row['size']:<2d} batch {row['batch']:<3d} {row['mode']:8s}{row['way']:24s}"
                    f"{row['milliseconds']:9.1f} ms {row['speedup']:6.2f}×  difference {row['difference']:.0e}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
