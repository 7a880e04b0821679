"""diffmem.ops.posterior_mean: every implementation against float64, at every noise level, ties and hostile shapes."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_close, assert_log_sums, relative_error

from diffmem.errors import InputError
from diffmem.ops.posterior_mean import OP, PosteriorRows, blocked, float32, native, posterior_mean
from diffmem.ops.posterior_mean import rows as rows_module
from diffmem.search.basis import principal_components

core = native.native_module()
LEVELS = [] if native.unavailable("cpu") else core.cpu_levels()[1:]  # all but portable
SIGMAS = (80.0, 20.0, 5.0, 1.0, 0.1, 0.002)  # of images in [-1, 1]


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Bytes whose energy lies in few components, as that of images."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(n, 12, generator=generator) * torch.linspace(40, 4, 12)
    directions = torch.randn(12, d, generator=generator)
    return (130 + factors @ directions / 4 + torch.randn(n, d, generator=generator)).clip(0, 255).to(torch.uint8)


def noisy(y: torch.Tensor, sigma: float, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return y[:count].double() + 127.5 * sigma * torch.randn(count, y.shape[1], generator=generator, dtype=torch.float64)


def assert_within(result, x, sigma, y, tolerance):
    expected = posterior_mean(x, sigma, y, impl="reference")
    # As the denoiser counts: relative to the image in [-1, 1].
    error = (result.mean - expected.mean).norm(dim=1) / (expected.mean - 127.5).norm(dim=1)
    assert float(error.max()) <= tolerance
    assert bool((result.dropped <= tolerance).all())
    assert_log_sums(result.log_sum, expected.log_sum, tolerance)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_float32_against_float64(sigma, kept, monkeypatch):
    """PyTorch's way on the CPU: rows that are kept and one block, rows that are not and several."""
    monkeypatch.setattr(float32, "WIDE_WORK", 0)  # no shortcuts for small problems
    monkeypatch.setattr(float32, "EXACT_WORK", 0)
    monkeypatch.setattr(rows_module, "SMALL", 0)
    if not kept:
        monkeypatch.setattr(float32, "KEPT_BYTES", 0)
        monkeypatch.setattr(float32, "SHORT", 0)  # pairs are corrected
        monkeypatch.setattr(float32, "BLOCK_VALUES", 300 * 75)
    y = rows(1000, 75)
    y[7] = y[3]
    x = noisy(y, sigma, 6)
    x[5] = (y[1].double() + y[2]) / 2  # as near to the one as to the other
    levels = torch.full((6,), 127.5 * sigma, dtype=torch.float64)
    for tolerance in (1e-3, 1e-5):
        assert_within(posterior_mean(x, levels, y, tolerance=tolerance, impl="torch"), x, levels, y, tolerance)
    listed = torch.arange(0, 1000, 3)
    data = PosteriorRows(y, torch.full((75,), 128.0), torch.device("cpu"), impl="torch")
    assert_within(data.mean(x, levels, 1e-5, listed), x, levels, y[listed], 1e-5)
    # What is asked most often: the mean alone, of float32 queries in other units, one level for all.
    quick = data.quick((x / 127.5 - 1).float(), 127.5 * sigma, 1e-5, 127.5, 127.5)
    expected = posterior_mean(((x / 127.5 - 1).float() + 1) * 127.5, levels, y, impl="reference").mean / 127.5 - 1
    assert relative_error(quick, expected) <= 1e-5
    one = data.quick((x[:1] / 127.5 - 1).float(), 127.5 * sigma, 1e-5, 127.5, 127.5)
    assert relative_error(one, expected[:1]) <= 1e-5


@pytest.mark.parametrize("impl", ["torch", *(["native"] if LEVELS else [])])
def test_tolerances_finer_than_float32(impl):
    y = rows(700, 75)
    data = PosteriorRows(y, torch.full((75,), 128.0), torch.device("cpu"), impl=impl)
    for sigma in SIGMAS:
        x, levels = noisy(y, sigma, 6).float(), torch.full((6,), 127.5 * sigma)
        found, expected = data.mean(x, levels, 1e-9), posterior_mean(x, levels, y, impl="reference")
        assert float(((found.mean - expected.mean).norm(dim=1) / (expected.mean - 127.5).norm(dim=1)).max()) <= 1e-9
        assert data.quick(x, 127.5 * sigma, 1e-9, 1.0, 0.0) is None


def test_products_of_rounded_numbers_are_not_used(monkeypatch):
    y = rows(600, 256)
    data = PosteriorRows(y, torch.full((256,), 128.0), torch.device("cpu"), impl="torch")
    entered = []
    monkeypatch.setattr(float32, "rounds_on_cpu", lambda: not entered)

    @contextlib.contextmanager
    def products(precision):
        entered.append(precision)
        yield

    monkeypatch.setattr(float32, "float32_products", products)
    data.quick(noisy(y, 2.0, 64).float(), 255.0, 1e-5, 1.0, 0.0)
    assert entered == ["ieee"]


def test_blocked_against_float64(monkeypatch):
    """The walk that a GPU's kernels take where rows do not fit its memory."""
    monkeypatch.setattr(blocked, "SMALL", 0)
    monkeypatch.setattr(blocked, "BLOCK_PAIRS", 6 * 300)  # several blocks
    y = rows(1000, 75)
    for sigma in SIGMAS:
        x = noisy(y, sigma, 6)
        levels = torch.full((6,), 127.5 * sigma, dtype=torch.float64)
        center = torch.full((75,), 128.0, dtype=torch.float64)
        found = blocked.posterior_mean_blocked(x, levels, y, 1e-5, center)
        assert_within(type(posterior_mean(x, levels, y[:9]))(*found), x, levels, y, 1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_native_against_float64(tolerance, level, monkeypatch):
    monkeypatch.setenv("DIFFMEM_CPU", level)
    y = rows(6003, 77)
    center = y.double().mean(dim=0).round()
    basis = principal_components(y[:2000].float() - center.float(), 24)
    data = native.NativeRows(y, center, float((center - 127.5).norm()), basis)
    searched = dense = 0
    for sigma in SIGMAS:
        x = noisy(y, sigma, 19)
        x[5] = (y[1].double() + y[2]) / 2
        levels = torch.full((19,), 127.5 * sigma, dtype=torch.float64)
        found = data.mean(x, levels, tolerance, 0, len(y))
        searched, dense = searched + (found is not None and sigma < 1), dense + (found is not None and sigma > 1)
        if found is not None:
            result = type(posterior_mean(x, levels, y[:9]))(*found)
            assert_within(result, x, levels, y, tolerance)
    assert searched == 2
    assert dense or tolerance < 1e-3  # byte sums of so few images cannot be as exact as 1e-5


@pytest.mark.parametrize("level", LEVELS)
def test_light_images_are_not_lost_beside_a_heavy_one(level, monkeypatch):
    """Nor where the exact logit of that one is higher than its approximate score by more than they weigh."""
    monkeypatch.setenv("DIFFMEM_CPU", level)
    y = rows(6003, 77)
    center = y.double().mean(dim=0).round()
    basis = principal_components(y[:2000].float() - center.float(), 24)
    data = native.NativeRows(y, center, float((center - 127.5).norm()), basis)
    x, squared = y[:1].double(), (y[1:].double() - y[0].double()).square().sum(dim=1)
    low, high = 1.0, 1000.0  # of sigma; where all others weigh 0.005
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if float((squared / (-2 * middle**2)).exp().sum()) < 0.005 else (low, middle)
    levels, bits = torch.tensor([low], dtype=torch.float64), core.posterior_digit_bits()
    plan = native.Plan(2, 0, 24.0, 77 if bits == 8 else None)
    call = native._Call(data, x - center, levels, 1e-3, plan, torch.empty(6 * 6008 * 16, dtype=torch.uint8))
    scores = native._Call._scores

    def lowered(*arguments, **options):
        found = scores(*arguments, **options)
        found[0] -= 0.01
        return found

    monkeypatch.setattr(native._Call, "_scores", lowered)
    state = call.run(0, len(y), search=False)
    expected = posterior_mean(x, levels, y, impl="reference")
    assert relative_error(state.mean() + center - 127.5, expected.mean - 127.5) <= 1e-4
    assert (
        abs(float(state.mass.log() + state.top - (x - center).square().sum() / (2 * low**2) - expected.log_sum)) < 1e-4
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_native_small_sets(tolerance, level, monkeypatch):
    """Every noise level, few queries and many, levels of their own, parts of the set, and float32 in other units."""
    monkeypatch.setenv("DIFFMEM_CPU", level)
    monkeypatch.setattr(native, "EXACT_WORK", 0)
    monkeypatch.setattr(native, "QUICK_WORK", 0)
    y = rows(900, 130)
    y[7] = y[3]
    center = y.double().mean(dim=0).round()
    data = native.NativeRows(y, center, float((center - 127.5).norm()), None)
    result_type = type(posterior_mean(noisy(y, 1.0, 1), torch.ones(1), y[:9]))
    for sigma in (80.0, 20.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.002):
        x = noisy(y, sigma, 19)
        x[5] = (y[1].double() + y[2]) / 2
        levels = torch.full((19,), 127.5 * sigma, dtype=torch.float64)
        levels[3] *= 40
        for some in (slice(0, 19), slice(4, 6)):
            found = result_type(*data.mean(x[some], levels[some], tolerance, 0, len(y)))
            assert_within(found, x[some], levels[some], y, tolerance)
            found = result_type(*data.mean(x[some], levels[some], tolerance, 100, 431))
            assert_within(found, x[some], levels[some], y[100:431], tolerance)
        narrow = (x / 127.5 - 1).float()
        mean = data.small_means(narrow, 127.5 * sigma, tolerance, 0, len(y), 127.5, 127.5, details=False)[0]
        levels[3] /= 40
        expected = posterior_mean((narrow.double() + 1) * 127.5, levels, y, impl="reference").mean / 127.5 - 1
        assert float(((mean - expected).norm(dim=1) / expected.norm(dim=1)).max()) <= tolerance


@pytest.mark.parametrize("impl", ["torch", *(["native"] if LEVELS else [])])
@pytest.mark.parametrize("n", [50, 9000])  # few enough to be added up at once, or not
def test_quick_means_say_what_is_wrong(impl, n):
    data = PosteriorRows(rows(n, 12), torch.full((12,), 128.0), torch.device("cpu"), impl=impl)
    for count in (1, 5):
        x = torch.zeros(count, 12)
        for wrong in (math.nan, math.inf, -math.inf):
            spoiled = x.clone()
            spoiled[-1, 3] = wrong
            with pytest.raises(InputError, match="x: holds NaN or infinity"):
                data.quick(spoiled, 1.0, 1e-5, 1.0, 0.0)
        for wrong in (0.0, -1.0, math.nan, math.inf):
            for sigma in (wrong, torch.tensor([1.0] * (count - 1) + [wrong], dtype=torch.float64)):
                with pytest.raises(InputError, match="sigma: noise levels must be positive and finite"):
                    data.quick(x, sigma, 1e-5, 1.0, 0.0)


@pytest.mark.parametrize("impl", ["torch", *(["native"] if LEVELS else [])])
def test_queries_so_long_that_float32_overflows(impl):
    y = rows(9000, 12)
    data = PosteriorRows(y, torch.full((12,), 128.0), torch.device("cpu"), impl=impl)
    for count, sigma in ((1, 1.0), (5, 1.0), (5, 1e17)):
        x = torch.zeros(count, 12)
        x[-1, 3], x[0, 5] = 1e38, -3e37
        levels, z = torch.full((count,), sigma), y.double() - 128
        logits = (x.double() - 128) @ z.T - z.square().sum(dim=1) / 2  # differences would lose y beside x
        expected = torch.softmax(logits / levels[:, None].double() ** 2, dim=1) @ y.double()
        assert relative_error(data.quick(x, sigma, 1e-5, 1.0, 0.0), expected) <= 1e-5
        assert relative_error(data.mean(x, levels, 1e-5).mean, expected) <= 1e-5
        if impl == "native":
            coded = PosteriorRows(y, data.center, torch.device("cpu"), impl=impl, basis=torch.eye(12))
            assert relative_error(coded.mean(x, levels, 1e-5).mean, expected) <= 1e-5


@pytest.mark.skipif(native.unavailable("cpu") is not None, reason=str(native.unavailable("cpu")))
def test_native_with_more_rows_than_a_block_and_codes_that_are_not_kept(monkeypatch):
    y = rows(native.native_module().posterior_largest_sum + 300, 40)
    y[-1] = y[0]  # one in each block
    center = y.double().mean(dim=0).round()
    basis = principal_components(y[:2000].float() - center.float(), 24)
    monkeypatch.setattr(native, "CODE_BYTES", 20 * len(y))  # of which 20 components have room
    data = native.NativeRows(y, center, float((center - 127.5).norm()), basis)
    assert data.codes.bytes.shape == (len(y), 20)
    for sigma in (20.0, 0.1):
        x = torch.cat([noisy(y, sigma, 3), noisy(y[-3:], sigma, 3)])
        levels = torch.full((6,), 127.5 * sigma, dtype=torch.float64)
        result = type(posterior_mean(x, levels, y[:9]))(*data.mean(x, levels, 1e-3, 0, len(y)))
        assert_within(result, x, levels, y, 1e-3)


@pytest.mark.parametrize("level", LEVELS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 600), st.integers(1, 300), st.integers(1, 80), st.booleans())
def test_byte_products_are_exact(level, monkeypatch, n, k, count, low):
    """Both products, for sizes that fill no register, against int64; and the weights that one of them is of."""
    monkeypatch.setenv("DIFFMEM_CPU", level)
    generator = torch.Generator().manual_seed(n * k)
    y = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator)
    columns = -(-count // 16) * 16
    scores = torch.randn(n, columns, generator=generator)
    limit, chosen = torch.zeros(columns), torch.arange(count, dtype=torch.int32)
    digit = native.DIGITS[core.posterior_digit_bits()]
    low = low and digit.bits == 8
    high = torch.full((count, 4 * -(-n // 4)), 77, dtype=digit.weight)
    second = torch.full_like(high, 77) if low else None
    sums, high_sums = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    core.posterior_round_weights(
        scores.data_ptr(), n, columns, limit.data_ptr(), chosen.data_ptr(), count, high.data_ptr(),
        second.data_ptr() if low else 0, sums.data_ptr(), high_sums.data_ptr(), 2,
    )  # fmt: skip
    found = high[:, :n].long()
    assert not bool(high[:, n:].any())
    assert torch.equal(found.sum(dim=1), high_sums)
    if low:
        found = 256 * found + second[:, :n].long() - 128
    assert torch.equal(found.sum(dim=1), sums)
    largest = 65280 if low else digit.largest_weight
    expected = torch.where(scores > 0, 0.0, scores.exp() * largest).T[:count]
    assert float((found - expected).abs().max()) <= 1.001 + largest * 2e-7
    high.copy_(torch.randint(0, digit.largest_weight + 1, high.shape, generator=generator))
    high[0] = digit.largest_weight  # the largest sums there are
    high[:, n:] = 0
    y[:, 0] = 0
    out = torch.full((count, k), 7, dtype=torch.float64)
    core.posterior_weighted_sums(y.data_ptr(), k, k, n, high.data_ptr(), count, out.data_ptr(), 2)
    assert torch.equal(out.long(), high[:, :n].long() @ (y.long() - 128))
    # Scores whose numbers float32 holds exactly: whole multiples of 1/4 below 2^22.
    u = torch.randint(-128, 128, (count, k), generator=generator).to(torch.int16)
    offset = torch.randint(0, 256, (k,), generator=generator, dtype=torch.uint8)
    scale = torch.full((columns,), 0.25)
    term = core.PosteriorTerm(rows=y.data_ptr(), stride=k, k=k, count=count, values=u.data_ptr(),
                              offset=offset.data_ptr(), scale=scale.data_ptr())  # fmt: skip
    half_norms, weight = torch.arange(n) / 2.0, torch.full((columns,), 2.0)
    scores = torch.full((n, columns), torch.nan)
    for add in (False, True):
        core.posterior_scores([term], n, columns, half_norms.data_ptr(), weight.data_ptr(), add, scores.data_ptr(), 2)
    expected = (y.long() - offset.long()) @ u.long().T / 2 - torch.arange(n)[:, None]
    assert torch.equal(scores[:, :count], expected)


@pytest.mark.parametrize("level", LEVELS)
def test_products_of_the_largest_digits(level, monkeypatch):
    """Sums of 16-bit digits that fill int32."""
    monkeypatch.setenv("DIFFMEM_CPU", level)
    digit = native.DIGITS[core.posterior_digit_bits()]
    n, k = 1030, 700
    y = torch.zeros(n, k, dtype=torch.uint8)
    y[1::2] = 255
    u = torch.tensor([digit.largest, -digit.largest], dtype=torch.int16)[:, None].repeat(1, k)
    offset, scale = torch.zeros(k, dtype=torch.uint8), torch.full((16,), 2.0**-20)
    term = core.PosteriorTerm(rows=y.data_ptr(), stride=k, k=k, count=2, values=u.data_ptr(),
                              offset=offset.data_ptr(), scale=scale.data_ptr())  # fmt: skip
    scores, zeros = torch.empty(n, 16), torch.zeros(n)
    core.posterior_scores([term], n, 16, zeros.data_ptr(), zeros.data_ptr(), False, scores.data_ptr(), 1)
    expected = (y.double() @ u.T.double()) * 2.0**-20
    assert float((scores[:, :2] - expected).abs().max()) <= 2.0**-22 * float(expected.max())
    weights = torch.full((1, 4 * -(-n // 4)), digit.largest_weight, dtype=digit.weight)
    weights[:, n:] = 0
    out = torch.empty(1, k, dtype=torch.float64)
    for value in (0, 255):
        y.fill_(value)
        core.posterior_weighted_sums(y.data_ptr(), k, k, n, weights.data_ptr(), 1, out.data_ptr(), 1)
        assert bool((out == n * digit.largest_weight * (value - 128)).all())


def test_float_rows_and_levels_of_their_own():
    y = rows(50, 12).float() / 127.5 - 1
    x, levels = y[:3] + 0.3, torch.tensor([0.5, 3.0, 40.0])
    result, expected = (posterior_mean(x, levels, y, impl=impl) for impl in ("torch", "reference"))
    assert_close("posterior_mean in float32", result.mean, expected.mean)
    one = posterior_mean(x[1:2], levels[1:2], y)
    assert_close("posterior_mean in float32", one.mean, expected.mean[1:2])
    assert posterior_mean(x[:0], levels[:0], y).mean.shape == (0, 12)


def test_bad_arguments():
    y = rows(5, 4)
    for x, levels, words in (
        (torch.zeros(2, 3), torch.ones(2), "must be"),
        (torch.zeros(2, 4), torch.ones(3), "noise level"),
        (torch.zeros(2, 4), torch.zeros(2), "positive"),
    ):
        with pytest.raises(InputError, match=words):
            posterior_mean(x, levels, y)
    with pytest.raises(InputError, match="N > 0"):
        posterior_mean(torch.zeros(1, 4), torch.ones(1), y[:0])
    # Where the processor has no such products, that is what is said.
    reason = "uint8" if native.unavailable("cpu") is None else "cannot be used here"
    with pytest.raises(InputError, match=reason):
        PosteriorRows(y.float(), torch.zeros(4), torch.device("cpu"), impl="native")
    assert OP.backends[-1].name == "reference"
