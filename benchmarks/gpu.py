"""`python -m benchmarks.gpu`: checks, tunes and measures every GPU kernel on the GPU that is there.

Each case is first computed by every contender and by the reference in float64: a kernel's error must be at most twice
that of PyTorch's own formulation in the same dtype, plus a rounding floor; it must give the same bits twice, and under
a captured CUDA graph. Then all are timed in turns, the median of the repeats, and set against what the device was
measured to reach: bytes per second of a large copy, operations per second of a large matrix product. Which attention
is faster for a shape goes to the file that the op itself consults (`diffmem.ops.measured`). Rows go to
benchmarks/results/<device>.csv as soon as they are there.

    python -m benchmarks.gpu                       # everything, some minutes
    python -m benchmarks.gpu --only attention      # cases whose name contains this
    python -m benchmarks.gpu --interpret           # a dry run on the CPU: tiny sizes, no speeds worth a look

The dry run runs the same lines: Triton kernels in its interpreter, CUDA kernels compiled for the host stand-in
(csrc/simt), torch.compile with a backend that compiles nothing; of each subject, the cases that between them run every
kernel.

To add an op, write a function like `attention_cases` that yields its `Case`s and list it in SUBJECTS.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from unittest import mock

import click
import torch

from benchmarks.harness import RESULTS, Bench
from diffmem.ops.measured import seconds_of

LEAST_SECONDS = 0.01  # of one timing; shorter runs are repeated
REPEATS = 5
STEPS = ("inference", "training")
HALF_FLOOR, FLOAT_FLOOR, TF32_FLOOR = 8, 32, 2**14  # roundings of the largest value that are forgiven


@dataclass(frozen=True)
class Target:
    """Where to run, and how large. rates: what the device was measured to do, per second, by name."""

    device: torch.device
    tiny: bool
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def backend(self) -> str:
        """torch.compile's."""
        return "eager" if self.tiny else "inductor"

    def combinations(self, *factors: Sequence) -> Iterator[tuple]:
        """All of them; of a dry run, all of the first and last factor, each with some of the others, all in turn."""
        if not self.tiny:
            yield from product(*factors)
            return
        first, *others, last = factors
        for index, (a, z) in enumerate(product(first, last)):
            yield (a, *(each[(index + index // 2) % len(each)] for each in others), z)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        # The interpreter's bfloat16 products are wrong.
        return (torch.float32, torch.float16) if self.tiny else (torch.float32, torch.bfloat16, torch.float16)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device, dtype)


Values = list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One workload: what computes it, and how much of it there is to do.

    ways: functions that return the results, ours first; they must not change their inputs. exact: the same in float64,
    or in integers, which then have to be equal. plain: the one of `ways` whose error is the yardstick. bytes moved at
    least and operations, 0 where they say nothing; matrix: the name of the rate that the operations are set against.
    tune: is told the seconds of each way. tolerance: of ours, relative to each row of the result, where it is not held
    against `plain`.
    """

    name: str
    ways: dict[str, Callable[[], Values]]
    exact: Callable[[], Values]
    plain: str
    bytes: float = 0.0
    operations: float = 0.0
    matrix: str = ""
    tune: Callable[[dict[str, float]], None] | None = None
    capturable: bool = True
    tolerance: float | None = None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layouts() -> tuple[torch.memory_format, ...]:
    return torch.channels_last, torch.contiguous_format


def _with_gradients(
    function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], dy: torch.Tensor | None
) -> Callable[[], Values]:
    """Computes function(*inputs), and with `dy` the gradients of all inputs."""

    def run() -> Values:
        if dy is None:
            with torch.no_grad():
                return [function(*inputs)]
        leaves = [each.detach().requires_grad_() for each in inputs]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    return run


def group_norm_cases(target: Target) -> Iterator[Case]:
    """group_norm_silu in both forms of the networks: an embedding added before it, a scale and shift after it."""
    from diffmem.ops.group_norm_silu import group_norm_silu
    from diffmem.ops.group_norm_silu.tiles import WHOLE, WHOLE_BACKWARD

    shapes = [(1, 8, 4, 4), (1, 32, 17, 16)] if target.tiny else [
        (256, 256, 32, 32), (256, 256, 16, 16), (256, 256, 8, 8), (512, 64, 8, 8), (64, 192, 64, 64), (64, 768, 8, 8),
    ]  # fmt: skip
    compiled = torch.compile(group_norm_silu, dynamic=False, backend=target.backend)
    for shape, dtype, layout, form, step in target.combinations(
        shapes, target.dtypes, _layouts(), ("added", "adaptive"), STEPS
    ):
        groups = 1 if target.tiny else min(32, shape[1] // 4)
        size = "x".join(map(str, shape))
        x = target.normal(*shape, dtype=dtype).to(memory_format=layout)
        weight, bias = target.normal(shape[1], seed=1), target.normal(shape[1], seed=2)
        rows = [target.normal(*shape[:2], seed=3), target.normal(*shape[:2], seed=4)]
        inputs = [x, weight, bias, *(rows if form == "adaptive" else rows[:1])]
        dy = target.normal(*shape, dtype=dtype, seed=5) if step == "training" else None
        dy = None if dy is None else dy.to(memory_format=layout)

        def function(x, weight, bias, *rows, groups=groups, impl, op=group_norm_silu):
            scale, shift, added = (*rows, None) if len(rows) == 2 else (None, None, *rows)
            return op(x, groups, weight, bias, 1e-6, scale, shift, True, added, impl)

        def of(impl: str, inputs=inputs, dy=dy, function=function, op=group_norm_silu):
            return _with_gradients(partial(function, impl=impl, op=op), inputs, dy)

        ways = {"triton": of("triton")}
        # What PyTorch would be given: parameters of the map's dtype.
        same = [each.to(dtype) for each in inputs]
        ways["PyTorch eager"] = of("pytorch", inputs=same)
        ways["torch.compile"] = of("pytorch", inputs=same, op=compiled)
        group = x[0].numel() // groups
        passes = (2 if group <= WHOLE else 3) + (0 if dy is None else 3 if group <= WHOLE_BACKWARD else 5)
        yield Case(
            f"group_norm_silu {size} {_name(dtype)} {_layout(layout)} {form} {step}",
            ways,
            of("reference", inputs=[each.double() for each in inputs],
               dy=None if dy is None else dy.double()),
            "PyTorch eager",
            bytes=passes * x.numel() * dtype.itemsize,
        )  # fmt: skip


def _layout(layout: torch.memory_format) -> str:
    return "channels_last" if layout == torch.channels_last else "contiguous"


def attention_cases(target: Target) -> Iterator[Case]:
    """attention from 16 to 4096 tokens, heads of 16 to 512 channels; in float32 with IEEE and with TF32 products."""
    from diffmem.ops.attention import attention, preference
    from diffmem.ops.attention.tiles import precision_of

    # Images, heads, channels per head, side of the map.
    shapes = [(1, 1, 24, 4), (1, 2, 16, 5)] if target.tiny else [
        (256, 1, 256, 16), (256, 1, 256, 8), (256, 1, 64, 8), (256, 1, 32, 4), (64, 4, 64, 32), (64, 6, 64, 16),
        (64, 1, 512, 8), (64, 1, 512, 16), (16, 1, 256, 32), (8, 1, 128, 64), (8, 8, 64, 64), (256, 1, 16, 8),
    ]  # fmt: skip
    compiled = torch.compile(attention, dynamic=False, backend=target.backend)
    numbers = [
        (dtype, tf32) for dtype in target.dtypes for tf32 in (False, True) if not tf32 or dtype == torch.float32
    ]  # in a dry run TF32 is its tiles, in float32
    for shape, (dtype, tf32), layout, step in target.combinations(shapes, numbers, _layouts(), STEPS):
        batch, heads, channels, side = shape
        torch.backends.cuda.matmul.allow_tf32 = tf32
        qkv = target.normal(batch, 3 * heads * channels, side, side, dtype=dtype)
        qkv = qkv.to(memory_format=layout)
        dy = target.normal(batch, heads * channels, side, side, dtype=dtype, seed=1)
        dy = dy.to(memory_format=layout) if step == "training" else None

        def of(impl: str, qkv=qkv, dy=dy, heads=heads, op=attention):
            return _with_gradients(lambda qkv: op(qkv, heads, impl), [qkv], dy)

        ways = {"triton": of("triton"), "SDPA": of("pytorch"), "torch.compile": of("pytorch", op=compiled)}
        precision = precision_of(dtype)
        case = (qkv.device.type, qkv.device.index, side * side, heads, channels, dtype,
                _layout(layout), step == "training")  # fmt: skip

        def tune(seconds: dict[str, float], case=case):
            timed = {"triton": seconds["triton"], "pytorch": seconds["SDPA"]}
            preference.MEASURED.add(*preference.filed_under(*case), timed)

        tokens = side * side
        products = 2 if step == "inference" else 7  # of [tokens, tokens] and a head's channels
        moved = 4 if step == "inference" else 4 + 8
        yield Case(
            f"attention {batch}x{heads}x{channels} {side}x{side} {_name(dtype)} {precision} {_layout(layout)} {step}",
            ways,
            of("reference", qkv=qkv.double(), dy=None if dy is None else dy.double()),
            "SDPA",
            bytes=moved * batch * heads * channels * tokens * dtype.itemsize,
            operations=products * 2.0 * batch * heads * channels * tokens * tokens,
            matrix=f"{_name(dtype)} {precision}" if dtype == torch.float32 else _name(dtype),
            tune=tune,
        )
    torch.backends.cuda.matmul.allow_tf32 = False


def network_cases(target: Target) -> Iterator[Case]:
    """A whole network, forward and with the gradients of its weights: by our kernels, and by PyTorch's operations."""
    from diffmem.models import Denoiser, UNetConfig, preset
    from diffmem.models.config import DenoiserConfig
    from diffmem.models.preconditioning import EDM
    from diffmem.ops import attention, group_norm_silu

    if target.tiny:
        small = UNetConfig(8, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(8,), dropout=0)
        configs = {"small": (DenoiserConfig(small, EDM()), 1)}
    else:
        configs = {
            "ddpmpp_cifar10": (preset("ddpmpp_cifar10", dropout=0.0), 64),
            "ddpmpp_8": (preset("ddpmpp_8", dropout=0.0), 512),
            "adm_imagenet64": (preset("adm_imagenet64", dropout=0.0), 8),
        }

    # torch.compile takes what these return for a constant, as it does with the ops' own: no graph break.
    choices = {
        impl: torch.compiler.assume_constant_result(lambda *_, impl=impl: impl) for impl in ("pytorch", "reference")
    }

    @contextlib.contextmanager
    def by(impl: str | None):
        """Every op of the network by one implementation, None: as it chooses."""
        if impl is None:
            yield
            return
        with (
            mock.patch.object(group_norm_silu, "_choose", choices[impl]),
            mock.patch.object(attention, "_choose", choices[impl]),
        ):
            yield

    for name, (config, batch) in configs.items():
        for autocast in (None,) if target.tiny else (None, torch.bfloat16):
            torch.manual_seed(0)
            denoiser = Denoiser(config).to(target.device)
            with torch.no_grad():  # a fresh network's last layers are all but zero
                for parameter in denoiser.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
            denoiser.autocast_dtype = autocast
            network = config.network
            x = target.normal(batch, network.channels, network.resolution, network.resolution)
            sigma = target.normal(batch, seed=1).exp()

            def of(impl: str | None, model: Callable, denoiser=denoiser, x=x, sigma=sigma, training=False):
                def run() -> Values:
                    with by(impl), torch.set_grad_enabled(training):
                        y = model(x, sigma)
                        if not training:
                            return [y]
                        weights = [each for each in denoiser.parameters() if each.requires_grad]
                        grads = torch.autograd.grad(y.square().mean(), weights, allow_unused=True)
                        return [y.detach(), torch.cat([each.flatten() for each in grads if each is not None])]

                return run

            for training in (False, True):
                ways = {
                    "triton": of(None, denoiser, training=training),
                    "PyTorch eager": of("pytorch", denoiser, training=training),
                }
                torch._dynamo.reset()
                # With the interpreter's kernels inside, a dry run does it once.
                for name_of, impl in (("triton", None), ("PyTorch", "pytorch")) if training or not target.tiny else ():
                    model = torch.compile(denoiser, dynamic=False, fullgraph=True, backend=target.backend)
                    ways[f"{name_of}, compiled"] = of(impl, model, training=training)

                def exact(denoiser=denoiser, x=x, sigma=sigma, training=training, of=of) -> Values:
                    kept, denoiser.autocast_dtype = denoiser.autocast_dtype, None
                    try:
                        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                            return of("reference", denoiser.double(), x=x.double(), sigma=sigma, training=training)()
                    finally:
                        denoiser.float()
                        denoiser.autocast_dtype = kept

                step = "training" if training else "inference"
                number = "float32" if autocast is None else f"autocast {_name(autocast)}"
                yield Case(f"network {name} batch {batch} {number} {step}", ways, exact, "PyTorch eager",
                           capturable=False)  # fmt: skip


def search_cases(target: Target) -> Iterator[Case]:
    """The exact two nearest of uint8 images, by every backend of `diffmem.search.gpu`, and by FAISS and torch.cdist."""
    from diffmem.ops.nearest import nearest
    from diffmem.ops.nearest.cuda import refine_cuda
    from diffmem.ops.registry import native_unavailable
    from diffmem.search.gpu import GpuRows, available_backends

    def on_device(run: Callable[[], Values]) -> Callable[[], Values]:
        """As it is; in a dry run on the host stand-in, where there is one."""

        def by_the_stand_in() -> Values:
            with _stand_in():
                return run()

        return by_the_stand_in if target.tiny and _stand_in() is not None else run

    sizes = [(16, 200, 48)] if target.tiny else [(10_000, 50_000, 3072), (32, 50_000, 3072), (10_000, 50_000, 192)]
    for count, n, d in sizes:
        generator = torch.Generator().manual_seed(0)
        training = torch.randint(0, 256, (n, d), dtype=torch.uint8, generator=generator)
        queries = torch.randint(0, 256, (count, d), dtype=torch.uint8, generator=generator)
        queries[: count // 2] = training[: count // 2] // 2 + queries[: count // 2] // 2
        training, queries = training.to(target.device), queries.to(target.device)
        names = available_backends(target.device)
        if target.tiny and _stand_in() is not None:
            names.insert(0, "cuda")
        if "cuda" not in names:
            reason = "there is no g++ for the stand-in" if target.tiny else native_unavailable("cuda")
            print(f"search: the CUDA kernels are left out: {reason}")
        ways = {}
        for name in names:
            rows = GpuRows(training, target.device, name)
            ways[name] = on_device(lambda rows=rows, queries=queries: list(rows(queries, 2)))

        def cdist(queries=queries, training=training) -> Values:
            found = [
                torch.cdist(block.float(), training.float()).topk(2, largest=False) for block in queries.split(512)
            ]
            return [torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])]

        def exact(queries=queries, training=training) -> Values:
            return list(nearest(queries.cpu(), training.cpu(), 2, impl="torch"))

        yield Case(
            f"search {count} of {n}, d = {d}", ways | {"torch.cdist + topk": cdist} | _faiss_ways(queries, training),
            exact, next(iter(ways)), operations=2.0 * count * n * d, matrix="int8", capturable=False,
        )  # fmt: skip
        if "cuda" not in names:
            continue

        # Of each query, candidates as a filter leaves them: the answer among others.
        each = min(n, 300)
        candidates = torch.randint(0, n, (count, each), generator=generator)
        candidates[:, 0] = torch.arange(count) % n
        offsets = (torch.arange(count + 1) * each).to(target.device)
        candidates = candidates.to(target.device)

        def refine(queries=queries, training=training, candidates=candidates, offsets=offsets) -> Values:
            indices, squared = refine_cuda(queries, training, candidates.flatten(), offsets, 2)
            return [squared, indices]

        def by_pytorch(queries=queries, training=training, candidates=candidates) -> Values:
            found = []
            for query, listed in zip(queries, candidates, strict=True):
                listed = listed.unique()  # ascending: the first of equal ones is the lowest
                squared = (training[listed].int() - query.int()).square().sum(dim=1)
                best = squared.sort(stable=True)
                found.append((best.values[:2], listed[best.indices[:2]]))
            return [torch.stack([each[index].long() for each in found]) for index in range(2)]

        yield Case(
            f"refine {each} candidates of {n} for {count}, d = {d}",
            {"kernel": on_device(refine), "PyTorch eager": by_pytorch}, by_pytorch, "PyTorch eager",
            bytes=1.0 * count * each * d, capturable=False,
        )  # fmt: skip


@cache
def _core_of_the_stand_in():
    """The CUDA kernels as code for the CPU, or None where no compiler is found."""
    from benchmarks.host_core import build_core

    if shutil.which("g++") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return build_core(Path(folder) / "nearest.so")  # stays mapped when the file is gone


def _stand_in() -> contextlib.AbstractContextManager | None:
    """Puts the CUDA kernels onto the CPU while it lasts."""
    from benchmarks.host_core import on_the_stand_in

    core = _core_of_the_stand_in()
    return None if core is None else on_the_stand_in(core)


def _faiss_ways(queries: torch.Tensor, training: torch.Tensor) -> dict[str, Callable[[], Values]]:
    """FAISS's flat index as its users use it: on the GPU where this build has one, else on the CPU."""
    try:
        import faiss
    except ImportError:
        return {}
    index, name = faiss.IndexFlatL2(training.shape[1]), "faiss IndexFlatL2, CPU"
    if training.device.type == "cuda" and faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), training.device.index or 0, index)
        name = "faiss IndexFlatL2, GPU"
    index.add(training.float().cpu().numpy())
    values = queries.float().cpu().numpy()
    return {name: lambda: [torch.from_numpy(each) for each in index.search(values, 2)]}


def posterior_cases(target: Target) -> Iterator[Case]:
    """The posterior mean of uint8 rows whose spectrum is that of images, at high, middle and low noise."""
    from diffmem.ops.posterior_mean import PosteriorRows, blocked
    from diffmem.ops.posterior_mean.reference import posterior_mean_reference

    count, n, d = (5, 1100, 48) if target.tiny else (256, 50_000, 3072)
    factors = target.normal(n, 64) * torch.logspace(3.3, 2, 64, device=target.device)
    rows = 128 + factors @ target.normal(64, d, seed=1) / d**0.5 + 4 * target.normal(n, d, seed=2)
    rows = rows.round_().clip_(0, 255).to(torch.uint8)
    centre = rows.float().mean(dim=0, dtype=torch.float64).round().cpu()
    floats = rows.float() - centre.to(target.device).float()
    ready = {impl: PosteriorRows(rows, centre, target.device, impl=impl) for impl in ("triton", "torch")}
    for sigma, tolerance in product((2000.0, 200.0, 2.0), (1e-3, 1e-5)):
        x = rows[:count].double() + sigma * target.normal(count, d, seed=3)
        levels = torch.full((count,), sigma, dtype=torch.float64, device=target.device)

        def direct(x=x, sigma=sigma) -> Values:
            queries = x.float() - centre.to(x.device).float()
            weights = torch.softmax(torch.cdist(queries, floats).square_().mul_(-0.5 / sigma**2), dim=1)
            return [weights @ floats]

        def by(impl: str, x=x, levels=levels, tolerance=tolerance) -> Values:
            with mock.patch.object(blocked, "SMALL", 0):  # what is tiny would not reach the kernels
                return [ready[impl].mean(x, levels, tolerance).mean - centre.to(x.device)]

        def exact(x=x, levels=levels) -> Values:
            return [posterior_mean_reference(x, levels, rows)[0] - centre.to(x.device)]

        yield Case(
            f"posterior mean of {n} rows, d = {d}, {count} queries, sigma {sigma:g}, tolerance {tolerance:g}",
            {"triton": partial(by, "triton"), "PyTorch in blocks": partial(by, "torch"), "cdist, softmax": direct},
            exact, "cdist, softmax", operations=4.0 * count * n * d, matrix="float32", capturable=False,
            tolerance=tolerance,
        )  # fmt: skip


SUBJECTS: tuple[Callable[[Target], Iterator[Case]], ...] = (
    group_norm_cases,
    attention_cases,
    posterior_cases,
    search_cases,
    network_cases,
)


def measured_rates(device: torch.device, tiny: bool) -> dict[str, float]:
    """Per second: bytes read and written by a large copy, operations of large matrix products by dtype."""
    size = 1 << (16 if tiny else 28)
    source, to = (torch.ones(size, dtype=torch.float32, device=device) for _ in range(2))
    rates = {"bytes": 2 * 4 * size / _seconds({"copy": lambda: to.copy_(source)}, device)["copy"]}
    side = 128 if tiny else 8192
    kinds = {"float32 ieee": (torch.float32, False)}
    if device.type == "cuda":
        kinds |= {"float32 tf32": (torch.float32, True), "bfloat16": (torch.bfloat16, False)}
    kinds["float16"] = (torch.float16, False)
    for name, (dtype, tf32) in kinds.items():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a = torch.randn(side, side, device=device).to(dtype)
        rates[name] = 2.0 * side**3 / _seconds({"matmul": lambda a=a: a @ a}, device)["matmul"]
    torch.backends.cuda.matmul.allow_tf32 = False
    a = torch.ones(side, side, dtype=torch.int8, device=device)
    rates["int8"] = 2.0 * side**3 / _seconds({"matmul": lambda: torch._int_mm(a, a.t())}, device)["matmul"]
    return rates


def _seconds(ways: dict[str, Callable[[], object]], device: torch.device, repeats: int = REPEATS) -> dict[str, float]:
    """The median seconds of each way, taken in turns, each often enough to be measured."""
    once = seconds_of(ways, device)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            runs = max(1, min(200, round(LEAST_SECONDS / max(once[name], 1e-7))))
            times[name].append(seconds_of({name: run}, device, runs=runs)[name])
    return {name: statistics.median(each) for name, each in times.items()}


def _timed(case: Case) -> tuple[Case, dict[str, float]]:
    """The case, and the seconds that the latest run of each of its ways took."""
    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Values]) -> Callable[[], Values]:
        def clocked() -> Values:
            started = time.perf_counter()
            answer = run()
            seconds[name] = time.perf_counter() - started
            return answer

        return clocked

    return replace(case, ways={name: timed(name, run) for name, run in case.ways.items()}), seconds


def errors(case: Case) -> list[str]:
    """What is wrong with the answers of our ways, each in one line."""
    exact = case.exact()
    answers = {name: run() for name, run in case.ways.items()}
    ours = next(iter(case.ways))
    wrong = []
    for name, found in answers.items():
        if exact[0].dtype == torch.int64:  # integers: FAISS and cdist round, and are not held to it
            if name in ("cuda", "kernel", "int8", "faiss"):
                wrong += [
                    f"{name} is not exact"
                    for a, b in zip(found, exact, strict=True)
                    if not torch.equal(a.cpu(), b.cpu())
                ]
            continue
        if not name.startswith("triton"):
            continue
        if case.tolerance is not None:
            gap = max(float(((a - b).norm(dim=1) / b.norm(dim=1)).max()) for a, b in zip(found, exact, strict=True))
            if not gap <= case.tolerance:
                wrong.append(f"{name} is off by {gap:.2e}, allowed {case.tolerance:.2e}")
            continue
        for index, (a, plain, b) in enumerate(zip(found, answers[case.plain], exact, strict=True)):
            floor = {torch.float32: TF32_FLOOR if " tf32 " in case.name else FLOAT_FLOOR}.get(a.dtype, HALF_FLOOR)
            if "network" in case.name:
                floor = TF32_FLOOR  # cuDNN's convolutions choose their algorithm
            allowed = 2 * (plain - b).abs().max() + floor * torch.finfo(a.dtype).eps * b.abs().max()
            if not (error := (a - b).abs().max()) <= allowed:
                wrong.append(f"{name}: output {index} is off by {error:.2e}, allowed {allowed:.2e}")
    if "triton" in ours and "network" not in case.name:
        again = case.ways[ours]()
        if not all(torch.equal(a, b) for a, b in zip(answers[ours], again, strict=True)):
            wrong.append(f"{ours}: two runs differ")
        if case.capturable and answers[ours][0].device.type == "cuda":
            wrong += _captured(case.ways[ours], answers[ours])
    return wrong


def _captured(run: Callable[[], Values], expected: Values) -> list[str]:
    """Runs it inside a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    torch.cuda.synchronize()
    if all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
        return []
    return ["under a CUDA graph the result differs"]


def measure(case: Case, target: Target, bench: Bench) -> list[str]:
    """Checks, times, tunes, and adds a row per way; returns what is wrong."""
    case, seconds = _timed(case)
    if wrong := errors(case):
        return [f"{case.name}: {each}" for each in wrong]
    if not target.tiny:
        seconds = _seconds(case.ways, target.device)
    if case.tune is not None and not target.tiny:
        case.tune(seconds)
    first = next(iter(seconds.values()))
    for name, each in seconds.items():
        notes = []
        if case.bytes:
            notes.append(f"{case.bytes / each / target.rates['bytes']:.0%} of the copy's bytes/s")
        if case.operations and case.matrix in target.rates:
            notes.append(f"{case.operations / each / target.rates[case.matrix]:.0%} of the matrix rate")
        bench.record(
            case.name, name, ", ".join(notes), seconds=f"{each:.4g}", repeats=str(1 if target.tiny else REPEATS),
            ratio=f"{each / first:.4g}", machine=bench.subject,
        )  # fmt: skip
    bench.write()
    return []


@dataclass
class DeviceBench(Bench):
    """The table of one device, named after it."""

    folder: Path = RESULTS

    @property
    def path(self) -> Path:
        name = re.sub(r"[^a-z0-9]+", "-", self.subject.lower()).strip("-")
        return self.folder / f"{name}{'.quick' if self.quick else ''}.csv"


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--interpret", is_flag=True, help="Dry run on the CPU: tiny sizes, kernels in Triton's interpreter.")
@click.option("--device", default="cuda", help="The GPU to use.")
@click.option("--only", default="", help="Only cases whose name contains this text.")
@click.option("--results", default=RESULTS, type=click.Path(path_type=Path), help="Where the table goes.")
def main(interpret: bool, device: str, only: str, results: Path) -> None:
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        target_device, name = torch.device("cpu"), "dry run of the GPU benchmark"
    else:
        if not torch.cuda.is_available():
            raise click.ClickException("no GPU here; --interpret makes a dry run on the CPU")
        target_device = torch.device(device if ":" in device else f"{device}:0")
        torch.cuda.set_device(target_device)
        name = torch.cuda.get_device_name(target_device)
    bench = DeviceBench(name, quick=interpret, only=only, folder=results)
    rates = measured_rates(target_device, tiny=interpret)
    for kind, rate in rates.items():
        bench.record(
            "device", kind, "bytes/s" if kind == "bytes" else "operations/s", ratio=f"{rate:.4g}", machine=name
        )
    target = Target(target_device, interpret, rates)
    wrong = []
    for cases in SUBJECTS:
        for case in cases(target):
            if bench.wants(case.name):
                wrong += measure(case, target, bench)
    bench.write()
    print(f"wrote {bench.path}", file=sys.stderr)
    if wrong:
        raise click.ClickException("wrong answers\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
