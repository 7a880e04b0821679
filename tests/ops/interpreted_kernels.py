"""The Triton kernels' values and gradients, run on the CPU by Triton's interpreter; `test_triton.py` starts this file.

It needs a process of its own: TRITON_INTERPRET=1 must be there before triton is imported, and a load outside of an
array ends the process. Memory is full of NaN before the kernels get it. Not checked here: a dot product of bfloat16,
which triton 3.9's interpreter gets silently wrong, and races, since it runs one program after the other.
"""

from __future__ import annotations

from functools import partial

import golden_networks
import numerics
import numpy as np
import pytest
import torch
from golden_networks import golden_denoiser
from numerics import assert_close, assert_log_sums, assert_relative

from benchmarks import kernel_traffic
from benchmarks.kernel_traffic import Case
from diffmem.errors import InputError
from diffmem.models.blocks import BlockStyle, UNetBlock
from diffmem.ops.attention import attention
from diffmem.ops.group_norm_silu import group_norm_silu
from diffmem.ops.posterior_mean import PosteriorRows, blocked
from diffmem.ops.posterior_mean.reference import posterior_mean_reference
from diffmem.ops.posterior_mean.triton_kernels import launch_weighted_sums

exhaustive = pytest.mark.exhaustive
HALVES = [torch.float16, torch.bfloat16]
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # of sigmoid(−100), as meant
    # What the interpreter of Triton 3.2 does with numpy of today.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _nan_in_new_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    if layout == "every other image":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=1).flatten(0, 1)[::2]
    return x


def values_and_gradients(function, tensors, dy, dtype, impl):
    """y and the gradient of each tensor that is there, everything computed in `dtype` (None: as it comes)."""
    leaves = [None if each is None else each.detach().to(dtype or each.dtype).requires_grad_() for each in tensors]
    y = function(*leaves, impl)
    return [y, *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy.to(y.dtype))]


def assert_as_exact(name, function, tensors, dy, dtype):
    """The rule of numerics.py, for the result and its gradients, which are returned."""
    exact = values_and_gradients(function, tensors, dy, torch.float64, "reference")
    plain = values_and_gradients(function, tensors, dy, dtype, "torch")
    found = values_and_gradients(function, tensors, dy, None, "triton")
    numerics.assert_as_exact(name, found, plain, exact)
    return found


# Maps of one tile and, the last ones, of several; groups of 3 to 42 channels, aligned or not; sizes at the edges.
SHAPES = [
    ((2, 12, 5, 7), 3), ((3, 40, 3, 3), 10), ((2, 3, 8, 8), 1), ((1, 64, 1, 1), 16), ((2, 48, 8, 17), 8),
    ((1, 32, 17, 16), 1), ((2, 5, 23, 13), 1), ((1, 84, 9, 8), 2), ((1, 128, 9, 3), 2),
]  # fmt: skip


LAYOUTS = ["contiguous", "channels_last", "strided", "every other image"]


@pytest.mark.parametrize(("shape", "groups", "layout"), [
    # Every shape, and every layout with a map of one tile and of several; channels_last, as networks have it, often.
    pytest.param(*case, layout, marks=() if number == index % 4 or (number, index % 2) == (1, 0) else exhaustive)
    for index, case in enumerate(SHAPES) for number, layout in enumerate(LAYOUTS)
])  # fmt: skip
def test_group_norm(shape, groups, layout):
    options = SHAPES.index((shape, groups)) + len(layout)  # every option with every layout and kind of tile, in turn
    adaptive, silu, rows = options % 2 == 0, options % 3 != 0, shape[0] if options % 5 else 1
    mean = 300.0 if options % 4 < 2 else 0.0
    channels = shape[1]
    x = laid_out(normal(*shape) + mean, layout)
    scale, shift = (normal(rows, channels, seed=each) for each in (1, 2)) if adaptive else (None, None)
    added = normal(rows, channels, seed=3) if options % 2 or options % 3 else None
    tensors = [x, normal(channels, seed=4), normal(channels, seed=5), scale, shift, added]

    def function(x, weight, bias, scale, shift, added, impl):
        return group_norm_silu(x, groups, weight, bias, 1e-5, scale, shift, silu, added, impl)

    y, dx, *_ = assert_as_exact("group_norm_silu", function, tensors, normal(*shape, seed=6), torch.float32)
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "groups"), [((2, 32, 4, 8), 8), ((1, 32, 17, 16), 1)])
def test_group_norm_in_half_precision(shape, groups, dtype):
    """As under autocast: the map is half, parameters are float32, what a linear layer made is half."""
    channels = shape[1]
    scale, shift, added = (normal(shape[0], channels, seed=each, dtype=dtype) for each in (1, 2, 3))
    x = normal(*shape, dtype=dtype).to(memory_format=torch.channels_last)
    tensors = [x, normal(channels, seed=4), normal(channels, seed=5), scale, shift, added]

    def function(x, weight, bias, scale, shift, added, impl):
        return group_norm_silu(x, groups, weight, bias, 1e-5, scale, shift, True, added, impl)

    found = assert_as_exact("group_norm_silu", function, tensors, normal(*shape, seed=6, dtype=dtype), dtype)
    assert [each.dtype for each in found] == [dtype, dtype, torch.float32, torch.float32, dtype, dtype, dtype]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 16, 5, 5), (1, 32, 17, 16)])
def test_group_norm_of_constants_is_the_bias(shape, layout):
    bias = normal(shape[1])
    x = laid_out(torch.full(shape, 7.1), layout)
    y = group_norm_silu(x, 1, torch.ones(shape[1]), bias, 1e-6, silu=False, impl="triton")
    assert_close("group_norm_silu of constants, one eps of 1e-6", y, bias.reshape(1, -1, 1, 1).expand(shape))


def test_group_norm_twice_gives_the_same_bits():
    x, w = normal(3, 32, 17, 16).requires_grad_(), normal(32).requires_grad_()
    runs = []
    for _ in range(2):
        y = group_norm_silu(x, 1, w, w, 1e-5, impl="triton")
        runs.append([y, *torch.autograd.grad(y.square().sum(), (x, w))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (2, 32, 17, 16)])
def test_group_norm_beyond_two_to_the_31(shape, tmp_path):
    """Images 2^31 elements apart, in a sparse file: 32-bit offsets would read elsewhere."""
    apart = 2**31
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(4 * (apart + 2**20))
    memory = torch.from_file(str(path), shared=True, size=apart + 2**20, dtype=torch.float32)
    x = memory.as_strided(shape, (apart, shape[2] * shape[3], shape[3], 1))
    x.copy_(normal(*shape))
    w = normal(shape[1])
    torch.testing.assert_close(
        group_norm_silu(x, 1, w, w, 1e-5, impl="triton"), group_norm_silu(normal(*shape), 1, w, w, 1e-5, impl="triton")
    )


def test_group_norm_refuses_and_passes_on():
    x, w = normal(1, 4, 2, 2, dtype=torch.float64), normal(4, dtype=torch.float64)
    with pytest.raises(InputError, match="float64 is not"):
        group_norm_silu(x, 1, w, w, 1e-5, impl="triton")
    wide = normal(1, 130, 1, 1)
    with pytest.raises(InputError, match="groups of 130 channels"):
        group_norm_silu(wide, 1, normal(130), normal(130), 1e-5, impl="triton")
    assert group_norm_silu(x, 1, w, w, 1e-5).dtype == torch.float64  # by PyTorch
    assert group_norm_silu(wide[:0], 10, normal(130), normal(130), 1e-5, impl="triton").shape == (0, 130, 1, 1)
    empty = normal(0, 8, 2, 2).requires_grad_()
    weight = normal(8).requires_grad_()
    y = group_norm_silu(empty, 2, weight, weight, 1e-5, impl="triton")
    assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], torch.zeros(8))


def test_group_norm_op_is_well_registered():
    shape = (2, 8, 3, 3)
    w, rows = normal(shape[1]).requires_grad_(), normal(shape[0], shape[1]).requires_grad_()
    x = normal(*shape).to(memory_format=torch.channels_last).requires_grad_()
    torch.use_deterministic_algorithms(False)  # opcheck runs ops that have no deterministic form
    torch.library.opcheck(torch.ops.diffmem.group_norm_silu_triton, (x, 1, w, w, 1e-5, rows, rows, True, rows))
    torch.library.opcheck(
        torch.ops.diffmem.group_norm_silu_triton, (x.detach(), 1, w.detach(), w.detach(), 1e-5, None, None, False, None)
    )


def test_kernels_fill_what_they_own():
    """Nothing is written outside of the outputs: the arrays around them keep their bits."""
    from diffmem.ops.group_norm_silu import triton_kernels

    made, empty = [], torch.empty

    def guarded(shape, **options):
        size = int(np.prod(shape))
        memory = empty((size + 64,), **options).fill_(12345.0)
        made.append((memory, size))
        return memory[:size].view(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", guarded)
        patch.setattr(triton_kernels, "_empty_like", lambda x: guarded(x.shape, dtype=x.dtype))
        for shape in [(33, 12, 3, 5), (1, 34, 33, 31)]:
            x, w = normal(*shape), normal(shape[1])
            y, mean, rstd = triton_kernels.launch_forward(x, 2, w, w, 1e-5, None, None, True, None)
            triton_kernels.launch_backward(y, x, mean, rstd, 2, w, w, None, None, True, None)
    assert len(made) >= 9
    for memory, size in made:
        assert (memory[size:] == 12345.0).all()


# One token, edges of the tiles (16 and 64 tokens, 16 to 64 channels), several rounds and parts of channels.
@pytest.mark.parametrize(
    ("shape", "heads", "layout"),
    [
        ((2, 48, 4, 4), 1, "channels_last"), ((2, 90, 3, 5), 5, "strided"), ((2, 30, 3, 5), 1, "every other image"),
        ((1, 12, 1, 1), 2, "contiguous"), pytest.param((1, 120, 5, 13), 1, "contiguous", marks=exhaustive),
        ((1, 120, 5, 13), 1, "channels_last"), ((1, 51, 9, 7), 1, "channels_last"),
    ],
)  # fmt: skip
def test_attention(shape, heads, layout):
    qkv = laid_out(normal(*shape), layout)
    dy = normal(shape[0], shape[1] // 3, *shape[2:], seed=1)
    y, dqkv = assert_as_exact("attention", lambda qkv, impl: attention(qkv, heads, impl), [qkv], dy, torch.float32)
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert dqkv.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(1, 3 * 136, 3, 6), (2, 96, 5, 4)])
def test_attention_in_half_precision(shape):
    """float16 only: the interpreter's bfloat16 products are wrong."""
    qkv = normal(*shape, dtype=torch.float16).to(memory_format=torch.channels_last)
    dy = normal(shape[0], shape[1] // 3, *shape[2:], seed=1, dtype=torch.float16)
    y, dqkv = assert_as_exact("attention", lambda qkv, impl: attention(qkv, 1, impl), [qkv], dy, torch.float16)
    assert y.dtype == dqkv.dtype == torch.float16


def test_attention_tf32_tiles(monkeypatch):
    """The tiles of TF32, whose products the interpreter forms in float32."""
    from diffmem.ops.attention import triton_kernels

    monkeypatch.setattr(triton_kernels, "precision_of", lambda dtype: "tf32")
    qkv, dy = normal(1, 3 * 72, 5, 4), normal(1, 72, 5, 4, seed=1)
    assert_as_exact("attention", lambda qkv, impl: attention(qkv, 1, impl), [qkv], dy, torch.float32)


def test_attention_of_large_and_equal_scores():
    """Scores of ±2500 leave one weight each, equal ones the mean; no power overflows, nothing is divided by zero."""
    sharp = 50 * normal(1, 48, 4, 5)
    assert_close("attention of scores of ±2500", attention(sharp, 1, "triton"), attention(sharp, 1, "torch"))
    equal = normal(1, 48, 4, 5)
    equal[:, :16] = 0
    mean = equal[:, 32:].mean(dim=(2, 3), keepdim=True).expand(1, 16, 4, 5)
    torch.testing.assert_close(attention(equal, 1, "triton"), mean)


def test_attention_refuses_passes_on_and_takes_nothing():
    with pytest.raises(InputError, match="float64 is not"):
        attention(normal(1, 12, 2, 2).double(), 1, "triton")
    with pytest.raises(InputError, match="513 channels are wider"):
        attention(normal(1, 3 * 513, 1, 1), 1, "triton")
    with pytest.raises(InputError, match="4225 pixels"):
        attention(normal(1, 3, 65, 65), 1, "triton")
    assert attention(normal(1, 3 * 513, 1, 1), 1).shape == (1, 513, 1, 1)  # by PyTorch
    empty = normal(0, 12, 2, 3).requires_grad_()
    y = attention(empty, 2, "triton")
    assert y.shape == (0, 4, 2, 3)
    assert torch.autograd.grad(y.sum(), empty)[0].shape == empty.shape


def test_attention_beyond_two_to_the_31(tmp_path):
    apart = 2**31
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(4 * (apart + 2**20))
    memory = torch.from_file(str(path), shared=True, size=apart + 2**20, dtype=torch.float32)
    qkv = memory.as_strided((2, 24, 2, 2), (apart, 4, 2, 1))
    qkv.copy_(normal(2, 24, 2, 2))
    torch.testing.assert_close(attention(qkv, 1, "triton"), attention(normal(2, 24, 2, 2), 1, "triton"))


def test_attention_op_is_well_registered():
    qkv = normal(2, 24, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(torch.ops.diffmem.attention_triton, (qkv, 2))


@pytest.mark.parametrize("name", [
    # The adaptive embedding; the benchmark's dry run has a network with the additive one.
    pytest.param(name, marks=() if name == "adm-edm-cond" else exhaustive)
    for name in golden_networks.NAMES
])  # fmt: skip
def test_networks_match_the_golden_files(name):
    """The whole network, in one graph, through the kernels."""
    made, tensors = golden_denoiser(name)
    with torch.no_grad(), torch.profiler.profile() as profile:
        out = made(tensors["x"][:1], tensors["sigma"][:1], None if (c := tensors.get("class_index")) is None else c[:1])
    assert_relative("a network, golden", out, tensors["denoised"][:1])
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["diffmem::group_norm_silu_triton"] > 20
    assert calls["diffmem::attention_triton"] > 1


def test_one_graph_without_breaks_and_its_gradients():
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    block = UNetBlock(16, 8, BlockStyle(1e-6, 0.7, False, None, False, (1, 1), 0.0, 8), attention=True)
    block.to(memory_format=torch.channels_last)
    x, emb = normal(2, 16, 4, 4).to(memory_format=torch.channels_last), normal(2, 8)
    found = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        block.zero_grad()
        function(x, emb).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in block.parameters()])
    for compiled, eager in zip(*found, strict=True):
        assert_close("gradients through aot_eager", compiled, eager)


def clustered(n: int, d: int) -> torch.Tensor:
    """uint8 rows, one cluster after the other, so that at low noise whole spans of them have no weight."""
    rows = 128 + 4 * normal(n, d) + 90 * torch.tanh(normal(n // 700 + 1, d, seed=1)).repeat_interleave(700, 0)[:n]
    return rows.round().clip(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("queries", "n", "d", "tolerance", "sigmas"), [  # both tiles; beyond one, and beyond a span
    pytest.param(5, 1500, 31, 1e-3, (3000.0, 40.0), marks=exhaustive), (5, 1500, 31, 1e-5, (3000.0, 6.0)),
    (67, 1500, 70, 1e-3, (40.0,)), pytest.param(65, 1100, 33, 1e-5, (40.0,), marks=exhaustive),
])  # fmt: skip
def test_posterior_mean(queries, n, d, tolerance, sigmas, monkeypatch):
    monkeypatch.setattr(blocked, "SMALL", 0)
    monkeypatch.setattr(blocked, "BLOCK_PAIRS", queries * 1400)  # the longest have two blocks
    monkeypatch.setattr(blocked, "DENSE_SHARE", 1e-3)  # so that low noise levels are for the kernels too
    y = torch.stack([clustered(n, d), torch.full((n, d), 255, dtype=torch.uint8)], dim=1)[:, 0]  # strided
    y[3], center = y[1], y.double().mean(dim=0).round()
    for sigma in sigmas:
        x = y[700 : 700 + queries] + sigma * normal(queries, d, seed=2, dtype=torch.float64)
        x[0] = (y[1].double() + y[2]) / 2  # as near to the one, twice, as to the other
        levels = torch.full((queries,), sigma, dtype=torch.float64)
        levels[1] *= 1.5
        expected, log_sum, _ = posterior_mean_reference(x, levels, y)
        on_device = sigma == 40.0  # as on a GPU with room for the rows
        found = PosteriorRows(y, center, x.device, impl="triton", resident=on_device).mean(x, levels, tolerance)
        error = (found.mean - expected).norm(dim=1) / (expected - 60).norm(dim=1)
        assert float(error.max()) <= 0.5 * tolerance
        assert bool((found.dropped <= tolerance).all())
        assert_log_sums(found.log_sum, log_sum, tolerance)


def test_spans_of_the_posterior_mean_without_weight_are_left_out():
    """A tile of queries reads what one of them needs, and nothing else: there, scores are NaN."""
    y, center, queries = clustered(2600, 31), torch.full((31,), 128.0), 70  # tiles of 64 and 6 queries
    scores, top = normal(queries, 2600), torch.full((queries,), 3.0)
    kept = torch.zeros(queries, 3, dtype=torch.bool)
    kept[5, 1] = kept[66, 0] = kept[67, 2] = True
    read = torch.zeros(queries, 2600, dtype=torch.bool)
    read[:64, 1024:2048] = read[64:, :1024] = read[64:, 2048:] = True
    sums = launch_weighted_sums(torch.where(read, scores, torch.nan), top, kept, y, center)
    weights = torch.where(read, (scores - 3).double().exp(), 0.0)
    assert_close("weighted sums of bytes", sums, weights @ (y.double() - 128))


def test_forced_kernels_of_the_posterior_mean_say_what_they_cannot_take():
    with pytest.raises(InputError, match="float32, not uint8"):
        PosteriorRows(torch.zeros(3, 4), torch.zeros(4), torch.device("cpu"), impl="triton")


# Maps of one tile, and of several, whose loads are counted in the compiled kernels, too (test_triton_kernels.py).
@pytest.mark.parametrize("side", [8, pytest.param(16, marks=exhaustive)])
def test_traffic_of_group_norm(side):
    """One launch forward; backward two levels of sums after it. Each map is moved once, or twice where it is in several
    tiles, beside parameters and the first tile; sectors hold little but what is asked for."""
    torch.use_deterministic_algorithms(False)  # filling new memory with NaN loads nothing, but takes time
    for step, maps, launches in (("forward", 1, 1), ("backward", 2, 3)):
        counts = traffic("group_norm_silu", partial(kernel_traffic.group_norm, 256, side), step)
        assert counts["launches"] == launches
        moved = 2 * maps * (1 if side == 8 else 2)  # bytes per element
        assert moved <= counts["loaded"] <= 1.3 * moved
        assert counts["loaded_sectors"] <= 1.4 * counts["loaded"]
        assert 2 <= counts["stored_sectors"] <= 2.6


def test_traffic_of_attention():
    """All tokens in one tile: queries, keys and values are loaded once forward, and the result is a third of them;
    backward the same and more in three launches, as often as `attention_traffic` of test_triton_kernels.py says."""
    torch.use_deterministic_algorithms(False)
    for step, launches, loaded, stored in (("forward", 1, 2.0, 2.0 / 3), ("backward", 3, 8.75, 2.0)):
        counts = traffic("attention", partial(kernel_traffic.attention, 2, 64, 8), step)
        assert counts["launches"] == launches
        assert loaded <= counts["loaded"] <= 1.01 * loaded
        assert stored <= counts["stored"] <= 1.04 * stored  # statistics in float32 beside it
        for name in ("loaded", "stored"):
            assert counts[f"{name}_sectors"] <= 1.01 * counts[name]


def traffic(op, make, step):
    return {name: float(value) for name, value in kernel_traffic.counts_of(Case(op, "", step, make)).items()}
