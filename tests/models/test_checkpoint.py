"""Checkpoints: what is saved loads the same; what does not fit says which field."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffmem.data import load_images
from diffmem.errors import InputError
from diffmem.evaluation import generate, trajectory
from diffmem.models import Denoiser, checkpoint_path, fingerprint, load, preset, save
from diffmem.sampling import SamplerConfig
from diffmem.training import RunFolder, TrainingConfig, train


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


def by_hand(folder, **changes):
    """The checkpoint as a person makes it, without checksums, with changes to the network."""
    values = json.loads((folder / "config.json").read_text())
    values = {name: values[name] for name in ("network", "preconditioning")}
    values["network"] |= changes
    (folder / "config.json").write_text(json.dumps(values))


def test_one_bit_is_noticed(denoiser, tmp_path):
    folder = save(denoiser, tmp_path / "checkpoint")
    for name, old, new in (("model.safetensors", None, None), ("config.json", b'"dropout": 0.', b'"dropout": 0.9')):
        path = folder / name
        content = path.read_bytes()
        changed = content.replace(old, new) if old else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        assert changed != content
        path.write_bytes(changed)
        with pytest.raises(InputError, match=f"{name}: damaged .*checksum differs.*"):
            load(folder)
        path.write_bytes(content)
    load(folder)
    by_hand(folder)
    load(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_blocks", 10**7),
        ("model_channels", 2**40),
        ("model_channels", True),
        ("model_channels", "64"),
        ("channel_mult", [10**6]),
        ("channel_mult", [1] * 1000),
        ("channel_mult", 5),
        ("channel_mult", [[1]]),
        ("attn_resolutions", [[[8]]]),
        ("attn_resolutions", [10**400]),
        ("resolution", 8.0),
        ("label_dim", 10**30),
        ("dropout", "0.1"),
        ("dropout", None),
        ("embedding", {}),
        ("resample_filter", ["1", "1"]),
        ("resample_filter", [1e308, 1e308]),
        ("skip_connections", "no"),
        ("type", []),
    ],
)
def test_absurd_sizes(field, value, denoiser, tmp_path):
    folder = save(denoiser, tmp_path / "checkpoint")
    by_hand(folder, **{field: value})
    with pytest.raises(InputError, match=rf"^[^\n]*config\.json: [^\n]*{field} (is|must)[^\n]*$"):
        load(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5,
        '{"network": ' + "9" * 5000 + "}",
        "null",
        "\xff",
        '{"network": null, "preconditioning": {"type": "ve"}}',
    ],
)
def test_configurations_that_are_none(text, denoiser, tmp_path):
    folder = save(denoiser, tmp_path / "checkpoint")
    (folder / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(InputError, match=r"^[^\n]*config\.json: [^\n]*$"):
        load(folder)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "ve", "sigma_min": -1.0},
        {"type": "ve", "sigma_min": [0.1]},
        {"type": "ve", "sigma_max": 10**400},
        {"type": "iddpm", "M": 10**9},
        {"type": "iddpm", "C_2": -1.0},
        {"type": "vp", "beta_d": 1e29},
        {"type": "edm", "sigma_data": None},
    ],
)
def test_absurd_preconditionings(part, denoiser, tmp_path):
    folder = save(denoiser, tmp_path / "checkpoint")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"network": values["network"], "preconditioning": part}))
    with pytest.raises(InputError, match=r"^[^\n]*config\.json: [^\n]*$"):
        load(folder)


def test_what_does_not_fit(denoiser, tmp_path):
    folder = save(denoiser, tmp_path / "checkpoint")
    weights, config = folder / "model.safetensors", folder / "config.json"
    by_hand(folder)
    tensors, text = load_file(weights), config.read_text()
    changed = dict(tensors)
    changed["model.extra"] = torch.zeros(1)
    changed["model.map_layer0.bias"] = torch.zeros(3)
    del changed["model.map_layer1.bias"]
    save_file(changed, weights)
    with pytest.raises(InputError, match=r"map_layer1.bias is missing; model.extra is unexpected.* has shape \(3,\)"):
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
    with pytest.raises(InputError, match="not a complete safetensors file"):
        load(folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors in it"):
        load(folder)
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two snapshots, the newer one with a larger number but a smaller name."""
    out = tmp_path_factory.mktemp("runs") / "run"
    config = TrainingConfig(preset("ddpmpp_8", channels=1, model_channels=16, num_blocks=1), images=16, batch=8)
    train(config, load_images("builtin:digits", limit=8), out, snapshot_images=8)
    return out


def test_a_run_stands_for_its_newest_snapshot_wherever_a_checkpoint_is_taken(run):
    newest, sampler = run / "snapshots" / "000000016", SamplerConfig(steps=2)
    assert checkpoint_path(run) == checkpoint_path(newest) == RunFolder.open(run).newest() == newest
    assert fingerprint(load(run)) == fingerprint(load(newest)) != fingerprint(load(run / "snapshots" / "000000008"))
    result = generate(run, range(2), sampler=sampler)
    assert result.checkpoint == str(newest)
    assert torch.equal(result.samples.images, generate(load(newest), range(2), sampler=sampler).samples.images)


def test_a_run_without_snapshots_and_a_snapshot_in_the_place_of_a_run_say_what_to_give(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "snapshots")
    for call in (load, checkpoint_path, lambda path: generate(path, [0])):
        with pytest.raises(InputError, match="run: this run has no snapshot yet; it writes one at its end"):
            call(tmp_path / "run")
    with pytest.raises(InputError, match=f"is a snapshot: give its run, {run}"):
        trajectory(run / "snapshots" / "000000016")
