"""Networks from files, and how images are brought to what they want. The networks have random weights."""

import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffmem.errors import InputError, MissingExtraError
from diffmem.features import extract, extractor, networks
from diffmem.features.preprocessing import PRESETS

IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32).reshape(2, 3, 1, 1)


def images(count=3, channels=3, height=20, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, channels, height, width), np.uint8)


def pillow(image, side, square, crop, bicubic):
    """What torchvision's Resize and CenterCrop do to a picture."""
    picture = Image.fromarray(image.transpose(1, 2, 0))
    width, height = picture.size
    if square:
        size = (side, side)
    else:
        size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    picture = picture.resize(size, Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR)
    if crop:
        left, top = round((picture.width - crop) / 2.0), round((picture.height - crop) / 2.0)
        picture = picture.crop((left, top, left + crop, top + crop))
    return np.asarray(picture).transpose(2, 0, 1)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("size", [(20, 32), (400, 320)])
def test_presets_resize_as_pillow_does(name, size):
    preset = PRESETS[name]
    smooth = images(2, 3, size[0] // 4, size[1] // 4).repeat(4, 2).repeat(4, 3)
    made = preset.resized(torch.from_numpy(smooth)).numpy()
    if preset.side is None:
        assert np.array_equal(made, smooth)
        return
    for image, ours in zip(smooth, made, strict=True):
        theirs = pillow(image, preset.side, preset.square, preset.crop, preset.filter == "bicubic")
        assert ours.shape == theirs.shape
        off = np.abs(ours.astype(int) - theirs)
        assert (
            off.max() <= 2
        )  # its weights have 8 bits; a level more or less after the first pass is one after the second
        assert off.mean() < 0.1


def test_presets_normalize():
    some = torch.from_numpy(images(channels=1))
    made = PRESETS["0-1"](some)
    np.testing.assert_allclose(made[:, 2], some[:, 0].float() / 255)
    np.testing.assert_allclose(PRESETS["-1-1"](some)[:, 1], some[:, 0].float() / 127.5 - 1, atol=1e-6)
    square = PRESETS["sscd-320"](some)
    assert tuple(square.shape) == (3, 3, 320, 320)
    back = square.numpy() * IMAGENET[1] + IMAGENET[0]
    np.testing.assert_allclose(back * 255, np.round(back * 255), atol=1e-3)
    with pytest.raises(InputError, match="these have 4 channels"):
        PRESETS["sscd"](torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.line = torch.nn.Conv2d(3, 6, 3, stride=2), torch.nn.Linear(6, 5)

    def forward(self, batch):
        return self.line(self.conv(batch).mean((2, 3)))


def script(path, seed=0):
    torch.manual_seed(seed)
    network = Small().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but what SSCD is published as
        torch.jit.trace(network, torch.zeros(1, 3, 9, 9)).save(str(path))
    return network


def test_torchscript(tmp_path):
    network = script(tmp_path / "net.pt")
    made = extract(images(5), f"torchscript:{tmp_path / 'net.pt'}", preprocessing="dcr", batch=2)
    with torch.no_grad():
        expected = network(PRESETS["dcr"](torch.from_numpy(images(5)))).numpy()
    np.testing.assert_allclose(made.vectors, expected, rtol=1e-4, atol=1e-5)
    assert (made.metric, made.vectors.dtype) == ("cosine", np.float32)
    assert made.fingerprint.startswith("net.pt ")
    assert made.fingerprint.endswith("preprocessing dcr, ieee")
    script(tmp_path / "net.pt", seed=1)
    assert extractor(f"torchscript:{tmp_path / 'net.pt'}", preprocessing="dcr").fingerprint != made.fingerprint
    half = extract(images(5), f"torchscript:{tmp_path / 'net.pt'}", preprocessing="dcr", precision="bf16")
    assert half.vectors.dtype == np.float32


def test_sscd_is_found_where_torch_hub_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        InputError, match=r"download https://dl\.fbaipublicfiles\.com/sscd-copy-detection/sscd_disc_mixup"
    ):
        extractor("sscd")
    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    network = script(place / "sscd_disc_mixup.torchscript.pt")
    made = extract(images(2), "sscd")
    with torch.no_grad():
        expected = network(PRESETS["sscd"](torch.from_numpy(images(2)))).numpy()
    np.testing.assert_allclose(made.vectors, expected, rtol=1e-4, atol=1e-5)
    assert made.features == "sscd"
    elsewhere = extractor("sscd", weights=place / "sscd_disc_mixup.torchscript.pt", preprocessing="dcr")
    assert "preprocessing dcr" in elsewhere.fingerprint
    with pytest.raises(InputError, match="'sscd:disc_small' is unknown"):
        extractor("sscd:disc_small")


def save_onnx(path, kind, shape, size=None):
    """mean over pixels, times a matrix; uint8 input channels last, float input channels first."""
    onnx = pytest.importorskip("onnx", reason="makes an ONNX file with the package onnx")
    pytest.importorskip("onnxruntime", reason="runs an ONNX file with the package onnxruntime")
    helper, kinds = onnx.helper, onnx.TensorProto
    matrix = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    axes = [2, 3] if kind == "float" else [1, 2]
    nodes = [helper.make_node("Cast", ["x"], ["f"], to=kinds.FLOAT)]
    nodes += [
        helper.make_node("ReduceMean", ["f", "axes"], ["m"], keepdims=0),
        helper.make_node("MatMul", ["m", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "small",
        [helper.make_tensor_value_info("x", kinds.FLOAT if kind == "float" else kinds.UINT8, shape)],
        [helper.make_tensor_value_info("y", kinds.FLOAT, [shape[0], 4])],
        [
            helper.make_tensor("w", kinds.FLOAT, matrix.shape, matrix.ravel()),
            helper.make_tensor("axes", kinds.INT64, [2], axes),
        ],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return matrix


def test_onnx_of_bytes(tmp_path):
    matrix = save_onnx(tmp_path / "net.onnx", "bytes", ["B", "H", "W", 3])
    made = extract(images(), f"onnx:{tmp_path / 'net.onnx'}")
    np.testing.assert_allclose(made.vectors, images().mean((2, 3)) @ matrix, rtol=1e-4)
    resized = extract(images(), f"onnx:{tmp_path / 'net.onnx'}", preprocessing="sscd-320")
    expected = PRESETS["sscd-320"].resized(torch.from_numpy(images())).numpy().mean((2, 3)) @ matrix
    np.testing.assert_allclose(resized.vectors, expected, rtol=1e-4)
    assert resized.fingerprint != made.fingerprint


@pytest.mark.parametrize("batch", ["B", 2])
def test_onnx_of_floats(tmp_path, batch):
    matrix = save_onnx(tmp_path / "net.onnx", "float", [batch, 3, 16, 16])
    with pytest.raises(InputError, match="choose one of sscd"):
        extractor(f"onnx:{tmp_path / 'net.onnx'}")
    with pytest.raises(InputError, match="expects images of 16x16"):
        extractor(f"onnx:{tmp_path / 'net.onnx'}", preprocessing="0-1")
    made = extract(images(), f"onnx:{tmp_path / 'net.onnx'}", preprocessing="imagenet")
    expected = PRESETS["imagenet"].of_side(16)(torch.from_numpy(images())).numpy()
    assert expected.shape == (3, 3, 16, 16)
    np.testing.assert_allclose(made.vectors, expected.mean((2, 3)) @ matrix, rtol=1e-4, atol=1e-5)


def test_files_that_are_no_networks(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"no network")
    with pytest.raises(InputError, match=r"net\.pt: not a TorchScript file"):
        extractor(f"torchscript:{tmp_path / 'net.pt'}", preprocessing="sscd")
    with pytest.raises(InputError, match=r"absent\.pt: no such file"):
        extractor(f"torchscript:{tmp_path / 'absent.pt'}")
    script(tmp_path / "net.pt")
    with pytest.raises(InputError, match="choose one of"):
        extractor(f"torchscript:{tmp_path / 'net.pt'}")
    with pytest.raises(InputError, match="preprocessing must be one of sscd"):
        extractor(f"torchscript:{tmp_path / 'net.pt'}", preprocessing="ssdc")
    with pytest.raises(InputError, match="precision is 'int8'"):
        extractor(f"torchscript:{tmp_path / 'net.pt'}", preprocessing="dcr", precision="int8")


@pytest.mark.parametrize(
    ("package", "features", "extra"), [("timm", "dinov2", "features"), ("onnxruntime", "onnx:", "onnx")]
)
def test_missing_packages_name_their_extra(package, features, extra, monkeypatch, tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"diffmem\[{extra}\]"):
        extractor(features + str(tmp_path / "net.onnx") if features.endswith(":") else features)


class StandIn(torch.nn.Module):
    """A network as timm makes it, small."""

    def __init__(self, num_classes=10, **arguments):
        super().__init__()
        self.arguments = arguments
        self.body = torch.nn.Conv2d(3, 6, 4, stride=4)
        self.head = torch.nn.Linear(6, num_classes) if num_classes else torch.nn.Identity()

    def forward(self, batch):
        return self.head(self.body(batch).mean((2, 3)))


@pytest.fixture
def stand_in_timm(monkeypatch):
    """The part of timm that is used, with one small network: the package itself needs torchvision."""
    configuration = types.SimpleNamespace(
        architecture="small_net", hf_hub_id="timm/small_net.a1", input_size=(3, 32, 32), crop_pct=0.5,
        interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    timm, models = types.ModuleType("timm"), types.ModuleType("timm.models")
    timm.models, timm.__version__ = models, "1.0"
    timm.is_model = lambda name: name == "small_net"
    timm.create_model = lambda name, pretrained, **given: StandIn(**given)
    models.get_pretrained_cfg = lambda name: configuration if name.startswith("small_net") else None
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "timm.models", models)
    hub = types.ModuleType("huggingface_hub")
    hub.try_to_load_from_cache = lambda repository, file: None
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


@pytest.mark.parametrize("file", ["net.safetensors", "net.pth"])
def test_networks_of_timm(stand_in_timm, tmp_path, file):
    with pytest.raises(InputError, match=r"hf download timm/small_net\.a1"):
        extractor("timm:small_net.a1")
    with pytest.raises(InputError, match="has no network large_net"):
        extractor("timm:large_net.a1")
    network = StandIn(10)
    path = tmp_path / file
    if file.endswith("safetensors"):
        save_file(network.state_dict(), path)
        stand_in_timm.try_to_load_from_cache = lambda repository, name: (
            str(path) if name == "model.safetensors" else None
        )
        found = extractor("timm:small_net.a1")
    else:
        torch.save({"state_dict": network.state_dict()}, path)
        found = extractor("timm:small_net.a1", weights=path)
    made = extract(images(2), found)
    network.head = torch.nn.Identity()
    assert found.fingerprint.endswith("preprocessing timm, ieee")
    resized = np.stack([pillow(image, 64, False, 32, True) for image in images(2)])
    with torch.no_grad():
        expected = network(torch.from_numpy(resized).float() / 127.5 - 1).numpy()
    np.testing.assert_allclose(made.vectors, expected, atol=0.02)


def test_weights_of_another_network_are_refused(stand_in_timm, tmp_path):
    save_file({"body.weight": torch.zeros(6, 3, 4, 4)}, tmp_path / "net.safetensors")
    with pytest.raises(InputError, match=r"1 of its 2 tensors are missing.*body\.bias"):
        extractor("timm:small_net.a1", weights=tmp_path / "net.safetensors")


@pytest.mark.parametrize("model", [networks.DINOV2, networks.CLIP])
def test_timm_itself(model, tmp_path):
    """With the real package: the smallest of each family, from a file of random weights."""
    timm = pytest.importorskip("timm", reason="needs the package timm")
    name = "vit_small_patch14_dinov2.lvd142m" if "dinov2" in model else "vit_base_patch32_clip_224.openai"
    arguments = {"num_classes": 0} if "dinov2" in model else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = timm.create_model(name, pretrained=False, **arguments)
    save_file(network.state_dict(), tmp_path / "net.safetensors")
    made = extract(images(2), f"timm:{name}", weights=tmp_path / "net.safetensors")
    assert made.vectors.shape == (2, 384 if "dinov2" in model else 512)


def test_a_module_in_training_answers_for_evaluation():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5))
    made = extract(images(), network, preprocessing="0-1")
    assert np.array_equal(made.vectors, (images().reshape(3, -1).astype(np.float32) / 255))
    assert network.training
    assert network[1].training


def test_weights_are_never_executed(tmp_path, stand_in_timm):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"body.weight": Bomb()}, tmp_path / "net.pth")
    with pytest.raises(InputError):
        extractor("timm:small_net.a1", weights=tmp_path / "net.pth")
    assert not (tmp_path / "exploded").exists()
