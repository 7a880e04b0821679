"""Runs of a sampler: seeds as written, blocks kept and taken up again, settings that differ, the running audit."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import diffmem
from diffmem.errors import InputError
from diffmem.evaluation import (
    evaluator,
    format_seeds,
    generate,
    parse_seeds,
    work_folder,
)
from diffmem.models import EDM, Denoiser, DenoiserConfig, UNetConfig, load, save
from diffmem.sampling import SamplerConfig, sample

QUICK = SamplerConfig(steps=3, batch=4, compile="off")


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(folder, label_dim=0, channels=1):
    """A checkpoint of a network that is small but not all zeros."""
    torch.manual_seed(0)
    network = UNetConfig(
        resolution=4, channels=channels, label_dim=label_dim, model_channels=8, channel_mult=(1,), num_blocks=1,
        attn_resolutions=(), dropout=0.0,
    )  # fmt: skip
    denoiser = Denoiser(DenoiserConfig(network, EDM()))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return save(denoiser, folder)


@pytest.fixture
def checkpoint(tmp_path):
    return tiny(tmp_path / "model", label_dim=3)


def test_seeds_as_people_write_them():
    assert parse_seeds("0,3, 5-7") == [0, 3, 5, 6, 7]
    assert parse_seeds("7,2-3") == [7, 2, 3]
    assert parse_seeds("0-9999") == list(range(10_000))
    for text, words in (
        ("", "not a whole number"),
        ("1,,2", "not a whole number"),
        ("-3", "not a whole number"),
        ("1.5", "not a whole number"),
        ("٣", "not a whole number"),
        ("9-3", "ends before it begins"),
        ("1-5,3", "twice"),
        (f"0-{10**30}", "in parts"),
    ):
        with pytest.raises(InputError, match=words):
            parse_seeds(text)


@given(st.lists(st.integers(0, 40), unique=True, min_size=1))
def test_seeds_there_and_back(seeds):
    assert parse_seeds(format_seeds(seeds)) == seeds


@pytest.mark.parametrize("solver", ["heun", "dpm++", "unipc"])
def test_what_is_written_is_what_the_sampler_makes(solver, checkpoint, tmp_path):
    sampler = SamplerConfig(solver=solver, steps=3, batch=4, compile="off")
    result = generate(checkpoint, range(10), out=tmp_path / "out.npz", sampler=sampler)
    direct = sample(load(checkpoint), range(10), solver=solver, steps=3, batch=4, compile=False)
    with np.load(tmp_path / "out.npz") as file:
        assert sorted(file) == ["images", "labels", "seeds"]
        np.testing.assert_array_equal(file["images"], direct.images)
        np.testing.assert_array_equal(file["labels"], direct.labels)
        np.testing.assert_array_equal(file["seeds"], np.arange(10))
    assert torch.equal(result.samples.images, direct.images)
    assert result.nfe == {"heun": 5, "dpm++": 3, "unipc": 3}[solver]
    assert (result.new, result.out) == (10, tmp_path / "out.npz")
    assert direct.images.float().std() > 20  # the network really makes something
    assert not work_folder(tmp_path / "out.npz").exists()


def test_churn_and_class_reach_the_sampler(checkpoint):
    sampler = SamplerConfig(steps=3, S_churn=2.0, S_noise=1.1, S_max=50.0, class_index=2, compile="off")
    result = generate(checkpoint, [4, 1], sampler=sampler)
    direct = sample(
        load(checkpoint), [4, 1], steps=3, S_churn=2.0, S_noise=1.1, S_max=50.0, labels=2, compile=False
    )  # fmt: skip
    assert torch.equal(result.samples.images, direct.images)
    assert result.samples.labels.tolist() == [2, 2]
    assert not torch.equal(generate(checkpoint, [4, 1], sampler=QUICK).samples.images, direct.images)


class Interruption(Exception):
    pass


@pytest.fixture
def interrupted(checkpoint, tmp_path, monkeypatch):
    """A run of 30 seeds to out.npz, stopped when three of its eight blocks were kept."""

    def stop(stage, done, _total):
        if stage.startswith("sampling") and done >= 12:
            raise Interruption

    out = tmp_path / "out.npz"
    with pytest.raises(Interruption):
        generate(checkpoint, range(30), out=out, sampler=QUICK, progress=stop)
    assert not out.exists()
    return out


def test_resumed_run_gives_the_same_bytes(checkpoint, interrupted, tmp_path):
    whole = tmp_path / "whole.npz"
    generate(checkpoint, range(30), out=whole, sampler=QUICK)
    blocks = sorted(work_folder(interrupted).glob("block-*.npz"))
    assert len(blocks) == 3
    blocks[1].write_bytes(blocks[1].read_bytes()[:200])  # a block that a crash of the machine cut off
    (work_folder(interrupted) / ".block-000003.npz.1234.partial").write_bytes(b"half")
    told = []
    result = generate(
        checkpoint, range(30), out=interrupted, sampler=QUICK, progress=lambda *values: told.append(values)
    )
    assert result.new == 30 - 8
    assert told[0] == ("sampling", 8, 30)
    assert interrupted.read_bytes() == whole.read_bytes()
    assert not work_folder(interrupted).exists()


def test_other_settings_are_refused_by_name(checkpoint, interrupted, tmp_path):
    for arguments, words in (
        ({"sampler": SamplerConfig(steps=4, batch=4, compile="off")}, r"another run: steps 3 \(now 4\); finish"),
        ({"sampler": SamplerConfig(steps=3, batch=5, rho=5, compile="off")}, r"rho 7.0 \(now 5\), batch 4 \(now 5\)"),
        ({"seeds": range(31)}, r"seeds 0-29 \(now 0-30\)"),
        ({"checkpoint": tiny(tmp_path / "other", label_dim=4)}, r"checkpoint \w{21}… \(now \w{21}…\);"),
    ):
        chosen = {"checkpoint": checkpoint, "seeds": range(30), "sampler": QUICK, "out": interrupted, **arguments}
        with pytest.raises(InputError, match=words):
            generate(**chosen)
    result = generate(checkpoint, range(31), out=interrupted, sampler=QUICK, restart=True)
    assert result.new == 31
    assert not work_folder(interrupted).exists()


def test_work_folder_with_other_things_in_it(checkpoint, tmp_path):
    folder = work_folder(tmp_path / "out.npz")
    folder.mkdir()
    (folder / "thesis.tex").touch()
    with pytest.raises(InputError, match="not part of a run"):
        generate(checkpoint, [0], out=tmp_path / "out.npz", sampler=QUICK)
    (folder / "run.json").write_text("{")
    with pytest.raises(InputError, match="start over with restart=True"):
        generate(checkpoint, [0], out=tmp_path / "out.npz", sampler=QUICK)
    with pytest.raises(InputError, match="not part of a run"):
        generate(checkpoint, [0], out=tmp_path / "out.npz", sampler=QUICK, restart=True)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_compiling_is_decided_once(checkpoint, tmp_path, monkeypatch):
    """An interrupted run that began compiled goes on compiled, whatever the clock says now."""
    compiled = []

    def recorded(denoiser, seeds, *, config):
        compiled.append(config.compile)
        return sample_batches(denoiser, seeds, config=replace(config, compile="off"))

    sample_batches = evaluator.sample_batches
    monkeypatch.setattr(evaluator, "sample_batches", recorded)
    sampler = SamplerConfig(steps=3, batch=2)

    def stop(stage, done, _total):
        if done == 4:
            raise Interruption

    monkeypatch.setattr(evaluator, "worth_compiling", lambda *_: True)
    with pytest.raises(Interruption):
        generate(checkpoint, range(6), out=tmp_path / "out.npz", sampler=sampler, progress=stop)
    monkeypatch.setattr(evaluator, "worth_compiling", lambda *_: False)
    generate(checkpoint, range(6), out=tmp_path / "out.npz", sampler=sampler)
    assert compiled == ["on", "on"]
    generate(checkpoint, range(6), out=tmp_path / "out.npz", sampler=sampler)
    assert compiled[2:] == ["off"]


def test_running_audit_is_the_audit(tmp_path):
    checkpoint = tiny(tmp_path / "model")
    images = generate(checkpoint, range(12), sampler=QUICK).samples.images.numpy()
    others = np.random.default_rng(0).integers(0, 256, (60, 1, 4, 4), dtype=np.uint8)
    others, unseen = others[:50], others[48:]  # two of the holdout images, the first ones, are training images
    # Seeds 3 and 8 are in the training set, 8 even twice: a copy only to those who look past duplicates.
    training = np.concatenate([others, images[[3, 8, 8]]])
    told = []
    result = generate(
        checkpoint, range(12), sampler=QUICK, training=training, holdout=unseen,
        progress=lambda stage, *_: told.append(stage),
    )  # fmt: skip
    assert result.audit.memorized.nonzero()[0].tolist() == [3, 8]
    assert told[-1] == "searching nearest training images" or "sampling" in told[-1]
    running = [stage for stage in told if stage.startswith("sampling:")]
    assert running == [f"sampling: {share} copies so far" for share in ("25.0%", "12.5%", "16.7%")]
    direct = diffmem.audit(images, training, holdout=unseen)
    assert result.audit.count == direct.count
    assert result.audit.holdout.to_dict() == direct.holdout.to_dict()
    assert (result.audit.holdout.total, len(result.audit.holdout.left_out)) == (10, 2)
    assert result.audit.generated.name(8) == "seed 8"
    json.dumps(result.to_dict(), allow_nan=False)


def test_sets_that_do_not_fit_are_found_before_the_work(tmp_path, monkeypatch):
    checkpoint = tiny(tmp_path / "model")
    monkeypatch.setattr(evaluator, "sample_batches", None)  # nothing is sampled
    noise = np.random.default_rng(0).integers(0, 256, (5, 1, 4, 4), dtype=np.uint8)
    for training, holdout, words in (
        (np.zeros((5, 3, 4, 4), np.uint8), None, "3x4x4, but this network generates 1x4x4"),
        (noise.astype(np.float32), None, "float32"),
        (noise[:1], None, "at least two distinct"),
        (noise, noise[:, :, :2, :2], "2x2"),
        (noise, noise[2:], "all 3 images"),
    ):
        with pytest.raises(InputError, match=words):
            generate(checkpoint, [0], sampler=QUICK, training=training, holdout=holdout, out=tmp_path / "out.npz")
    assert not work_folder(tmp_path / "out.npz").exists()


def test_images_that_are_not_finite(tmp_path):
    denoiser = load(tiny(tmp_path / "model"))
    with torch.no_grad():
        next(iter(denoiser.parameters())).fill_(float("nan"))
    save(denoiser, tmp_path / "model")
    with pytest.raises(InputError, match=r"seed 7 and 1 more: the image is not finite"):
        generate(tmp_path / "model", [7, 9], sampler=QUICK)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"solver": "rk45"}, "solver is 'rk45'"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"compile": "maybe"}, "compile is 'maybe'"),
        ({"batch": 0}, "batch is 0"),
        ({"rho": 0.0}, "rho is 0"),
        ({"solver": "unipc", "rho": 7.0}, "its own spacing"),
        ({"S_min": float("nan")}, "must not be negative"),
        ({"solver": "dpm++", "S_churn": 1.0}, "dpm\\+\\+ adds no noise"),
    ],
)
def test_settings_that_make_no_sense(arguments, words):
    with pytest.raises(InputError, match=words):
        SamplerConfig(**arguments)


def test_runs_that_make_no_sense(checkpoint, tmp_path):
    for seeds in ([], [1, 1], [-1]):
        with pytest.raises(InputError, match="distinct whole numbers"):
            generate(checkpoint, seeds)
    for sampler, words in (
        (SamplerConfig(class_index=3), "classes 0 … 2"),
        (SamplerConfig(steps=1), "steps is 1"),
        (SamplerConfig(sigma_min=90.0), "sigma_min < sigma_max"),
    ):
        with pytest.raises(InputError, match=words):
            generate(checkpoint, [0], sampler=sampler)
    with pytest.raises(InputError, match="unconditional"):
        generate(tiny(tmp_path / "plain"), [0], sampler=SamplerConfig(class_index=0))
    with pytest.raises(InputError, match="PNG files hold 1 or 3 channels"):
        generate(tiny(tmp_path / "two", channels=2), [0], out=tmp_path / "two.zip")
