"""Op affine_alignment: every backend finds the map of the plain formula, and that is the right one."""

import math

import pytest
import torch
from examples_made import at_most
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close

from diffmem.errors import InputError
from diffmem.ops.affine_alignment import OP, affine_alignment
from diffmem.ops.registry import native_module

ALL = [each.name for each in OP.backends]
FAST = [name for name in ALL if name != "reference"]


def waves(count, channels, height, width, seed=0, mean=0.0):
    """Smooth images as functions of real coordinates counted from the center, so that any map of them is exact."""
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.randn(count, channels, 6, 2, generator=generator, dtype=torch.float64) * 0.22
    phase = torch.rand(count, channels, 6, generator=generator, dtype=torch.float64) * 6.28

    def image(maps=None, size=(height, width)):
        y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in size), indexing="ij")
        points = torch.stack([x, y, torch.ones_like(x)])
        if maps is None:
            maps = torch.eye(2, 3, dtype=torch.float64).expand(count, 2, 3)
        at = torch.einsum("nij,jhw->nihw", maps.double(), points)
        angle = torch.einsum("ncki,nihw->nckhw", frequency, at) + phase[..., None, None]
        return (angle.sin().sum(dim=2) * 20 + mean).float()

    return image


def identity(count):
    return torch.eye(2, 3).repeat(count, 1, 1)


def nearby(count, seed=0, shift=0.8, turn=0.03):
    noise = torch.rand(count, 2, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return identity(count) + noise * torch.tensor([turn, turn, shift])


@pytest.mark.parametrize("impl", ALL)
def test_finds_the_map(impl):
    image, maps = waves(8, 3, 32, 32), nearby(8)
    templates = image(maps, size=(24, 24)) * 0.5 + torch.tensor([10.0, -40, 90])[:, None, None]
    remainders, found = affine_alignment(image(), templates, identity(8), 12, impl=impl)
    assert_close("maps that were planted", found, maps)
    first, same = affine_alignment(image(), templates, identity(8), 0, impl=impl)
    assert bool((remainders < first / 2).all())
    assert torch.equal(same, identity(8))


@pytest.mark.parametrize("impl", FAST)
@given(
    pairs=st.integers(1, 3), channels=st.integers(1, 4), size=st.tuples(st.integers(7, 20), st.integers(7, 20)),
    less=st.tuples(st.integers(0, 3), st.integers(0, 3)), mean=st.sampled_from((0.0, 100.0)), seed=st.integers(0, 99),
    iterations=st.integers(0, 4),
)  # fmt: skip
@settings(max_examples=at_most(25), deadline=None)
def test_equals_the_plain_formula(impl, pairs, channels, size, less, mean, seed, iterations):
    image = waves(pairs, channels, *size, seed=seed, mean=mean)
    window = tuple(side - 2 * each for side, each in zip(size, less, strict=True))
    templates = image(nearby(pairs, seed, 0.5, 0.02), size=window)
    arguments = image(), templates, identity(pairs)
    want = affine_alignment(*(each.double() for each in arguments), iterations, impl="reference")
    got = affine_alignment(*arguments, iterations, impl=impl)
    assert [each.dtype for each in got] == [torch.float32] * 2
    # √(1 − ρ) of two images that are all but the same is the root of rounding.
    assert_close("remainders", got[0].double(), want[0])
    assert_close("maps", got[1].double(), want[1])


@pytest.mark.parametrize("impl", ALL)
def test_deformations_cost(impl):
    image = waves(3, 2, 24, 24)
    turned = torch.tensor([[math.cos(0.1), -math.sin(0.1)], [math.sin(0.1), math.cos(0.1)]])
    maps = identity(3)
    maps[0, :, :2], maps[1, :, :2], maps[2, 0, 0] = turned, torch.eye(2) * 1.1, 1.1
    # Another image, so that something remains: its correlation is the same, whatever the map is called.
    other = waves(3, 2, 24, 24, seed=5)
    templates = other(size=(16, 16))
    plain, _ = affine_alignment(image(maps, size=(26, 26)), templates, identity(3), 0, impl=impl)
    dear, _ = affine_alignment(image(size=(40, 40)), templates, maps, 0, impl=impl)
    costs = torch.tensor([3 * 0.1, 0.5 * math.log(1.1), 3 * math.log(1.1) + 0.25 * math.log(1.1)])
    assert_close("what deformations cost", dear[plain < 0.7], (plain * costs.exp())[plain < 0.7].clamp(max=1))
    mirrored = identity(3) * torch.tensor([[-1.0], [1.0]])
    assert affine_alignment(image(), templates, mirrored, 0, impl=impl)[0].tolist() == [1.0] * 3


@pytest.mark.skipif(native_module() is None, reason="no compiled core")
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_every_instruction_set_gives_the_same_bits(channels, monkeypatch):
    image = waves(9, channels, 19, 22, seed=5, mean=100.0)
    arguments = image(), image(nearby(9, 5, 0.5, 0.02), size=(13, 17)), identity(9), 5
    found = {}
    for level in native_module().cpu_levels():
        monkeypatch.setenv("DIFFMEM_CPU", level)
        found[level] = affine_alignment(*arguments, impl="native")
    for remainders, maps in found.values():
        assert torch.equal(remainders, found["portable"][0])
        assert torch.equal(maps, found["portable"][1])


@pytest.mark.parametrize("impl", ALL)
def test_nothing_to_align(impl):
    image = waves(4, 3, 12, 12)
    images, templates = image(), image(size=(8, 8))
    images[0] = 77.7
    images[1] = torch.tensor([0.1, 255.0, 1e4])[:, None, None]
    templates[2] = 200.3
    remainders, maps = affine_alignment(images, templates, identity(4), 5, impl=impl)
    assert remainders[:3].tolist() == [1.0] * 3
    assert remainders[3] < 0.01
    assert torch.equal(maps[:3], identity(3))
    far = identity(4)
    far[:, :, 2] = 1e6  # where nothing but the border's last pixel is seen
    assert affine_alignment(images, templates, far, 3, impl=impl)[0].tolist() == [1.0] * 4
    empty = affine_alignment(images[:0], templates[:0], far[:0], impl=impl)
    assert [tuple(each.shape) for each in empty] == [(0,), (0, 2, 3)]


def test_arguments_are_checked():
    images, templates, start = torch.randn(2, 3, 9, 9), torch.randn(2, 3, 7, 7), identity(2)
    for bad in ((images, templates[:1], start), (images, templates[:, :2], start), (images, templates, start[:, :1])):
        with pytest.raises(InputError, match="affine_alignment: "):
            affine_alignment(*bad)
    with pytest.raises(InputError, match="at most 1000"):
        affine_alignment(images, templates, start, 1001)
    with pytest.raises(TypeError, match="iterations must be a whole number"):
        affine_alignment(images, templates, start, 2.5)


@pytest.mark.skipif(native_module() is None, reason="diffmem was installed without its compiled core")
def test_opcheck():
    image = waves(2, 3, 12, 12)
    arguments = image(), image(size=(8, 8)).transpose(2, 3).contiguous().transpose(2, 3), identity(2), 2
    torch.library.opcheck(torch.ops.diffmem.affine_alignment_native, arguments)
    broken = identity(2) * torch.nan  # refused without reading anything
    assert affine_alignment(*arguments[:2], broken, 2, impl="native")[0].tolist() == [1.0, 1.0]
