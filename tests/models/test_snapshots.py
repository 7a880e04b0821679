"""EDM snapshots: benign ones load, in every layout they come in; hostile ones are refused and nothing in them runs."""

from __future__ import annotations

import collections
import io
import os
import pickle
import pickletools
import struct
import zipfile

import pytest
import torch
from edm_snapshots import network, pretended_edm_modules, snapshot
from golden_networks import NAMES, golden, golden_denoiser, state_dict
from numerics import assert_relative

from diffmem.errors import InputError
from diffmem.inert.torch_files import read_torch_file
from diffmem.models import import_edm, load


@pytest.fixture
def marker(tmp_path):
    """A path that hostile streams try to create."""
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists(), "something in the stream was executed"


@pytest.fixture
def edm_modules(monkeypatch, marker):
    return pretended_edm_modules(monkeypatch, marker)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_network_snapshots(name, protocol, edm_modules, tmp_path):
    config, tensors = golden(name)
    path = tmp_path / "network-snapshot-000123.pkl"
    net = network(edm_modules, config["precond"], config["kwargs"], state_dict(tensors))
    path.write_bytes(pickle.dumps(snapshot(edm_modules, net), protocol=protocol))
    if protocol != 4:
        assert load(path).config == golden_denoiser(name)[0].config
        return
    folder = import_edm(path, tmp_path / "out")
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    for source in (path, folder):
        denoiser = load(source)
        assert not denoiser.training
        with torch.no_grad():
            out = denoiser(tensors["x"], tensors["sigma"], tensors.get("class_index"))
        assert_relative("a network, golden", out, tensors["denoised"])


@pytest.mark.parametrize("zipped", [True, False])
def test_training_states(zipped, edm_modules, tmp_path):
    config, tensors = golden("ddpmpp-vp-skips")
    net = network(edm_modules, config["precond"], config["kwargs"], state_dict(tensors))
    optimizer = torch.optim.Adam(net.parameters())
    path = tmp_path / "training-state-000123.pt"
    content = {"net": net, "optimizer_state": optimizer.state_dict()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    denoiser = load(path)
    for name, tensor in denoiser.state_dict().items():
        assert torch.equal(tensor, tensors[f"net.{name}"]), name


def test_positional_arguments_and_defaults(edm_modules, tmp_path):
    # 16 × 16, 3 channels, label_dim 0, use_fp16; SongUNet and its channel_mult (1, 2, 2, 2) by default.
    net = edm_modules.Persistent("VEPrecond", 16, 3, 0, True, model_channels=4, num_blocks=1, label_dropout=0.1)
    path = tmp_path / "state.pkl"
    path.write_bytes(pickle.dumps({"ema": net}))
    with pytest.raises(InputError, match=r"map_layer0.weight is missing"):
        load(path)


def test_a_network_that_does_not_fit_its_arguments(edm_modules, tmp_path):
    config, tensors = golden("ddpmpp-vp-skips")
    path = tmp_path / "snapshot.pkl"
    for change, message in (
        ({"model_channels": 8}, r"has shape \(32, 16\) instead of|has shape"),
        ({"model_type": "Transformer"}, "unknown network 'Transformer'"),
        ({"color": 1}, "unknown argument color"),
        ({"num_blocks": "two"}, "num_blocks is 'two'"),
    ):
        net = network(edm_modules, config["precond"], config["kwargs"] | change, state_dict(tensors))
        path.write_bytes(pickle.dumps({"ema": net}))
        with pytest.raises(InputError, match=message) as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def hostile_pickles(marker):
    command = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    text = str(marker).encode()
    return {
        "posix.system": pickle.dumps(Call(os.system, command)),
        "builtins.eval": pickle.dumps(Call(eval, code)),
        "__builtin__.exec, protocol 0": pickle.dumps(Call(exec, code), protocol=0),
        "builtins.getattr": pickle.dumps(Call(getattr, "text", "join")),
        "functools.partial": b"\x80\x04cfunctools\npartial\n(cos\nsystem\ntR(V" + command.encode() + b"\ntR.",
        "torch.serialization.load": b"\x80\x02ctorch.serialization\nload\n(V" + text + b"\ntR.",
        "torch.load": b"\x80\x02ctorch\nload\n(V" + text + b"\ntR.",
        "os.system by STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + _short(command) + b"\x85R.",
        "dotted attribute": b"\x80\x04\x8c\x05torch\x8c\x0fstorage.os.path\x93.",
        "STACK_GLOBAL of numbers": b"\x80\x04K\x01K\x02\x93.",
        "INST": b"(V" + command.encode() + b"\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nV" + command.encode() + b"\no.",
        "extension registry": b"\x80\x02\x82\x01.",
        "a call of a value": b"\x80\x04\x8c\x02os\x85\x8c\x01a\x85R.",
        "a call of a storage type": b"\x80\x02ctorch\nFloatStorage\n)R.",
        "a nested reduce": pickle.dumps({"ema": [(Call(collections.OrderedDict, [("x", Call(os.system, command))]),)]}),
        "__setstate__ by BUILD on a set": b"\x80\x04\x8f}\x8c\x0c__setstate__K\x01sb.",
        "instance of object": b"\x80\x02ccopy_reg\n_reconstructor\n(c__builtin__\nobject\nc__builtin__\nobject\nNtR.",
        "codec": b"\x80\x02c_codecs\nencode\n(V41\nVhex\ntR.",
        "object dtype": b"\x80\x02cnumpy\ndtype\n(VO8\ntR.",
        "persistent id": b"\x80\x02V" + text + b"\nQ.",
    }


def _short(text):
    return bytes([len(text)]) + text.encode()


@pytest.mark.parametrize("case", sorted(hostile_pickles("x")))
def test_hostile_pickles_are_refused_by_name(case, marker, tmp_path):
    path = tmp_path / "network-snapshot.pkl"
    path.write_bytes(hostile_pickles(marker)[case])
    with pytest.raises(InputError, match="refused, because it holds") as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    name = case.split(" ", 1)[0].rstrip(",")
    if "." in name:
        assert name in message


@pytest.mark.parametrize("layout", ["nested", "zip", "legacy"])
def test_hostile_torch_streams(layout, marker, tmp_path):
    path = tmp_path / "network-snapshot.pkl"
    inner = io.BytesIO()
    torch.save(Call(os.system, f"touch {marker}"), inner, _use_new_zipfile_serialization=layout == "zip")
    content = inner.getvalue()
    if layout == "nested":
        content = pickle.dumps({"ema": Call(torch.storage._load_from_bytes, content)})
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"posix\.system"):
        load(path)


def test_streams_nested_twice_or_holding_no_storage(marker, tmp_path):
    path = tmp_path / "network-snapshot.pkl"

    def nested(value):
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=False)
        return Call(torch.storage._load_from_bytes, buffer.getvalue())

    path.write_bytes(pickle.dumps(nested(nested(1))))
    with pytest.raises(InputError, match="nested in another"):
        load(path)
    path.write_bytes(pickle.dumps(nested([1, 2])))
    with pytest.raises(InputError, match="that is not a storage"):
        load(path)


def test_persistent_objects_that_are_no_instances(tmp_path):
    # EDM also stores modules by their source; only instances of classes are read.
    path = tmp_path / "network-snapshot.pkl"
    meta = {"type": "function", "version": 6, "module_src": "1/0", "class_name": "f", "state": None}
    body = pickle.dumps(meta, protocol=2)[2:-1]
    path.write_bytes(b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n" + body + b"\x85R.")
    with pytest.raises(InputError, match="persistent object"):
        load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8e" + struct.pack("<q", 2**62) + b"abc.",  # BINBYTES8
        b"\x80\x04X" + struct.pack("<I", 2**32 - 1) + b"abc.",  # BINUNICODE
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"1.",  # LONG4
        b"\x80\x02\x8b" + struct.pack("<i", -5) + b"1.",
        b"I" + b"9" * 5000 + b"\n.",  # more digits than Python converts
        b"V" + b"x" * 5000,  # a line without an end
        b"\x80\x04j\xff\xff\xff\x7f.",  # LONG_BINGET of nothing
        b"\x80\x04}(K\x01u.",
        b"\x80\x04(.",
        b"\x80\x04t.",
        b"\x80\x04.",
        b"\x80\x04]]0",
        b"\x80\x04}]K\x01s.",  # an unhashable key
        b"PK\x03\x04 not a zip",
        b"\x00\x01\x02",
    ],
    ids=repr,
)
def test_malformed_streams(content, tmp_path):
    path = tmp_path / "network-snapshot.pkl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a complete snapshot") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_stream_may_not_expand(tmp_path):
    # 1 kB of text encoded 3000 times out of the memo, then one list copied 3000 times.
    path = tmp_path / "network-snapshot.pkl"
    encode = b"c_codecs\nencode\n(h\x00Vlatin1\ntR0"
    path.write_bytes(b"\x80\x02X" + struct.pack("<I", 10_000) + b"x" * 10_000 + b"q\x00" + encode * 3000 + b".")
    with pytest.raises(InputError, match="expands"):
        load(path)
    path.write_bytes(b"\x80\x02](" + b"N" * 10_000 + b"eq\x00" + b"c__builtin__\nlist\nh\x00\x85R0" * 3000 + b".")
    with pytest.raises(InputError, match="expands"):
        load(path)


def test_tensors_stay_inside_their_storage(tmp_path):
    path = tmp_path / "tensor.pt"
    for shape, stride, offset in (
        ((4,), (1,), 1),
        ((2, 2), (3, 1), 0),
        ((10**9,), (0,), 0),
        ((2**40, 2**40), (0, 0), 0),
    ):
        buffer = io.BytesIO()
        torch.save(torch.arange(4.0), buffer)
        with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
            for entry in source.infolist():
                content = source.read(entry)
                if entry.filename.endswith("data.pkl"):
                    content = _change_window(content, shape, stride, offset)
                target.writestr(entry.filename, content)
        record = read_torch_file(path)
        assert record.shape == shape
        with pytest.raises(Exception, match=r"does not (fit|match)"):
            record.to_tensor()


def _change_window(content, shape, stride, offset):
    """The pickle of one tensor of four numbers with another offset, shape and stride."""
    old = pickle.dumps((0, (4,), (1,)), protocol=2)
    assert b"QK\x00K\x04\x85" in content, [op.name for op, _, _ in pickletools.genops(content)]
    start = content.index(b"QK\x00K\x04\x85") + 1
    end = content.index(b"\x89", start)
    assert old
    new = b"".join(pickle.dumps(value, protocol=2)[2:-1].replace(b"q\x00", b"") for value in (offset, shape, stride))
    return content[:start] + new + content[end:]


def test_every_truncation_is_one_clear_line(edm_modules, tmp_path):
    net = edm_modules.Persistent("VPPrecond", img_resolution=8, img_channels=3)
    net.register_buffer("u", torch.arange(3.0))
    path = tmp_path / "network-snapshot.pkl"
    whole = {False: pickle.dumps(snapshot(edm_modules, net))}
    for zipped in (True,):
        buffer = io.BytesIO()
        torch.save({"net": net}, buffer, _use_new_zipfile_serialization=zipped)
        whole[zipped] = buffer.getvalue()
    for content in whole.values():
        for size in range(0, len(content) - 1, 37):
            path.write_bytes(content[:size])
            with pytest.raises(InputError) as caught:
                load(path)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{"ema": 3}, {"model": {}}, [1, 2], torch.ones(3), None])
def test_other_content(content, tmp_path):
    path = tmp_path / "file.pt"
    torch.save(content, path)
    with pytest.raises(InputError, match="no network in it"):
        load(path)


def test_other_classes_are_not_denoisers(edm_modules, tmp_path):
    path = tmp_path / "network-snapshot.pkl"
    path.write_bytes(pickle.dumps({"ema": edm_modules.Persistent("StyleGAN", 8, 3)}))
    with pytest.raises(InputError, match="unknown denoiser 'StyleGAN'"):
        load(path)
