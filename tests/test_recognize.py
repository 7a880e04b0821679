"""Networks of diffmem and of other frameworks, given where images or one of our checkpoints are expected."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffmem.data import load_images
from diffmem.errors import InputError
from diffmem.models import load
from diffmem.recognize import network_kind


def made(tmp_path, kind):
    """A file or folder of that kind, as its framework names and begins it."""
    folder = tmp_path / "made"
    folder.mkdir()
    weights = {"down_blocks.0.weight": torch.zeros(2, 2)}
    (folder / "grids").mkdir()
    if kind == "run":
        (folder / "config.json").write_text("{}")
        (folder / "stats.jsonl").write_text("")
    elif kind == "checkpoint":
        (folder / "config.json").write_text('{"network": {}, "preconditioning": {}}')
        save_file(weights, folder / "model.safetensors")
    elif kind == "pipeline":
        (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    elif kind == "diffusers":
        (folder / "config.json").write_text('{"_class_name": "UNet2DModel", "_diffusers_version": "0.30"}')
        save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    elif kind == "edm2 run":
        (folder / "network-snapshot-0000123-0.050.pkl").write_bytes(b"")
    elif kind == "lightning folder":
        (folder / "epoch=3-step=99.ckpt").write_bytes(b"")
    elif kind in ("lightning.ckpt", "lightning.pt"):
        torch.save({"pytorch-lightning_version": "2.4", "state_dict": weights}, folder / kind)
        return folder / kind
    elif kind in ("edm2-img512-xs-2147483-0.135.pkl", "training-state-0000123.pt", "other.pkl"):
        (folder / kind).write_bytes(b"\x80\x04N.")
        return folder / kind
    elif kind == "model.safetensors":
        save_file(weights, folder / kind)
        return folder / kind
    return folder


KINDS = {
    "run": "a run of `diffmem train`",
    "checkpoint": "a checkpoint of diffmem",
    "pipeline": "a pipeline of diffusers",
    "diffusers": "a model of diffusers",
    "edm2 run": "a training run of EDM or EDM2",
    "lightning folder": "a folder of checkpoints of PyTorch Lightning",
    "lightning.ckpt": "a checkpoint of PyTorch Lightning",
    "lightning.pt": "a checkpoint of PyTorch Lightning",
    "edm2-img512-xs-2147483-0.135.pkl": "a network snapshot of EDM or EDM2",
    "training-state-0000123.pt": "a training state of EDM or EDM2",
    "other.pkl": "a pickle, which is never loaded",
    "model.safetensors": "the weights of a network",
}


@pytest.mark.parametrize("kind", KINDS)
def test_networks_are_told_from_images(tmp_path, kind):
    path = made(tmp_path, kind)
    assert network_kind(path) == KINDS[kind]
    with pytest.raises(InputError) as error:
        load_images(path)
    assert str(error.value).startswith(f"{path}: is {KINDS[kind]}, not a set of images")


@pytest.mark.parametrize(
    "kind", ["pipeline", "diffusers", "edm2 run", "lightning folder", "lightning.ckpt", "model.safetensors"]
)
def test_networks_of_others_are_told_from_ours(tmp_path, kind):
    path = made(tmp_path, kind)
    with pytest.raises(InputError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: is {KINDS[kind]}")


def test_images_are_no_networks(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 3, 4, 4), np.uint8))
    torch.save(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), tmp_path / "x.pt")
    save_file({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    (tmp_path / "x.pth").write_bytes(b"")
    (tmp_path / "y.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "config.json").write_text(json.dumps({"made": "by hand"}))
    for path in (tmp_path, *tmp_path.iterdir()):
        assert network_kind(path) is None, path
