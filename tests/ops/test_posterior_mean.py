"""diffmem.ops.posterior_mean: every implementation against float64, at every noise level, ties and hostile shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_close, assert_log_sums

from diffmem.errors import InputError
from diffmem.ops.posterior_mean import OP, PosteriorRows, blocked, native, posterior_mean
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


@pytest.mark.parametrize("sigma", SIGMAS)
def test_blocked_against_float64(sigma, monkeypatch):
    monkeypatch.setattr(blocked, "SMALL", 0)  # no shortcut for small problems
    monkeypatch.setattr(blocked, "BLOCK_PAIRS", 6 * 300)  # several blocks
    y = rows(1000, 75)
    y[7] = y[3]
    x = noisy(y, sigma, 6)
    x[5] = (y[1].double() + y[2]) / 2  # as near to the one as to the other
    levels = torch.full((6,), 127.5 * sigma, dtype=torch.float64)
    assert_within(posterior_mean(x, levels, y, impl="torch"), x, levels, y, 1e-5)


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
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_native_small_sets_without_components(tolerance, level, monkeypatch):
    """Every noise level is served, by one of all ways that there are, and to the tolerance."""
    monkeypatch.setenv("DIFFMEM_CPU", level)
    y = rows(900, 130)
    y[7] = y[3]
    center = y.double().mean(dim=0).round()
    data = native.NativeRows(y, center, float((center - 127.5).norm()), None)
    plans = set()
    for sigma in (80.0, 20.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.002):
        x = noisy(y, sigma, 19)
        x[5] = (y[1].double() + y[2]) / 2
        levels = torch.full((19,), 127.5 * sigma, dtype=torch.float64)
        plan = data.plan(127.5 * sigma, tolerance, len(y))
        plans.add(None if plan is None else (plan.planes, plan.low == native.FLOAT))
        result = type(posterior_mean(x, levels, y[:9]))(*data.mean(x, levels, tolerance, 0, len(y)))
        assert_within(result, x, levels, y, tolerance)
    assert len(plans) > 2 or tolerance > 1e-5
    monkeypatch.setattr(native, "FLOAT_BYTES", 0)
    data = native.NativeRows(y, center, float((center - 127.5).norm()), None)
    assert data.narrow_rows() is None
    levels = torch.full((3,), 127.5 * 0.002, dtype=torch.float64)
    result = type(posterior_mean(x[:3], levels, y[:9]))(*data.mean(noisy(y, 0.002, 3), levels, tolerance, 0, len(y)))
    assert_within(result, noisy(y, 0.002, 3), levels, y, tolerance)


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
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 80), st.booleans())
def test_byte_products_are_exact(level, monkeypatch, n, k, count, low):
    """Both products, for sizes that fill no register, against int64; and the weights that one of them is of."""
    monkeypatch.setenv("DIFFMEM_CPU", level)
    generator = torch.Generator().manual_seed(n * k)
    y = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator)
    columns = -(-count // 16) * 16
    scores = torch.randn(n, columns, generator=generator)
    limit, chosen = torch.zeros(columns), torch.arange(count, dtype=torch.int32)
    high = torch.full((count, 4 * -(-n // 4)), 77, dtype=torch.uint8)
    second = high.clone() if low else None
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
    expected = torch.where(scores > 0, 0.0, scores.exp() * (65280 if low else 255)).T[:count]
    assert float((found - expected).abs().max()) <= 1.001 + 65280 * 2e-7 * low
    out = torch.full((count, k), 7, dtype=torch.int32)
    core.posterior_weighted_sums(y.data_ptr(), k, k, n, high.data_ptr(), count, out.data_ptr(), 2)
    assert torch.equal(out.long(), high[:, :n].long() @ (y.long() - 128))
    # Scores whose numbers float32 holds exactly: whole multiples of 1/4 below 2^22.
    u = torch.randint(-128, 128, (count, k), generator=generator)
    steps = -(-k // 4)
    padded = torch.zeros(columns, 4 * steps, dtype=torch.int8)
    padded[:count, :k] = u.to(torch.int8)
    panel = torch.cat([part.transpose(0, 1).flatten() for part in padded.view(columns, steps, 4).split(native.PANEL)])
    shift, scale = torch.arange(columns, dtype=torch.int32), torch.full((columns,), 0.25)
    term = core.PosteriorTerm(rows=y.data_ptr(), stride=k, k=k, panel=panel.data_ptr(), shift=shift.data_ptr(),
                              scale=scale.data_ptr())  # fmt: skip
    half_norms, weight = torch.arange(n) / 2.0, torch.full((columns,), 2.0)
    scores = torch.full((n, columns), torch.nan)
    for add in (False, True):
        core.posterior_scores([term], n, columns, half_norms.data_ptr(), weight.data_ptr(), add, scores.data_ptr(), 2)
    expected = (y.long() @ u.T - shift[:count]) / 2 - torch.arange(n)[:, None]
    assert torch.equal(scores[:, :count], expected)


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
