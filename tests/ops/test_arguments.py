"""Wrong arguments end in an error that names the parameter: in the public ops, in torch.ops.diffmem, in the core."""

import pytest
import torch
from examples_made import at_most
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close
from processes import finished, start_script

from diffmem.ops.affine_alignment import affine_alignment
from diffmem.ops.alignment import alignment
from diffmem.ops.attention import attention
from diffmem.ops.conv3x3 import conv3x3
from diffmem.ops.conv3x3 import native as conv_native
from diffmem.ops.group_norm_silu import group_norm_silu
from diffmem.ops.group_norm_silu import native as norm_native
from diffmem.ops.nearest import nearest
from diffmem.ops.posterior_mean import posterior_mean
from diffmem.ops.registry import native_module

needs_core = pytest.mark.skipif(native_module() is None, reason="diffmem was installed without its compiled core")


def good(op: str) -> dict:
    """Arguments that an op takes, by name."""
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    statistics = {"mean": torch.zeros(2, 4, dtype=torch.float64), "rstd": torch.ones(2, 4)}
    norm = {
        "x": x, "num_groups": 4, "weight": torch.ones(16), "bias": torch.zeros(16), "eps": 1e-5,
        "scale": torch.zeros(2, 16), "shift": torch.zeros(1, 16), "silu": True, "added": torch.zeros(2, 16),
    }  # fmt: skip
    rows = {"queries": torch.zeros(3, 5, dtype=torch.uint8), "training": torch.ones(4, 5, dtype=torch.uint8), "k": 2}
    return {
        "affine_alignment": {
            "images": torch.randn(2, 3, 12, 12), "templates": torch.randn(2, 3, 8, 8), "start": torch.zeros(2, 2, 3),
            "iterations": 1,
        },
        "alignment": {"searched": torch.randn(2, 2, 3, 12, 12), "templates": torch.randn(2, 5, 3, 8, 8)},
        "conv3x3": {"x": x, "weight": torch.randn(16, 16, 3, 3), "bias": torch.randn(16), "residual": x, "scale": 0.5},
        "conv3x3_winograd": {
            "x": x, "weight": torch.randn(16, 16, 3, 3), "bias": torch.randn(16), "transposed": False,
        },
        "conv3x3_weight_gradient": {"x": x, "gradient": torch.randn(2, 16, 8, 8)},
        "group_norm_silu": norm,
        "group_norm_silu_native": norm,
        "group_norm_silu_native_backward": {
            "dy": torch.randn(2, 16, 8, 8), "x": x, **statistics,
            **{name: value for name, value in norm.items() if name not in ("x", "eps")},
        },
        "attention": {"qkv": torch.randn(2, 12, 4, 4), "num_heads": 2},
        "nearest": rows,
        "nearest_op": {**rows, "impl": "torch"},
        "nearest_native": {**rows, "impl": "native"},
        "posterior_mean": {
            "x": torch.randn(3, 5), "sigma": torch.ones(3), "training": torch.randn(7, 5), "tolerance": 1e-3,
        },
    }[op]  # fmt: skip


CALLS = {
    "affine_alignment": affine_alignment,
    "alignment": alignment,
    "conv3x3": conv3x3,
    "conv3x3_winograd": torch.ops.diffmem.conv3x3_winograd,
    "conv3x3_weight_gradient": torch.ops.diffmem.conv3x3_weight_gradient,
    "group_norm_silu": group_norm_silu,
    "group_norm_silu_native": torch.ops.diffmem.group_norm_silu_native,
    "group_norm_silu_native_backward": torch.ops.diffmem.group_norm_silu_native_backward,
    "attention": attention,
    "nearest": nearest,
    "nearest_op": torch.ops.diffmem.nearest,
    "nearest_native": torch.ops.diffmem.nearest,
    "posterior_mean": posterior_mean,
}
IN_CORE = {
    "conv3x3_winograd": conv_native.unavailable,
    "conv3x3_weight_gradient": conv_native.unavailable,
    "group_norm_silu_native": norm_native.unavailable,
    "group_norm_silu_native_backward": norm_native.unavailable,
    "nearest_native": lambda _: None if native_module() is not None else "no core",
}
OPS = [name for name in CALLS if name not in IN_CORE or IN_CORE[name]("cpu") is None]
INTEGERS = (torch.int64, torch.int8, torch.bool)


def call(op: str, arguments: dict):
    """The op by names; posterior_mean's options are keywords anyway."""
    return CALLS[op](**arguments)


def changes(op: str, name: str, value) -> list:
    """(what, wrong value) for a parameter."""
    if isinstance(value, torch.Tensor):
        found = [
            ("complex", torch.zeros(value.shape, dtype=torch.complex64)),
            ("sparse", torch.zeros(value.shape).to(value.dtype).to_sparse()),
            ("an axis more", value[None]),
            ("no axes", value.flatten()[:1].reshape(())),
            ("wider", torch.cat([value, value], dim=-1)),
            ("narrower", value[..., :-1]),
            ("bool", torch.zeros(value.shape, dtype=torch.bool)),
            ("no such thing", "text"),
        ]
        one_of_any_size = {
            "affine_alignment": ("images", "templates"), "alignment": ("searched", "templates"),
            "conv3x3": ("x",), "attention": ("qkv",), "group_norm_silu": ("x",), "nearest": (), "posterior_mean": (),
        }  # fmt: skip
        if name in one_of_any_size.get(op, ()):  # height and width are free
            found = [change for change in found if change[0] not in ("wider", "narrower")]
        if op == "group_norm_silu" and name == "x":  # so is the number of axes
            found = [change for change in found if change[0] != "an axis more"]
        if op in ("conv3x3_winograd", "group_norm_silu_native") and name == "x":
            found = [change for change in found if change[0] not in ("wider", "narrower")]
        if value.is_floating_point() and op in ("conv3x3", "conv3x3_winograd", "conv3x3_weight_gradient"):
            found.append(("float64", value.double()))
        if value.ndim == 2 and name in ("queries", "training"):
            found.append(("no values", value[:, :0]))
        return found
    if isinstance(value, bool):
        return []
    if name == "impl":
        return [("unknown", "magic")]
    if name == "tolerance":
        return [("zero", 0.0), ("NaN", float("nan")), ("text", "small"), ("infinite", float("inf")), ("one", 1.0)]
    if isinstance(value, float):
        return [("negative", -1.0), ("NaN", float("nan")), ("text", "small"), ("infinite", float("inf"))]
    if name == "iterations":
        return [("negative", -1), ("huge", 2**62), ("text", "many")]
    return [("zero", 0), ("negative", -1), ("huge", 2**62), ("text", "many")]


CASES = [
    pytest.param(op, name, wrong, id=f"{op}-{name}-{what.replace(' ', '_')}")
    for op in OPS
    for name, value in good(op).items()
    for what, wrong in changes(op, name, value)
]


@pytest.mark.parametrize("op", OPS)
def test_good_arguments_are_taken(op):
    call(op, good(op))


@pytest.mark.parametrize(("op", "name", "wrong"), CASES)
def test_wrong_arguments_are_named(op, name, wrong):
    torch_says = CALLS[op].__module__.startswith("torch")
    # PyTorch itself checks the kinds of its operators' arguments (RuntimeError), and what it cannot dispatch.
    declared = (ValueError, TypeError, RuntimeError, NotImplementedError) if torch_says else (ValueError, TypeError)
    arguments = {**good(op), name: wrong}
    with pytest.raises(declared) as error:
        call(op, arguments)
    names = (name, *(other for other in good(op) if other != name))
    assert any(each in str(error.value) for each in (*names, "diffmem::", "implementation")), str(error.value)


@pytest.mark.parametrize("name", ["x", "sigma", "training"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_posterior_mean_refuses_what_is_not_finite(name, value):
    arguments = good("posterior_mean")
    arguments[name].view(-1)[1] = value
    with pytest.raises(ValueError, match=name):
        posterior_mean(**arguments)


@pytest.mark.parametrize("op", [op for op in OPS if CALLS[op].__module__.startswith("torch")])
def test_fake_implementations_check_as_the_real_ones_do(op):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in good(op).items()
        }
        call(op, fake)
        name, value = next((name, value) for name, value in fake.items() if isinstance(value, torch.Tensor))
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            call(op, {**fake, name: value[None]})


@pytest.mark.parametrize("op", OPS)
def test_absent_tensors_are_no_crash(op):
    for name, value in good(op).items():
        if isinstance(value, torch.Tensor) and name not in ("bias", "added", "residual"):
            with pytest.raises((ValueError, TypeError, RuntimeError)):
                call(op, {**good(op), name: None})


@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith(("posterior", "nearest"))])
def test_empty_batches_give_empty_results(op):
    arguments = {
        name: value[:0] if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == 2 else value
        for name, value in good(op).items()
    }
    found = call(op, arguments)
    for tensor in found if isinstance(found, tuple | list) else [found]:
        assert torch.isfinite(tensor).all()


@needs_core
@settings(max_examples=at_most(30), deadline=None)
@given(st.data())
def test_layouts_change_nothing(data):
    """Transposed, strided, expanded and overlapping tensors give what their copies give."""
    op = data.draw(st.sampled_from([op for op in OPS if op != "posterior_mean"]))
    arguments = good(op)
    strange = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.ndim:
            how = data.draw(st.sampled_from(["as it is", "strided", "expanded", "transposed"]))
            if how == "strided":
                wide = torch.stack([value, value + 1 if value.dtype != torch.uint8 else value], dim=-1)
                strange[name] = wide[..., 0]
            elif how == "expanded":
                strange[name] = value[:1].expand(value.shape)
            elif how == "transposed" and value.ndim > 1:
                strange[name] = value.transpose(0, 1).contiguous().transpose(0, 1)
    copies = {
        name: value.clone(memory_format=torch.preserve_format) if isinstance(value, torch.Tensor) else value
        for name, value in strange.items()
    }
    copies = {name: value.contiguous() if isinstance(value, torch.Tensor) else value for name, value in copies.items()}
    found, expected = call(op, strange), call(op, copies)
    for ours, theirs in zip(
        found if isinstance(found, tuple | list) else [found],
        expected if isinstance(expected, tuple | list) else [expected],
        strict=True,
    ):
        assert_close("any op, another layout", ours, theirs)


REFUSALS = """
import torch
from diffmem import _C
a = torch.zeros(4096).data_ptr()
rows = lambda n=4, d=8: _C.NearestRows(a, n, d, d, _C.NearestType.u8)
calls = [
    lambda: _C.NearestRows(a, -1, 8, 8, _C.NearestType.u8),
    lambda: _C.NearestRows(a, 4, 8, 0, _C.NearestType.u8),
    lambda: _C.NearestRows(0, 4, 8, 8, _C.NearestType.u8),
    lambda: _C.nearest_search_dense(rows(), rows(), 5, a, a, 1),
    lambda: _C.nearest_search_dense(rows(), rows(), 0, a, a, 1),
    lambda: _C.nearest_search_dense(rows(), rows(d=9), 1, a, a, 1),
    lambda: _C.nearest_search_dense(rows(), rows(), 1, 0, a, 1),
    lambda: _C.nearest_search_dense(rows(), rows(), 1, a, a, 0),
    lambda: _C.conv3x3_packed_size([1, 4, 4, -8, 16]),
    lambda: _C.conv3x3_packed_size([1, 4, 4, 7, 16]),
    lambda: _C.conv3x3_forward([1, 4, 4, 8, 2**61], a, a, 0, 0, 1.0, a, 1),
    lambda: _C.conv3x3_forward([0, 4, 4, 8, 16], a, a, 0, 0, 1.0, a, 1),
    lambda: _C.conv3x3_forward([1, 4, 4, 8, 16], 0, a, 0, 0, 1.0, a, 1),
    lambda: _C.conv3x3_weight_gradient([1, 4, 4, 8, 16], a, a, 0, [72, 9, 3, 1], 1),
    lambda: _C.group_norm_silu_forward([1, 4, 8, 0], [a, a, 0, 0, 0], [0, 0, 0], 1e-5, True, a, a, a, a, 1),
    lambda: _C.group_norm_silu_forward([1, 4, 8, 3], [a, a, 0, 0, 0], [0, 0, 0], 1e-5, True, a, a, a, a, 1),
    lambda: _C.group_norm_silu_forward([1, 4, 8, 2], [a, a, a, 0, 0], [0, 0, 0], 1e-5, True, a, a, a, a, 1),
    lambda: _C.alignment([1, 1, 1, 8, 8, 1, 9, 8], a, a, a, a, 1),
    lambda: _C.alignment([1, 1, 1, 8, 8, 1, 8, 9], a, a, a, a, 1),
    lambda: _C.alignment([1, 2**31, 1, 8, 8, 1, 8, 8], a, a, a, a, 1),
    lambda: _C.alignment([1, 1, 0, 8, 8, 1, 4, 4], a, a, a, a, 1),
    lambda: _C.alignment([1, 1, 1, 8, 8, 1, 4, 4], a, 0, a, a, 1),
    lambda: _C.alignment([1, 1, 1, 8, 8, 1, 4, 4], a, a, a, a, 0),
    lambda: _C.affine_alignment([1, 0, 8, 8, 4, 4], a, a, a, 1, a, a, 1),
    lambda: _C.affine_alignment([1, 1, 8, 8, 4, 4], a, a, a, -1, a, a, 1),
    lambda: _C.affine_alignment([1, 1, 8, 8, 4, 4], a, a, 0, 1, a, a, 1),
    lambda: _C.affine_alignment([1, 1, 8, 8, 4, 4], a, a, a, 1, a, a, 0),
    lambda: _C.PosteriorTerm(a, 4, 2**17, 1, a, a, a),
    lambda: _C.posterior_scores([_C.PosteriorTerm(a, 4, 4, 17, a, a, a)], 4, 16, a, a, False, a, 1),
    lambda: _C.PosteriorRows(a, 4, 0, a),
    lambda: _C.posterior_column_top(a, 0, 16, a, a, 1),
    lambda: _C.posterior_column_top(a, 4, 17, a, a, 1),
    lambda: _C.posterior_weighted_sums(a, 4, 4, 2**17, a, 1, a, 1),
    lambda: _C.posterior_small_means(
        _C.PosteriorRows(a, 4, 4, a), 4, a, 1.0, 1.0, a, False, 0, 1.0, 0.0, a, a, 1.0, False, a, 0, 0, 1),
    lambda: _C.posterior_small_means(
        _C.PosteriorRows(a, 4, 4, a), 4, a, 1.0, 1.0, a, False, 1, 1.0, 0.0, a, a, 1.0, False, 0, 0, 0, 1),
    lambda: _C.vector_scan_encode(a, 4, 65, 64, 0, False, 0.0, a, a, 1),
    lambda: _C.vector_scan_encode(a, 4, 64, 65, 0, False, 0.0, a, a, 1),
    lambda: _C.vector_scan(a, a, 4, 0, a, a, 4, 64, 3, 1.0, 2, a, 1),
    lambda: _C.vector_scan(a, a, 4, 0, a, a, 4, 8192, 0, 1.0, 2, a, 1),
    lambda: _C.vector_scan(a, a, 4, 0, a, a, 4, 64, 0, 1.0, 0, a, 1),
    lambda: _C.vector_scan(a, 0, 4, 0, a, a, 4, 64, 0, 1.0, 2, a, 1),
]
for number, call in enumerate(calls):
    try:
        call()
    except ValueError:
        continue
    raise SystemExit(f"call {number} was taken")
"""


@needs_core
def test_the_core_refuses_what_numbers_tell():
    """In a process of its own: what is not refused would end it."""
    result = finished(start_script(REFUSALS))
    assert result.returncode == 0, result.stdout + result.stderr
