"""Rows that live on the device: the same means, one copy of the rows, one synchronization per call."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from numerics import assert_close, assert_log_sums
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import diffmem
from diffmem.errors import InputError
from diffmem.ops.posterior_mean import PosteriorRows, Request, blocked, posterior_mean, resident
from diffmem.optimum import OptimalDenoiser
from diffmem.optimum import denoiser as denoiser_module


def make_rows(n: int, d: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(n, 12, generator=generator) * torch.linspace(40, 4, 12)
    values = 130 + factors @ torch.randn(12, d, generator=generator) / 4 + torch.randn(n, d, generator=generator)
    return values.clip(0, 255).to(torch.uint8)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def small_limits(monkeypatch):
    """Several blocks of rows and several groups of queries, and no shortcut for small problems."""
    monkeypatch.setattr(blocked, "SMALL", 0)
    monkeypatch.setattr(resident, "LOGIT_BYTES", 4 * 700 * 5)
    monkeypatch.setattr(resident, "BLOCK_BYTES", 4 * 75 * 300)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("sigma", [80.0, 5.0, 0.7, 0.05, 0.002])  # everything, dense, few pairs, one each
def test_equals_every_difference(sigma, kind):
    y = make_rows(700, 75)
    y[7] = y[3]
    y = y if kind == torch.uint8 else y.float() / 127.5 - 1
    scale = 127.5 if kind == torch.uint8 else 1.0
    x = y[:12].double() + scale * sigma * normal(12, 75)
    x[5] = (y[1].double() + y[2]) / 2  # as near to the one as to the other
    levels = torch.full((12,), scale * sigma, dtype=torch.float64)
    levels[3] *= 2
    listed = torch.arange(0, 700, 3)
    center = torch.full((75,), 128.0 if kind == torch.uint8 else 0.0)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(2))
    rows = PosteriorRows(y, center, torch.device("cpu"), order=order, impl="torch", resident=True)
    requests = [
        Request(x, levels, (0, 700)),
        Request(x[:5], levels[:5], (100, 420)),
        Request(x[5:], levels[5:], listed),
    ]
    found = rows.means([*requests, Request(x[:0], levels[:0], (0, 700))], 1e-5, {})
    y = y[order]
    for (some, level, images), result in zip(requests, found, strict=False):
        of = y[images] if isinstance(images, torch.Tensor) else y[slice(*images)]
        expected = posterior_mean(some, level, of, impl="reference")
        distance = (expected.mean - (127.5 if kind == torch.uint8 else 0)).norm(dim=1)
        assert float(((result.mean - expected.mean).norm(dim=1) / distance).max()) <= 1e-5
        assert bool((result.dropped <= 1e-5).all())
        assert_log_sums(result.log_sum, expected.log_sum, 1e-5)
    assert found[-1].mean.shape == (0, 75)


def test_listing_pairs_is_nonzero():
    kept = torch.rand(7, 90, generator=torch.Generator().manual_seed(0)) < 0.1
    for mask in (kept, torch.zeros(3, 5, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)):
        found = resident._pairs(mask, int(mask.sum()))
        assert all(map(torch.equal, found, mask.nonzero(as_tuple=True)))


# What makes a CPU wait for a GPU: a value or a size that Python has to know.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal"}


class Waits(TorchDispatchMode):
    """Counts the operations that a GPU would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name().split("::")[1].split(".")[0]
        masks = name in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype == torch.bool for index in arguments[1]
        )
        if name in WAITS or masks:
            self.found.append(name)
        return function(*arguments, **(options or {}))


class Sent(torch.Tensor):
    """Rows that count how often they are sent to a device."""

    sent = 0

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function is torch.Tensor.to and any(isinstance(a, torch.device) for a in arguments):
            Sent.sent += arguments[0].numel()
        return super().__torch_function__(function, types, arguments, options or {})


@pytest.mark.parametrize("sigma", [80.0, 5.0, 0.7, 0.05])
@pytest.mark.parametrize("labels", [False, True])
def test_one_copy_and_one_synchronization(sigma, labels, monkeypatch):
    monkeypatch.setattr(blocked, "SMALL", 0)
    on_device = partial(PosteriorRows, resident=True)
    monkeypatch.setattr(denoiser_module, "PosteriorRows", lambda rows, *rest, **options: on_device(
        rows.as_subclass(Sent), *rest, **options))  # fmt: skip
    digits = diffmem.load_images("builtin:digits")
    Sent.sent = 0
    denoiser = OptimalDenoiser(digits, labels=None if labels else False, impl="torch")
    assert Sent.sent == digits.images.size  # once, all of it
    x = torch.from_numpy(digits.images[:20]).double() / 127.5 - 1 + sigma * normal(20, 1, 8, 8)
    level, classes = torch.tensor(sigma), torch.from_numpy(digits.labels[:20]) if labels else None
    transfers = []

    def to_host(values):
        transfers.append(len(values))
        with _disable_current_modes():
            return values.tolist()

    monkeypatch.setattr(resident, "_to_host", to_host)
    # Which query has which class is found out on the CPU, where the labels are.
    groups = denoiser._classes(classes, len(x))
    monkeypatch.setattr(denoiser, "_classes", lambda *_: groups)
    with Waits() as waits:
        found = denoiser(x, level, classes)
    assert Sent.sent == digits.images.size
    assert len(transfers) == 1
    assert waits.found == []
    expected = OptimalDenoiser(digits, labels=None if labels else False, impl="reference")(x, level, classes)
    assert_close(f"the optimal denoiser on a device{', sigma > 1' if sigma > 1 else ''}", found, expected)


def test_checks_are_made_before_a_result_counts(monkeypatch):
    digits = diffmem.load_images("builtin:digits")
    on_device = partial(PosteriorRows, resident=True)
    monkeypatch.setattr(denoiser_module, "PosteriorRows", on_device)
    denoiser = OptimalDenoiser(digits, labels=False, impl="torch")
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(InputError, match="NaN or infinity"):
        denoiser(x * torch.nan, 1.0)
    with pytest.raises(InputError, match="positive and finite"):
        denoiser(x, torch.tensor([1.0, -1.0]))
    assert denoiser(x[:0], 1.0).shape == (0, 1, 8, 8)
