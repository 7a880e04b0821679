"""The protocol that the backends of all ops share: names, reasons, one order of arguments and results."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from numerics import assert_close

import diffmem.ops
from diffmem.errors import InputError
from diffmem.ops.affine_alignment import affine_alignment
from diffmem.ops.alignment import alignment
from diffmem.ops.attention import attention
from diffmem.ops.conv3x3 import conv3x3
from diffmem.ops.group_norm_silu import group_norm_silu
from diffmem.ops.nearest import nearest
from diffmem.ops.posterior_mean import posterior_mean
from diffmem.ops.registry import NAMES, Backend, Op

FOLDERS = [module.name for module in pkgutil.iter_modules(diffmem.ops.__path__) if module.ispkg]


def inputs(op):
    """The function of an op, and arguments that its backends on the CPU take (the native ones of PyTorch's too)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, 16, 16, generator=generator).to(memory_format=torch.channels_last)
    rows = torch.randint(0, 256, (40, 12), generator=generator, dtype=torch.uint8)
    windows = x[:2, None, :3, :12, :12], x[2:, None, :3, :9, :8]
    start = torch.eye(2, 3).repeat(2, 1, 1)
    return {
        "affine_alignment": (affine_alignment, (*(each[:, 0] for each in windows), start, 0)),
        "alignment": (alignment, windows),
        "attention": (attention, (x[:, :12], 2)),
        "conv3x3": (conv3x3, (x, torch.randn(16, 16, 3, 3, generator=generator), torch.ones(16))),
        "group_norm_silu": (group_norm_silu, (x, 4, torch.ones(16), torch.zeros(16), 1e-5)),
        "nearest": (nearest, (rows[:7], rows, 3)),
        "posterior_mean": (posterior_mean, (rows[:5].double() + 0.25, torch.full((5,), 60.0), rows)),
    }[op]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_op_names_its_backends_as_the_field_does_and_ends_with_its_reference(folder):
    op = importlib.import_module(f"diffmem.ops.{folder}").OP
    names = [backend.name for backend in op.backends]
    assert op.name == folder
    assert len(set(names)) == len(names)
    assert set(names) <= set(NAMES)
    assert names[-1] == "reference"
    assert "torch" in names
    for device in ("cpu", "cuda", "mps"):
        assert op["reference"].supports(device) is None
        assert op["torch"].supports(device) is None


@pytest.mark.parametrize("folder", FOLDERS)
def test_backends_return_the_same_in_the_same_order_or_say_why_not(folder):
    op = importlib.import_module(f"diffmem.ops.{folder}").OP
    function, arguments = inputs(folder)
    expected = function(*arguments, impl="reference")
    default = function(*arguments)
    for backend in op.backends:
        reason = backend.supports("cpu")
        if reason is not None:
            assert reason == reason.strip().rstrip(".")
            with pytest.raises(InputError) as error:
                function(*arguments, impl=backend.name)
            assert str(error.value) == f"{op.name}: backend {backend.name!r} cannot be used here: {reason}"
            continue
        found = function(*arguments, impl=backend.name)
        assert_close("any op, another backend", found, expected)
        if backend.name == op.select("cpu", None).name:
            assert_close("any op, twice", default, found)


def test_the_first_backend_that_supports_the_arguments_is_selected_and_the_others_say_why_not():
    def narrow(x):
        return None if x.dtype == torch.float32 else f"{x.dtype} is not float32"

    op = Op(
        "double",
        (
            Backend("cuda", "on GPUs", lambda x: x * 0, lambda device: None if device == "cuda" else "there is no GPU"),
            Backend("native", "narrow", lambda x: x + x, unfit=narrow),
            Backend("torch", "a product", lambda x: 2 * x),
        ),
    )
    x = torch.ones(3)
    assert op.select("cpu", None, x).name == "native"
    assert op.select("cpu", None).name == "native"
    assert op.select("cpu", None, x.double()).name == "torch"
    assert [backend.name for backend in op.candidates("cpu", x.double())] == ["torch"]
    assert op.explain("cpu") == "native (narrow); not cuda: there is no GPU"
    assert op.explain("cpu", x.double()) == (
        "torch (a product); not cuda: there is no GPU; not native: torch.float64 is not float32"
    )
    assert op.only("torch").select("cpu", None, x).name == "torch"
    for impl, arguments, message in [
        ("cuda", (x,), "double: backend 'cuda' cannot be used here: there is no GPU"),
        (
            "native",
            (x.double(),),
            "double: backend 'native' does not support these arguments: torch.float64 is not float32",
        ),
        ("fast", (x,), "double has no backend 'fast'; choose from cuda, native, torch"),
    ]:
        with pytest.raises(InputError) as error:
            op.select("cpu", impl, *arguments)
        assert str(error.value) == message

    def compiled(x):
        return op.select(x.device.type, None, x).function(x)

    assert torch.compile(compiled, fullgraph=True, backend="eager")(x.double()).tolist() == [2.0, 2.0, 2.0]


def test_of_several_the_autotuned_is_explained_as_the_fastest():
    op = Op("same", (Backend("triton", "kernels", abs), Backend("torch", "plain", abs)), autotuned=("triton", "torch"))
    assert op.explain("cuda") == "the fastest of triton (kernels), torch (plain), measured at first use"
    assert op.explain("cpu") == "triton (kernels)"
