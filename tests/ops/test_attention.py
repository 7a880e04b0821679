"""diffmem.ops.attention: the packed layout, against float64, odd sizes and empty batches."""

from __future__ import annotations

import pytest
import torch

from diffmem.errors import InputError
from diffmem.ops.attention import OP, attention

IMPLS = [implementation.name for implementation in OP.implementations if implementation.unavailable("cpu") is None]


def packed(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_layout_is_head_then_channel_then_qkv(impl):
    # One pixel of image 0 looks only at the pixel whose key is aligned with its query, and returns that pixel's values.
    qkv = torch.zeros(1, 12, 1, 2)  # two heads of two channels, two pixels
    head_1 = qkv[:, 6:]
    head_1[0, 0, 0, 0] = 50.0  # query, channel 0, pixel 0
    head_1[0, 1, 0, 1] = 50.0  # key, channel 0, pixel 1
    head_1[0, 5, 0] = torch.tensor([3.0, 4.0])  # value, channel 1
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
        assert (out - expected).abs().max() <= 3e-6 * expected.abs().max()
    strided = torch.stack([qkv, torch.full_like(qkv, torch.nan)], dim=-1)[..., 0]
    torch.testing.assert_close(attention(strided, heads, impl=impl), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    qkv = packed(2, 48, 4, 4, dtype=dtype)
    expected = attention(qkv.double(), 2, impl="reference")
    out = attention(qkv, 2)
    assert out.dtype == dtype
    assert (out - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_and_empty_batches(impl):
    qkv = packed(1, 12, 2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda value: attention(value, 2, impl=impl), qkv)
    assert attention(qkv[:0], 2, impl=impl).shape == (0, 4, 2, 3)


def test_bad_arguments():
    with pytest.raises(InputError, match="num_heads = 5"):
        attention(torch.zeros(1, 12, 2, 2), 5)
