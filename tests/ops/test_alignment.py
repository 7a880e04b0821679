"""Op alignment: every backend gives the correlations of the plain formula."""

import numpy as np
import pytest
import torch
from examples_made import at_most
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close

from diffmem.errors import InputError
from diffmem.ops.alignment import OP, alignment, native
from diffmem.ops.registry import native_module

FAST = [name for name in (each.name for each in OP.backends) if name != "reference"]


def images(*shape, seed=0, mean=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean


def correlation_at(searched, templates, position):
    """By numpy's own correlation coefficient: the channels' means removed, then all values as one vector."""
    h, w = templates.shape[3:]
    down, across = searched.shape[3] - h + 1, searched.shape[4] - w + 1
    found = np.empty(position.shape)
    for q, k in np.ndindex(*position.shape):
        v, y, x = np.unravel_index(int(position[q, k]), (searched.shape[1], down, across))
        a, b = searched[q, v, :, y : y + h, x : x + w].double().numpy(), templates[q, k].double().numpy()
        a, b = ((each - each.mean((1, 2), keepdims=True)).ravel() for each in (a, b))
        length = np.sqrt((a @ a) * (b @ b))
        found[q, k] = a @ b / length if length > 1e-9 else 0
    return found


def check(searched, templates, impl):
    want, _ = alignment(searched.double(), templates.double(), impl="reference")
    got, position = alignment(searched, templates, impl=impl)
    assert (got.dtype, position.dtype) == (searched.dtype, torch.int64)
    assert_close("correlations", got.double(), want)
    # The position is that of a window with this correlation, whichever of near ties it is.
    assert_close("correlations", torch.from_numpy(correlation_at(searched, templates, position)), want)


@pytest.mark.parametrize("impl", FAST)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (2, 3, 4, 35))),
    window=st.tuples(st.integers(2, 9), st.integers(1, 19)),
    beyond=st.tuples(st.integers(0, 4), st.integers(0, 10)),
    mean=st.sampled_from((0.0, 100.0)),
    seed=st.integers(0, 99),
)
@settings(max_examples=at_most(20), deadline=None)
def test_equals_the_plain_formula(impl, sizes, window, beyond, mean, seed):
    queries, variants, channels, count = sizes
    (h, w), (down, right) = window, beyond
    searched = images(queries, variants, channels, h + down, w + right, seed=seed, mean=mean)
    check(searched, images(queries, count, channels, h, w, seed=seed + 1, mean=mean), impl)


@pytest.mark.parametrize("impl", [*FAST, "reference"])
def test_finds_where_a_template_was_cut_out(impl):
    searched = images(2, 3, 3, 12, 11)
    templates = torch.stack([searched[:, 1, :, 2:10, 3:10] * 5 + 7, -searched[:, 2, :, 4:12, 0:7]], dim=1)
    correlation, position = alignment(searched, templates, impl=impl)
    assert_close("correlations", correlation[:, 0], torch.ones(2))
    assert position[:, 0].tolist() == [(1 * 5 + 2) * 5 + 3] * 2
    assert bool((correlation[:, 1] < 0.9).all())  # a negative is another image


@pytest.mark.parametrize("impl", [*FAST, "reference"])
def test_what_has_no_variance_has_no_correlation(impl):
    searched, templates = images(3, 2, 3, 10, 10), images(3, 2, 3, 8, 8)
    searched[0] = 77.7  # a single color
    searched[1, :] = torch.tensor([0.1, 255.0, 1e4])[:, None, None]  # another one in each channel
    templates[2, 0] = 200.3
    correlation, position = alignment(searched, templates, impl=impl)
    assert correlation[:2].abs().max() == 0
    assert correlation[2, 0] == 0
    assert correlation[2, 1] > 0
    assert int(position.min()) >= 0
    assert int(position.max()) < 2 * 9


@pytest.mark.parametrize("impl", FAST)
def test_layouts_and_empty_sets(impl):
    searched = images(2, 10, 9, 2, 3).permute(0, 3, 4, 1, 2)
    templates = images(2, 8, 8, 5, 3).permute(0, 3, 4, 1, 2)
    check(searched, templates, impl)
    assert alignment(searched[:0], templates[:0], impl=impl)[0].shape == (0, 5)
    assert alignment(searched, templates[:, :0], impl=impl)[1].shape == (2, 0)


def test_arguments_are_checked():
    searched, templates = images(2, 3, 3, 12, 11), images(2, 4, 3, 8, 8)
    for bad in (templates[:1], templates[:, :, :2], templates.double(), templates[0], images(2, 4, 3, 13, 8)):
        with pytest.raises(InputError, match="alignment: "):
            alignment(searched, bad)
    with pytest.raises(TypeError, match="searched must be a tensor"):
        alignment(searched.numpy(), templates)
    with pytest.raises(InputError, match="no backend 'cubic'"):
        alignment(searched, templates, impl="cubic")


@pytest.mark.skipif(native.unavailable("cpu") is not None, reason=f"no compiled alignment: {native.unavailable('cpu')}")
def test_opcheck():
    torch.library.opcheck(torch.ops.diffmem.alignment_native, (images(2, 3, 3, 12, 11), images(2, 5, 3, 8, 8)))


@pytest.mark.skipif(native.unavailable("cpu") is not None, reason=f"no compiled alignment: {native.unavailable('cpu')}")
@pytest.mark.parametrize("level", [] if native.unavailable("cpu") else native_module().cpu_levels()[1:])
def test_instruction_sets(level, monkeypatch):
    monkeypatch.setenv("DIFFMEM_CPU", level)
    for count in (1, 8, 9, 16, 17, 24, 41):
        check(images(2, 2, 3, 15, 21, mean=50.0), images(2, count, 3, 9, 10, seed=1), "native")
    monkeypatch.setenv("DIFFMEM_CPU", "portable")
    with pytest.raises(InputError, match="no AVX2"):
        alignment(images(1, 1, 1, 4, 4), images(1, 1, 1, 3, 3), impl="native")
