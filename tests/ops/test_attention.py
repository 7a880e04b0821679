"""diffmem.ops.attention: the packed layout, against float64, odd sizes and empty batches."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_rounded

from diffmem.errors import InputError
from diffmem.ops.attention import OP, attention

IMPLS = [backend.name for backend in OP.candidates("cpu")]


def packed(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_layout_is_qkv_then_head_then_channel(impl):
    # One pixel of image 0 looks only at the pixel whose key is aligned with its query, and returns that pixel's values.
    qkv = torch.zeros(1, 12, 1, 2)  # two heads of two channels, two pixels
    q, k, v = qkv.reshape(1, 3, 2, 2, 2)[:, :, 1].unbind(1)  # of head 1: (1, channels, pixels) each
    q[0, 0, 0] = 50.0
    k[0, 0, 1] = 50.0
    v[0, 1] = torch.tensor([3.0, 4.0])
    out = attention(qkv, 2, impl=impl)
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([0.0, 0.0, 0.0, 4.0]))
    torch.testing.assert_close(out[0, :, 0, 1], torch.tensor([0.0, 0.0, 0.0, 3.5]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("shape", "heads"), [((2, 96, 4, 4), 1), ((3, 90, 3, 5), 5), ((1, 12, 1, 1), 2)])
def test_against_float64(impl, shape, heads):
    qkv = packed(*shape)
    expected = attention(qkv.double(), heads, impl="reference")
    for layout in (torch.contiguous_format, torch.channels_last):
        out = attention(qkv.to(memory_format=layout), heads, impl=impl)
        assert_rounded("attention by PyTorch", out, expected)
    strided = torch.stack([qkv, torch.full_like(qkv, torch.nan)], dim=-1)[..., 0]
    torch.testing.assert_close(attention(strided, heads, impl=impl), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    qkv = packed(2, 48, 4, 4, dtype=dtype)
    expected = attention(qkv.double(), 2, impl="reference")
    out = attention(qkv, 2)
    assert out.dtype == dtype
    assert_rounded("half precision", out, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_and_empty_batches(impl):
    qkv = packed(1, 12, 2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda value: attention(value, 2, impl=impl), qkv)
    assert attention(qkv[:0], 2, impl=impl).shape == (0, 4, 2, 3)


def test_bad_arguments():
    with pytest.raises(InputError, match="num_heads = 5"):
        attention(torch.zeros(1, 12, 2, 2), 5)


@pytest.mark.parametrize(("heads", "channels"), [(1, 64), (4, 16)])
def test_channels_last_maps_are_not_copied(heads, channels):
    """Queries, keys, values, the result and its gradient are views; the three gradients are put together once."""
    qkv = packed(2, 3 * heads * channels, 4, 6).to(memory_format=torch.channels_last).requires_grad_()
    dy = packed(2, heads * channels, 4, 6, seed=1).to(memory_format=torch.channels_last)

    def large_copies(function):
        with torch.profiler.profile(record_shapes=True) as profile:
            value = function()
        moved = ("aten::copy_", "aten::clone", "aten::contiguous", "aten::cat")
        return value, sorted(event.name for event in profile.events() if event.name in moved)

    out, copies = large_copies(lambda: attention(qkv, heads, impl="torch"))
    assert not copies
    assert out.is_contiguous(memory_format=torch.channels_last)
    (gradient,), copies = large_copies(lambda: torch.autograd.grad(out, qkv, dy))
    assert copies == ["aten::cat"]
    assert gradient.is_contiguous(memory_format=torch.channels_last)
