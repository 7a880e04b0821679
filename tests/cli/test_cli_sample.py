"""`diffmem sample` and `diffmem import-edm` as a person or a cluster runs them."""

from __future__ import annotations

import json
import pickle
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from edm_snapshots import network, pretended_edm_modules, snapshot
from golden_networks import golden, golden_denoiser, state_dict
from processes import as_ranks, finished, start_command, start_script

import diffmem
from diffmem.cli import main
from diffmem.evaluation import work_folder
from diffmem.models import EDM, Denoiser, DenoiserConfig, UNetConfig, load, save

# One thread each: networks this small only lose by more, and the same number gives the same bytes.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """An 8×8 gray network with random weights, unconditional."""
    torch.manual_seed(0)
    config = UNetConfig(
        resolution=8, channels=1, model_channels=8, channel_mult=(1, 1), num_blocks=1, attn_resolutions=(4,), dropout=0
    )
    denoiser = Denoiser(DenoiserConfig(config, EDM()))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return save(denoiser, tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    """40 images of noise, of the checkpoint's size."""
    path = tmp_path_factory.mktemp("noise") / "noise.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8))
    return path


@pytest.fixture
def run(capsys):
    """Runs a command line in this process; returns (exit status, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return exit.value.code, captured.out, captured.err

    return run


def assert_same_images(images, expected):
    """Up to one gray level on at most 0.1 % of the pixels."""
    difference = np.abs(np.asarray(images).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3


@pytest.mark.parametrize("name", ["ddpmpp-vp-uncond", "ncsnpp-ve-cond"])
def test_golden_seeds(name, run, tmp_path):
    denoiser, tensors = golden_denoiser(name)
    save(denoiser, tmp_path / "model")
    status, out, _ = run(
        "sample", tmp_path / "model", "--seeds", "0-2,12345", "--batch", 3, "--out", tmp_path / "out.npz"
    )
    assert status == 0
    assert "4 images, NFE 35 each" in out
    with np.load(tmp_path / "out.npz") as file:
        assert file["seeds"].tolist() == [0, 1, 2, 12345]
        assert_same_images(file["images"], tensors["images_uint8"])
        if name == "ncsnpp-ve-cond":
            np.testing.assert_array_equal(file["labels"], tensors["sample_class_index"])
        else:
            assert "labels" not in file


def test_edm_snapshot_is_imported_and_sampled(run, tmp_path, monkeypatch):
    config, tensors = golden("ncsnpp-ve-cond")
    edm = pretended_edm_modules(monkeypatch, tmp_path / "executed")
    pkl, folder = tmp_path / "network-snapshot-000123.pkl", tmp_path / "model"
    pkl.write_bytes(pickle.dumps(snapshot(edm, network(edm, config["precond"], config["kwargs"], state_dict(tensors)))))
    status, out, err = run("import-edm", pkl, folder)
    assert (status, err) == (0, "")
    assert out.strip() == f"{folder}: {load(folder).summary()}"
    assert "images 3x16x16, 404,707 parameters, label_dim 10" in out
    summaries = []
    for source in (pkl, folder):
        status, out, _ = run("sample", source, "--seeds", "5-6", "--steps", 2, "--class", 3, "--json", "--out",
                             f"{source}.npz")  # fmt: skip
        assert status == 0
        summaries.append(json.loads(out))
    assert summaries[0]["checkpoint"]["fingerprint"] == summaries[1]["checkpoint"]["fingerprint"]
    assert Path(f"{pkl}.npz").read_bytes() == Path(f"{folder}.npz").read_bytes()
    assert not (tmp_path / "executed").exists()
    pkl.write_bytes(pickle.dumps({"ema": eval}))
    status, _, err = run("import-edm", pkl, tmp_path / "hostile")
    assert status == 1
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "hostile").exists()


def test_folder_zip_and_npz_hold_the_same(run, checkpoint, tmp_path):
    outs = [tmp_path / "deep" / "er" / name for name in ("out", "out.zip", "out.npz")]
    for out in outs:
        status, text, err = run("sample", checkpoint, "--seeds", "998-1001", "--steps", 3, "--out", out, "--json")
        assert (status, err) == (0, "")
        summary = json.loads(text)
        assert (summary["seeds"], summary["images"], summary["nfe"]) == ("998-1001", 4, 5)
        assert summary["settings"]["steps"] == 3
        assert summary["images_per_second"] > 0
        assert summary["audit"] is None
    sets = [diffmem.load_images(out).images for out in outs]
    np.testing.assert_array_equal(sets[0], sets[2])
    np.testing.assert_array_equal(sets[1], sets[2])
    files = sorted(str(path.relative_to(outs[0])) for path in outs[0].rglob("*.png"))
    assert files == ["000000/000998.png", "000000/000999.png", "001000/001000.png", "001000/001001.png"]
    assert "00000/img00000003.png" in zipfile.ZipFile(outs[1]).namelist()
    assert sorted(path.name for path in outs[0].parent.iterdir()) == ["out", "out.npz", "out.zip"]


def test_batch_size_does_not_matter(run, checkpoint, tmp_path):
    images = []
    for batch in (1, 3, 64):
        out = tmp_path / f"{batch}.npz"
        assert (
            run("sample", checkpoint, "--seeds", "0-6", "--steps", 6, "--batch", batch, "--S_churn", 3, "--out", out)[0]
            == 0
        )
        images.append(np.load(out)["images"])
    assert_same_images(images[0], images[2])
    assert_same_images(images[1], images[2])


def test_audit_as_it_goes(run, checkpoint, noise, tmp_path):
    assert run("sample", checkpoint, "--seeds", "0-9", "--out", tmp_path / "training.npz")[0] == 0
    with np.load(tmp_path / "training.npz") as file:
        np.savez(tmp_path / "training.npz", images=np.concatenate([np.load(noise), file["images"][::2]]))
    arguments = ["sample", checkpoint, "--seeds", "0-9", "--audit", tmp_path / "training.npz"]
    np.save(tmp_path / "unseen.npy", 255 - np.load(noise))
    unseen = ("--holdout", tmp_path / "unseen.npy")
    status, out, err = run(*arguments, "--json", "full", *unseen, "--report", tmp_path / "report")
    assert (status, err) == (0, "")
    summary = json.loads(out)
    assert summary["audit"]["memorized"] == [True, False] * 5
    assert summary["audit"]["holdout"]["total"] == 40
    assert summary["out"] is None
    assert (tmp_path / "report" / "report.html").exists()
    status, out, _ = run(*arguments)
    assert status == 0
    assert "5 of 10 images are copies of one of 45 training images" in out


# A command that gets a signal as soon as it has kept the block of a certain seed.
SIGNALED = """
import os, sys
from diffmem.cli import main
from diffmem.evaluation.seed_store import SeedStore
last, number, *words = sys.argv[1:]
write = SeedStore.write
def write_and_signal(self, records, *rest):
    write(self, records, *rest)
    if int(last) in records.seeds:
        os.kill(os.getpid(), int(number))
SeedStore.write = write_and_signal
main(words)
"""


def test_interrupted_and_killed_runs_go_on(run, checkpoint, tmp_path):
    """Ctrl-C, then kill -9, then to the end: the bytes of a run that nobody disturbed."""
    arguments = ["sample", checkpoint, "--seeds", "0-11", "--steps", 4, "--batch", 1, "--json", "--out"]
    disturbed, undisturbed = tmp_path / "disturbed.npz", tmp_path / "undisturbed.npz"
    assert run(*arguments, undisturbed)[0] == 0
    for last, stop, status in ((2, signal.SIGINT, 130), (5, signal.SIGKILL, -9)):
        done = finished(start_script(SIGNALED, last, int(stop), *arguments, disturbed, env=ONE_THREAD))
        assert done.returncode == status, done.stderr
        assert not disturbed.exists()
        assert len(list(work_folder(disturbed).glob("block-*.npz"))) == last + 1
        if stop == signal.SIGINT:
            assert "the same command resumes from there" in done.stderr
            assert "Traceback" not in done.stderr
    status, out, _ = run(*arguments, disturbed)
    assert status == 0
    assert json.loads(out)["new"] == 12 - 6
    assert disturbed.read_bytes() == undisturbed.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disturbed.npz", "undisturbed.npz"]


def test_two_ranks(run, checkpoint, noise, tmp_path):
    """As torchrun starts them; the README's test runs torchrun itself."""
    arguments = ["sample", checkpoint, "--seeds", "3-15", "--batch", 2, "--audit", noise, "--json", "--out"]
    result = as_ranks(2, start_command, *arguments, tmp_path / "two.npz")
    assert result.returncode == 0, result.stderr[-3000:]
    status, out, _ = run(*arguments, tmp_path / "one.npz")
    assert status == 0
    two, one = json.loads(result.stdout), json.loads(out)
    assert two["new"] == one["new"] == 13
    assert two["audit"]["count"] == one["audit"]["count"]
    with np.load(tmp_path / "two.npz") as file, np.load(tmp_path / "one.npz") as other:
        np.testing.assert_array_equal(file["seeds"], other["seeds"])
        assert_same_images(file["images"], other["images"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "two.npz"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "nothing to do: give --out, --audit, or both"),
        (["--seeds", "5-3", "--out", "out.npz"], 2, "ends before it begins"),
        (["--solver", "rk45", "--out", "out.npz"], 2, "rk45"),
        (["--solver", "dpm++", "--churn", "1", "--out", "out.npz"], 2, "adds no noise"),
        (["--solver", "unipc", "--rho", "7", "--out", "out.npz"], 2, "its own spacing"),
        (["--class", "-1", "--out", "out.npz"], 2, "x>=0"),
        (["--report", "report", "--out", "out.npz"], 2, "--report goes with --audit"),
        (["--restart", "--audit", "builtin:digits"], 2, "--restart goes with --out"),
        (["--audit", "missing.zip"], 2, "missing.zip does not exist"),
        (["--class", "3", "--out", "out.npz"], 1, "unconditional"),
        (["--sigma-min", "5", "--sigma-max", "1", "--out", "out.npz"], 1, "sigma_min < sigma_max"),
        (["--out", "out.jpg"], 1, "written as .npz, as .zip"),
        (["--out", "taken"], 1, "taken: exists already"),
        (["--out", "file/out.npz"], 1, "file/out.npz: cannot be written"),
        (["--device", "abacus", "--out", "out.npz"], 1, "device 'abacus' is unknown"),
        (["--audit", "builtin:patches"], 1, "3x32x32, but this network generates 1x8x8"),
    ],
)
def test_bad_usage(arguments, status, words, run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "cat.png").touch()
    found, out, err = run("sample", checkpoint, *arguments)
    assert found == status
    assert words in " ".join(err.replace("│", " ").split())
    assert out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


def test_checkpoints_that_are_none(run, tmp_path):
    assert run("sample", tmp_path / "missing", "--out", tmp_path / "out.npz")[0] == 2
    for source in ("empty", "text.pkl"):
        path = tmp_path / source
        path.write_text("hello") if path.suffix else path.mkdir()
        status, _, err = run("sample", path, "--out", tmp_path / "out.npz")
        assert status == 1
        assert str(path) in err
        assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out.npz.partial").exists()
