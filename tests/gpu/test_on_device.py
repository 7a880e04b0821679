"""Everything that runs on a GPU, on a GPU, against its reference: `pytest -m gpu`, under two minutes.

Without a GPU these are skipped. DIFFMEM_GPU_TESTS=interpret runs the same lines on the CPU, Triton kernels in its
interpreter (as a dry run of the GPU benchmark does, in a process of its own): no CUDA graphs, no generated code, few
and small shapes.
"""

from __future__ import annotations

import contextlib
import os
from functools import partial
from importlib.util import find_spec

import numerics
import numpy as np
import pytest
import torch
from numerics import (
    TF32,
    approximately,
    assert_close,
    assert_log_sums,
    assert_relative,
)
from triton_interpreter import why_not

import diffmem
from benchmarks.gpu.networks import by
from diffmem.data import ImageSet
from diffmem.devices import pick_device
from diffmem.models import Denoiser, DenoiserConfig, UNetConfig
from diffmem.models.preconditioning import VP
from diffmem.ops.attention import attention
from diffmem.ops.group_norm_silu import group_norm_silu
from diffmem.ops.nearest import nearest
from diffmem.ops.posterior_mean import PosteriorRows, blocked
from diffmem.ops.posterior_mean.reference import posterior_mean_reference
from diffmem.optimum import OptimalDenoiser
from diffmem.precision import float32_products, measured_convolutions
from diffmem.sampling import sample_latents
from diffmem.search.gpu import GpuRows, available_backends
from diffmem.training import TrainingConfig
from diffmem.training.trainer import Trainer

DRY = os.environ.get("DIFFMEM_GPU_TESTS") == "interpret"
DEVICE = torch.device("cpu" if DRY else "cuda")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not DRY and not torch.cuda.is_available(),
        reason="there is no GPU here (DIFFMEM_GPU_TESTS=interpret runs the same lines on the CPU)",
    ),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # of the interpreter's sigmoid
]
TRITON = (why_not() if DRY else None) or (None if find_spec("triton") else "no triton here")
needs_triton = pytest.mark.skipif(TRITON is not None, reason=str(TRITON))
needs_graphs = pytest.mark.skipif(DRY, reason="CUDA graphs need a GPU")


@pytest.fixture(autouse=True)
def _float32_is_float32():
    with float32_products("ieee"):
        yield


def normal(*shape, dtype=F32, seed=0, device=DEVICE):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(device, dtype)


def values_and_gradients(function, tensors, dy, dtype, impl):
    """y and the gradient of each tensor that is there, everything in `dtype` (None: as it comes)."""
    leaves = [None if each is None else each.detach().to(dtype or each.dtype).requires_grad_() for each in tensors]
    y = function(*leaves, impl)
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy.to(y.dtype))]


def assert_as_exact(function, tensors, dy, dtype, rounding=1.0):
    """The rule of numerics.py, for the result and its gradients; the same bits twice. rounding: of the products, in
    times of the dtype's."""
    exact = values_and_gradients(function, tensors, dy, torch.float64, "reference")
    plain = values_and_gradients(function, tensors, dy, dtype, "torch")
    found = values_and_gradients(function, tensors, dy, None, "triton")
    numerics.assert_as_exact("on a device", found, plain, exact, rounding)
    again = values_and_gradients(function, tensors, dy, None, "triton")
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    return found


# Images, heads, channels of a head, side of the map: DDPM++, ADM, odd sizes, wide heads.
HEADS = [(1, 2, 24, 5)] if DRY else [(2, 1, 256, 16), (2, 6, 64, 8), (2, 4, 64, 32), (1, 2, 24, 5), (1, 1, 512, 8)]
FEW_HEADS = HEADS[:1] if DRY else [HEADS[0], HEADS[3]]
ATTENTIONS = [
    *((shape, BF16, "ieee", "channels_last") for shape in HEADS), (HEADS[-1], BF16, "ieee", "contiguous"),
    *((shape, F32, "tf32", "channels_last") for shape in FEW_HEADS),
    *((shape, F32, "ieee", "channels_last") for shape in FEW_HEADS), (FEW_HEADS[-1], F32, "ieee", "contiguous"),
    *((shape, F16, "ieee", "channels_last") for shape in FEW_HEADS),
]  # fmt: skip


@needs_triton
@pytest.mark.parametrize(("shape", "dtype", "precision", "layout"), ATTENTIONS, ids=str)
def test_attention(shape, dtype, precision, layout):
    if DRY and dtype == BF16:
        pytest.skip("the interpreter's bfloat16 products are wrong")
    batch, heads, channels, side = shape
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    qkv = normal(batch, 3 * heads * channels, side, side, dtype=dtype).to(memory_format=format)
    dy = normal(batch, heads * channels, side, side, dtype=dtype, seed=1).to(memory_format=format)
    with float32_products(precision):
        rounding = TF32 if precision == "tf32" else 1.0
        assert_as_exact(lambda qkv, impl: attention(qkv, heads, impl), [qkv], dy, dtype, rounding)


# Maps with groups that fit on chip and that do not; groups 6, 8, 24 and 32 channels wide, of even and odd sizes.
MAPS = [((1, 8, 4, 4), 2), ((1, 32, 17, 16), 1)] if DRY else [
    ((4, 256, 32, 32), 32), ((2, 192, 64, 64), 32), ((4, 768, 8, 8), 32), ((2, 32, 17, 16), 1), ((2, 5, 65, 63), 1),
]  # fmt: skip
FORMS = ("added", "adaptive")
NORMS = [
    (shape, groups, dtype, form, layout)
    for index, (shape, groups) in enumerate(MAPS)
    for number, dtype in enumerate((F32, F16) if DRY else (BF16, F32, F16))
    for form, layout in [((index + number) % 2, 1), (number % 2, index % 2)][: 1 if DRY or dtype == F16 else 2]
]


@needs_triton
@pytest.mark.parametrize(("shape", "groups", "dtype", "form", "layout"), NORMS, ids=str)
def test_group_norm(shape, groups, dtype, form, layout):
    format = (torch.contiguous_format, torch.channels_last)[layout]
    channels = shape[1]
    x = normal(*shape, dtype=dtype).to(memory_format=format)
    scale, shift = (normal(shape[0], channels, seed=each) if form else None for each in (1, 2))
    added = None if form else normal(shape[0], channels, seed=3)
    tensors = [x, normal(channels, seed=4), normal(channels, seed=5), scale, shift, added]

    def function(x, weight, bias, scale, shift, added, impl):
        return group_norm_silu(x, groups, weight, bias, 1e-5, scale, shift, True, added, impl)

    assert_as_exact(function, tensors, normal(*shape, seed=6, dtype=dtype).to(memory_format=format), dtype)


def images_like(n, d):
    """uint8 rows in clusters, so that at low noise most of them have no weight."""
    rows = 128 + 4 * normal(n, d) + 90 * torch.tanh(normal(n // 700 + 1, d, seed=1)).repeat_interleave(700, 0)[:n]
    return rows.round().clip(0, 255).to(torch.uint8)


@needs_triton
@pytest.mark.parametrize("tolerance", [1e-5] if DRY else [1e-3, 1e-5])
@pytest.mark.parametrize("queries", [5] if DRY else [5, 70])
def test_posterior_mean(queries, tolerance, monkeypatch):
    monkeypatch.setattr(blocked, "SMALL", 0)
    y = images_like(1500 if DRY else 5000, 48 if DRY else 768)
    center = y.double().mean(dim=0).round()
    ready = PosteriorRows(y, center.cpu(), DEVICE, impl="triton")
    for sigma in (300.0, 6.0):
        x = y[:queries].double() + sigma * normal(queries, y.shape[1], seed=2, dtype=torch.float64)
        levels = torch.full((queries,), sigma, dtype=torch.float64, device=DEVICE)
        expected, log_sum, _ = posterior_mean_reference(x, levels, y)
        found = ready.mean(x, levels, tolerance)
        error = (found.mean - expected).norm(dim=1) / expected.norm(dim=1)
        assert float(error.max()) <= tolerance
        assert_log_sums(found.log_sum, log_sum, tolerance)


@pytest.mark.parametrize("k", [1, 2, 40, 70])
def test_search_of_bytes(k):
    """By every backend that this device has; the kernel itself takes up to 64 neighbors, and hands larger k on."""
    random = np.random.default_rng(k)
    n, q, d = (90, 9, 33) if DRY else (5000, 300, 200)
    training = torch.from_numpy(random.choice(np.array([0, 1, 127, 128, 254, 255], np.uint8), (n, d)))
    queries = torch.cat([training[: q // 3], torch.from_numpy(random.integers(0, 256, (q - q // 3, d), np.uint8))])
    squared, indices = nearest(queries, training, k, impl="reference")
    backends = available_backends(DEVICE)
    assert "int8" in backends
    for backend in backends:
        found = GpuRows(training, DEVICE, backend)(queries.to(DEVICE), k)
        assert torch.equal(found[0].cpu(), squared), backend
        assert torch.equal(found[1].cpu(), indices), backend


def test_the_search_kernel_is_there():
    if DRY:
        pytest.skip("the CUDA kernels need a GPU; their source runs on the host in tests/csrc")
    assert "cuda" in available_backends(DEVICE), diffmem.ops.registry.build_info()


def test_search_of_vectors():
    n, q, d = (200, 7, 20) if DRY else (4000, 100, 384)
    training, queries = normal(n, d, device="cpu"), normal(q, d, seed=1, device="cpu")
    squared, indices = nearest(queries, training, 3, impl="reference")
    for backend in available_backends(DEVICE, F32):
        found = GpuRows(training, DEVICE, backend)(queries.to(DEVICE), 3)
        assert_close("float distances of a device", found[0].cpu().double(), squared.double())
        assert torch.equal(found[1].cpu(), indices), backend


def ops_at_work():
    """(name, a function without arguments) of each op, forward and backward, by its kernels."""
    x = normal(2, 32, 16, 16, dtype=F16).to(memory_format=torch.channels_last)
    qkv = normal(2, 3 * 32, 4, 4, dtype=F16).to(memory_format=torch.channels_last)
    weight = normal(32)

    def norm(x, weight, impl):
        return group_norm_silu(x, 8, weight, weight, 1e-5, impl=impl)

    yield "group_norm_silu", partial(values_and_gradients, norm, [x, weight], x, None, "triton")
    yield (
        "attention",
        partial(values_and_gradients, lambda qkv, impl: attention(qkv, 1, impl), [qkv], qkv[:, :32], None, "triton"),
    )


@needs_triton
@needs_graphs
def test_cuda_graphs():
    from benchmarks.gpu.timing import captured

    for name, run in ops_at_work():
        expected, kept = run(), []
        captured([lambda kept=kept, run=run: kept.append(run())])()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(kept[-1], expected, strict=True)), name


@needs_triton
def test_streams():
    """On a stream of its own, after long work on it, the ops wait for that work and no other."""
    for name, run in ops_at_work():
        expected = run()
        stream = contextlib.nullcontext() if DRY else torch.cuda.stream(torch.cuda.Stream())
        with stream:
            found = run()
            if not DRY:
                torch.cuda.current_stream().synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name


SIDE = 4 if DRY else 8


def small(**changes) -> DenoiserConfig:
    values = {"model_channels": 32, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (SIDE,), "dropout": 0.0}
    if DRY:
        values["model_channels"] = 8
    return DenoiserConfig(UNetConfig(SIDE, **{**values, **changes}), VP())


@pytest.mark.skipif(DRY and TRITON is not None, reason=str(TRITON))
def test_compiled_sampler(monkeypatch):
    """The whole network and its step in one graph, replayed as a CUDA graph, against eager on the CPU."""
    if DRY:
        whole = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function, **_: whole(function, backend="eager", fullgraph=True))
    torch.manual_seed(0)
    denoiser = Denoiser(small()).eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    steps = 2 if DRY else 3
    latents = normal(1 if DRY else 4, 3, SIDE, SIDE, dtype=torch.float64, device="cpu")
    with by("PyTorch's"):
        expected = sample_latents(denoiser, latents, steps=steps)
    denoiser.to(DEVICE)
    for compiled in (True,) if DRY else (False, True):
        for _ in range(1 if DRY else 2):  # the second replays
            found = sample_latents(denoiser, latents.to(DEVICE), steps=steps, compiled=compiled).cpu()
            assert_relative("a sampler on a device", found, expected)


def trained(device, steps=1 if DRY else 2, graph=False, **changes):
    images = np.random.default_rng(0).integers(0, 256, (40, 3, SIDE, SIDE), dtype=np.uint8)
    config = TrainingConfig(small(), images=1000, batch=1 if DRY else 8, warmup_epochs=0, **changes)
    with contextlib.ExitStack() as stack:
        trainer = Trainer(config, ImageSet(images), device, compile=False)
        trainer.enter(stack)
        trainer.cuda_graph = graph
        # What differs from device to device: the generators.
        trainer.generator = torch.Generator(device)
        for _ in range(steps):
            trainer.step()
        return trainer.mean_losses()[0], trainer.flat.values.detach().clone()


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"][: 1 if DRY else 3])
@pytest.mark.skipif(DRY and TRITON is not None, reason=str(TRITON))
def test_two_training_steps(precision, monkeypatch):
    """On the device against the CPU in float32, with the same noise."""
    from diffmem.training import trainer

    draw = trainer.draw

    def drawn_on_the_cpu(preconditioning, shape, device="cpu", generator=None):
        chance = torch.Generator().manual_seed(0 if generator is None else generator.initial_seed() % 2**31)
        return type(made := draw(preconditioning, shape, "cpu", chance))(*(each.to(device) for each in made))

    monkeypatch.setattr(trainer, "draw", drawn_on_the_cpu)
    with by("PyTorch's"):
        expected, _ = trained("cpu")
    loss, values = trained(DEVICE, precision=precision)
    assert loss == approximately(f"losses of a device, {precision}", expected)
    assert values.dtype == F32
    assert bool(values.isfinite().all())


@needs_graphs
def test_training_by_a_cuda_graph():
    """The same steps, replayed; cuDNN is to choose the same algorithms."""
    with measured_convolutions(torch.device("cpu")):
        sgd = {"steps": 4, "optimizer": "sgd", "lr": 1e-3}  # Adam makes a whole step of a rounding
        loss, values = trained(DEVICE, **sgd)
        graphed_loss, graphed = trained(DEVICE, graph=True, **sgd)
    assert graphed_loss == approximately("losses by a CUDA graph", loss)
    assert_close("weights after training by a CUDA graph", graphed, values)


def test_audit():
    training = np.random.default_rng(0).integers(0, 256, (300, 3, 8, 8), dtype=np.uint8)
    generated = np.concatenate([training[:20] ^ 1, training[20:40, ::-1], 255 - training[40:60]])
    expected = diffmem.audit(generated, training, device="cpu")
    found = diffmem.audit(generated, training, device=str(DEVICE))
    assert np.array_equal(found.memorized, expected.memorized)
    assert np.array_equal(found.neighbors.indices, expected.neighbors.indices)
    assert np.array_equal(found.neighbors.squared_distances, expected.neighbors.squared_distances)
    assert 20 <= found.memorized.sum() < 60


@pytest.mark.parametrize("labels", [False, True])
def test_optimum(labels):
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (60 if DRY else 3000, 3, 8, 8), dtype=np.uint8)
    training = ImageSet(images, labels=np.arange(len(images)) % 5 if labels else None)
    exact = OptimalDenoiser(training, device="cpu", impl="reference")
    ours = OptimalDenoiser(training, device=str(DEVICE), tolerance=1e-5)
    classes = torch.arange(8) % 5 if labels else None
    for sigma in (0.05, 1.0, 20.0):
        x = torch.from_numpy(images[:8] / 127.5 - 1) + sigma * normal(8, 3, 8, 8, dtype=torch.float64, device="cpu")
        expected = exact(x, sigma, classes).double()
        found = ours(x.to(DEVICE), sigma, None if classes is None else classes.to(DEVICE)).cpu().double()
        assert_relative("the optimal denoiser on a device", found, expected)


def test_auto_means_the_gpu(monkeypatch):
    monkeypatch.delenv("DIFFMEM_DEVICE", raising=False)
    assert pick_device("auto").type == DEVICE.type
