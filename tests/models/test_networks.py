"""Networks against the golden files, and the options that no golden file shows."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from golden_networks import NAMES, golden_denoiser
from numerics import assert_close, assert_relative

from diffmem.errors import InputError
from diffmem.models import (
    EDM,
    IDDPM,
    PRESETS,
    VE,
    VP,
    ADMConfig,
    Denoiser,
    DenoiserConfig,
    UNetConfig,
    preset,
)
from diffmem.models.blocks import BlockStyle, QueryKeyValue, UNetBlock, dropout

SMALL = UNetConfig(
    resolution=8,
    model_channels=16,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    channel_mult_emb=2,
    dropout=0,
)


def denoiser(network=SMALL, preconditioning=EDM(), seed=0):  # noqa: B008 (frozen)
    torch.manual_seed(seed)
    made = Denoiser(DenoiserConfig(network, preconditioning))
    with torch.no_grad():  # a fresh network's last layers are all but zero
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    made, tensors = golden_denoiser(name)
    with torch.no_grad():
        out = made(tensors["x"], tensors["sigma"], tensors.get("class_index"))
    assert out.dtype == torch.float32
    assert_relative("a network, golden", out, tensors["denoised"])


@pytest.mark.parametrize("name", ["ddpmpp-vp-skips", pytest.param("ncsnpp-ve-cond", marks=pytest.mark.exhaustive)])
def test_one_graph_without_breaks(name):
    made, tensors = golden_denoiser(name)
    traced = torch.compile(made, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = traced(tensors["x"], tensors["sigma"], tensors.get("class_index"))
    assert_relative("a network, golden", out, tensors["denoised"])


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # PyTorch's own, inside Inductor
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles:UserWarning")  # of PyTorch 2.6
def test_compiled_block_and_gradients():
    torch.manual_seed(0)
    block = UNetBlock(16, 8, BlockStyle(1e-6, 0.7, False, None, False, (1, 1), 0.0, 8), attention=True)
    block.to(memory_format=torch.channels_last)
    x, emb = torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last), torch.randn(2, 8)
    gradients = []
    for function in (block, torch.compile(block, fullgraph=True)):
        block.zero_grad()
        function(x, emb).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in block.parameters()])
    for compiled, eager in zip(*gradients, strict=True):
        assert_close("gradients through torch.compile", compiled, eager)


def test_labels_are_rows_not_one_hots():
    for network in (dataclasses.replace(SMALL, label_dim=7), ADMConfig(8, 3, 7, 0, 64, (1, 2), 2, 1, (4,), 0)):
        made = denoiser(network)
        x, sigma = torch.randn(3, 3, 8, 8), torch.tensor([0.1, 1.0, 10.0])
        index = torch.tensor([6, 0, 3])
        one_hot = F.one_hot(index, 7).float()
        torch.testing.assert_close(made(x, sigma, index), made(x, sigma, one_hot))
        torch.testing.assert_close(made(x, sigma), made(x, sigma, torch.zeros(3, 7)))
        assert not torch.allclose(made(x, sigma), made(x, sigma, index))


def test_fifty_thousand_labels_cost_rows_only():
    made = denoiser(dataclasses.replace(SMALL, label_dim=50_000))
    layer = made.model.map_label
    labels = torch.arange(0, 50_000, 500)
    layer(labels).sum().backward()
    assert layer.weight.grad.stride() == layer.weight.stride() == (1, layer.weight.shape[0])
    assert (layer.weight.grad.abs().sum(dim=0) > 0).nonzero().flatten().tolist() == labels.tolist()
    # Nothing of the size of a one-hot matrix (20 MB here), nor of the weight, is made on the way.
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        layer(labels)
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.events()) < 1_000_000


def test_queries_keys_and_values_are_regrouped_in_the_module_and_nowhere_else():
    """Outputs in the order (3, channels), state dicts in EDM's (channels, 3), whichever way they are loaded."""
    torch.manual_seed(0)
    edm = torch.nn.Conv2d(8, 24, 1)
    x = torch.randn(2, 8, 3, 3)
    made = QueryKeyValue(8)
    for assign in (False, True):
        made.load_state_dict({name: value.clone() for name, value in edm.state_dict().items()}, assign=assign)
        out = made(x).unflatten(1, (3, 8))
        for part in range(3):
            torch.testing.assert_close(out[:, part], edm(x)[:, part::3])
        stored = made.state_dict()
        assert list(stored) == list(edm.state_dict())
        assert all(torch.equal(stored[name], value) for name, value in edm.state_dict().items())
    given = edm.state_dict()
    QueryKeyValue(8).load_state_dict(given)
    assert given["weight"].shape == (24, 8, 1, 1), "the caller's dict was changed"
    own = QueryKeyValue(8)
    own.load_state_dict(dict(made.named_parameters()))  # by their shape: as the module holds them
    assert all(torch.equal(stored[name], value) for name, value in own.state_dict().items())
    with pytest.raises(RuntimeError, match="size mismatch"):
        made.load_state_dict(torch.nn.Conv2d(8, 21, 1).state_dict())
    # The gradient, as an optimizer sees it, is that of EDM's weights in the module's order.
    weights = torch.randn(2, 3, 8, 3, 3)
    (made(x).unflatten(1, (3, 8)) * weights).sum().backward()
    (edm(x) * weights.transpose(1, 2).flatten(1, 2)).sum().backward()
    torch.testing.assert_close(made.to_edm(made.weight.grad), edm.weight.grad[:, :, 0, 0])
    torch.testing.assert_close(made.to_edm(made.bias.grad), edm.bias.grad)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("channels", "zeros"), [(32, 16), (40, 24), (44, 12), (32, 31), (16, 1)])
def test_a_disabled_skip_is_exactly_zeros(channels, zeros, size):
    # 40 = 16 + 24 in 10 groups of 4; 44 = 32 + 12 in 11; 31 of 32: the group at the border mixes zeros and live
    # channels.
    torch.manual_seed(0)
    style = BlockStyle(1e-6, 0.7, False, None, False, (1, 1), 0.0, 8)
    block = UNetBlock(channels, 12, style, zero_channels=zeros).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    # The same block, fed the zeros instead of spared them.
    full = UNetBlock(channels, 12, style).double()
    full.load_state_dict(block.state_dict())
    x = torch.randn(2, channels - zeros, size, size, dtype=torch.float64, requires_grad=True)
    emb = torch.randn(2, 8, dtype=torch.float64)
    spared, whole = block(x, emb), full(F.pad(x, (0, 0, 0, 0, 0, zeros)), emb)
    torch.testing.assert_close(spared, whole)
    weights = torch.randn_like(whole)
    gradient, expected = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (spared, whole))
    torch.testing.assert_close(gradient, expected)
    (block(x, emb) * weights).sum().backward()
    (full(F.pad(x, (0, 0, 0, 0, 0, zeros)), emb) * weights).sum().backward()
    for (name, parameter), other in zip(block.named_parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


@pytest.mark.parametrize("encoder", ["standard", "skip", "residual"])
@pytest.mark.parametrize("decoder", ["standard", "skip"])
@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_every_encoder_and_decoder_runs_and_learns(encoder, decoder, taps):
    made = denoiser(
        dataclasses.replace(
            SMALL,
            encoder=encoder,
            decoder=decoder,
            resample_filter=taps,
            augment_dim=4,
            skip_connections=(True, False, True, False),
        )
    ).train()
    out = made(torch.randn(2, 3, 8, 8), torch.tensor([0.3, 2.0]), augment_labels=torch.randn(2, 4))
    out.square().mean().backward()
    silent = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    # An unconditional part would be silent; every parameter of these networks takes part.
    assert not silent


def test_channels_last_throughout():
    made = denoiser(SMALL)
    layouts = []
    for module in made.modules():
        if isinstance(module, UNetBlock):
            module.register_forward_hook(
                lambda _module, _inputs, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    made(torch.randn(2, 3, 8, 8), 1.0)
    assert layouts
    assert all(layouts)


def test_one_noise_level_for_all_images():
    made = denoiser(SMALL)
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(made(x, 2.0), made(x, torch.full((3,), 2.0)))
    assert made(x[:0], torch.zeros(0)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast(dtype):
    made = denoiser(SMALL)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 2.0])
    exact = made(x, sigma)
    made.autocast_dtype = dtype
    rounded = made(x, sigma)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert_relative("a network in bfloat16", rounded, exact)


def test_preconditionings():
    sigma = torch.tensor([0.02, 0.5, 3.0, 70.0], dtype=torch.float64)
    vp = VP()
    times = vp.coefficients(sigma).noise / (vp.M - 1)
    torch.testing.assert_close(torch.tensor([vp.sigma(t) for t in times.tolist()], dtype=torch.float64), sigma)
    assert vp.sigma_max == pytest.approx(152.1666, rel=1e-5)
    assert VE().coefficients(sigma).noise[0] == pytest.approx(-4.60517, rel=1e-5)
    edm = EDM().coefficients(sigma)
    torch.testing.assert_close(edm.out.square() / edm.skip, sigma.square())
    iddpm = IDDPM()
    levels = torch.tensor(iddpm.levels, dtype=torch.float64)
    assert len(levels) == 1001
    assert (levels[:-1] > levels[1:]).all()
    assert levels[-1] == 0
    assert iddpm.coefficients(levels, levels).noise.tolist() == [999 - j for j in range(1001)]


def test_iddpm_uses_half_of_its_channels_and_rounds():
    made = denoiser(SMALL, IDDPM())
    assert made.model.dec["8x8_aux_conv"].out_channels == 6
    level = made.config.preconditioning.levels[500]
    assert made.round_sigma(level * 1.0001) == level
    assert made(torch.randn(2, 3, 8, 8), level).shape == (2, 3, 8, 8)
    assert "levels" not in made.state_dict()


def test_dropout_only_in_training():
    made = denoiser(dataclasses.replace(SMALL, dropout=0.5))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(made(x, 1.0), made(x, 1.0))
    made.train()
    assert not torch.equal(made(x, 1.0), made(x, 1.0))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_a_share_of_the_values_independently(layout, dtype):
    torch.manual_seed(0)
    x = torch.full((31, 33, 9, 7), 2.0, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    x = (torch.stack([x, x], dim=-1)[..., 0] if layout == "strided" else x).requires_grad_()
    y = dropout(x, 0.1, True)
    assert y.dtype == dtype
    kept = y != 0
    of_dtype = "dropout in half precision" if dtype.itemsize == 2 else "dropout in float32"
    assert_close(of_dtype, y[kept], torch.full_like(y[kept], 2 / 0.9))
    deviation = (0.9 * 0.1 / x.numel()) ** 0.5
    assert abs(kept.double().mean() - 0.9) < 5 * deviation
    # Neighbors in memory share a draw of 64 bits, and must not share their fate.
    flat = kept.detach().permute(0, 2, 3, 1).flatten() if layout == "channels_last" else kept.flatten()
    for step in (1, 2, 3, 4):
        both = (flat[step:] & flat[:-step]).double().mean()
        assert abs(both - 0.81) < 5 * (0.81 * 0.19 / x.numel()) ** 0.5
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], (y / x).detach())
    torch.manual_seed(0)
    assert torch.equal(dropout(x, 0.1, True), y)
    assert dropout(x, 0.1, False) is x or torch.equal(dropout(x, 0.1, False), x)


def test_presets_survive_json_and_have_the_published_sizes():
    for config in PRESETS.values():
        assert DenoiserConfig.from_json(json.loads(json.dumps(config.to_json(), allow_nan=False))) == config
    with torch.device("meta"):
        sizes = {
            name: round(sum(p.numel() for p in Denoiser(PRESETS[name]).parameters()) / 1e6, 1)
            for name in ("edm_ddpmpp_cifar10", "adm_imagenet64")
        }
    # 55.7 million (Table 7 of arXiv 2206.00364) and 296 million (ibid., table 8).
    assert sizes["edm_ddpmpp_cifar10"] == 55.7
    assert sizes["adm_imagenet64"] == pytest.approx(295.9, abs=0.1)


def test_bad_configurations_and_inputs():
    with pytest.raises(InputError, match="resolution is 30"):
        UNetConfig(resolution=30)
    with pytest.raises(InputError, match="6 switches"):
        UNetConfig(num_blocks=1, skip_connections=(True,))
    with pytest.raises(InputError, match="encoder"):
        UNetConfig(encoder="dense")
    with pytest.raises(InputError, match="no field width"):
        preset("ddpmpp_cifar10", width=3)
    with pytest.raises(InputError, match="unknown field depth"):
        DenoiserConfig.from_json({"network": {"type": "unet", "depth": 3}, "preconditioning": {"type": "vp"}})
    made = denoiser(SMALL)
    with pytest.raises(InputError, match=r"takes \(B, 3, 8, 8\)"):
        made(torch.zeros(1, 3, 16, 16), 1.0)
    with pytest.raises(InputError, match="unconditional"):
        made(torch.zeros(1, 3, 8, 8), 1.0, torch.tensor([0]))
    with pytest.raises(InputError, match="2 noise levels for 3 images"):
        made(torch.zeros(3, 3, 8, 8), torch.ones(2))
