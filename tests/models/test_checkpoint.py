"""Checkpoints: what is saved loads the same; what does not fit says which field."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffmem.errors import InputError
from diffmem.models import Denoiser, load, preset, save


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    return Denoiser(preset("ddpmpp_8", model_channels=8, num_blocks=1, label_dim=5)).eval()


def test_round_trip(denoiser, tmp_path):
    state = torch.get_rng_state()
    folder = save(denoiser, tmp_path / "run" / "checkpoint")
    save(denoiser, folder)  # replaces
    loaded = load(folder)
    assert os.listdir(tmp_path / "run") == ["checkpoint"]
    assert torch.equal(torch.get_rng_state(), state), "loading draws no random numbers"
    assert loaded.config == denoiser.config
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    for (name, tensor), other in zip(denoiser.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
        assert tensor.stride() == other.stride(), name
    x = torch.randn(2, 3, 8, 8)
    labels = torch.tensor([4, 0])
    assert torch.equal(loaded(x, 1.0, labels), denoiser(x, 1.0, labels))


def test_a_save_that_fails_leaves_the_old_checkpoint(denoiser, tmp_path, monkeypatch):
    folder = save(denoiser, tmp_path / "checkpoint")
    before = (folder / "model.safetensors").read_bytes()

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(InputError, match="No space left"):
        save(denoiser, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_other_folders_are_not_overwritten(denoiser, tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(InputError, match="not a checkpoint"):
        save(denoiser, tmp_path)


def test_what_does_not_fit(denoiser, tmp_path):
    folder = save(denoiser, tmp_path / "checkpoint")
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors, text = load_file(weights), config.read_text()
    changed = dict(tensors)
    changed["model.extra"] = torch.zeros(1)
    changed["model.map_layer0.bias"] = torch.zeros(3)
    del changed["model.map_layer1.bias"]
    save_file(changed, weights)
    with pytest.raises(InputError, match=r"map_layer1.bias is missing; model.extra is not part .* has shape \(3,\)"):
        load(folder)
    save_file(tensors, weights)
    values = json.loads(text)
    values["network"]["num_blocks"] = 2
    config.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"is missing; .* and \d+ more"):
        load(folder)
    config.write_text(text[:100])
    with pytest.raises(InputError, match=r"config\.json"):
        load(folder)
    config.write_text(text)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load(folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors in it"):
        load(folder)
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "nowhere")
