"""`diffmem index` from the command line."""

import json

import numpy as np
from command_line import run

from diffmem.models import Denoiser, preset, save


def test_build_add_info_verify(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
    values[50] = values[7]
    np.save(tmp_path / "one.npy", values[:40])
    np.save(tmp_path / "two.npy", values[40:])
    out = tmp_path / "index"
    built = run("index", "build", tmp_path / "one.npy", out, "--shards", "4", "--memory", "1GB", "--json")
    assert built.returncode == 0, built.stderr
    assert "memory: at most" in built.stderr
    about = json.loads(built.stdout)
    assert (about["rows"], about["shards"], about["dimension"], about["image_shape"]) == (40, 4, 192, [3, 8, 8])
    added = run("index", "add", out, tmp_path / "two.npy")
    assert added.returncode == 0, added.stderr
    for line in ("60 rows in 6 shards", "pixels, uint8 × 192", "2 rows in 1 groups, identical", "two.npy"):
        assert line in added.stdout, added.stdout
    full = json.loads(run("index", "info", out, "--json", "full").stdout)
    assert [entry["rows"] for entry in full["shards"]] == [10] * 6
    assert run("index", "verify", out).stdout == f"{out}: 6 shards with 60 rows are intact\n"

    victim = full["shards"][2]["address"]
    (out / "shards" / victim / "vectors.npy").unlink()
    found = run("index", "verify", out)
    assert found.returncode == 1
    assert f"shard {victim}, made from {tmp_path}/one.npy (20 to 29): vectors.npy is missing" in found.stderr
    assert f"repair it with `diffmem index verify {out} --rebuild`" in found.stderr
    assert run("index", "verify", out, "--rebuild").returncode == 0
    assert json.loads(run("index", "verify", out, "--json").stdout)["intact"]


def test_errors_name_the_flag_and_a_way_out(tmp_path):
    assert "does not exist" in run("index", "build", tmp_path / "none", tmp_path / "index").stderr
    few = run("index", "build", "builtin:digits", tmp_path / "index", "--memory", "1MB")
    assert (few.returncode, "--memory is 1 MB, but must be at least 450 MB here" in few.stderr) == (1, True)
    assert "make one with `diffmem index build" in run("index", "info", tmp_path).stderr
    aligned = run("index", "build", "builtin:digits", tmp_path / "index", "--features", "aligned")
    assert "build the index with --features pixels" in aligned.stderr


def test_where_an_index_stands_for_training_images_and_where_it_cannot(tmp_path):
    index = tmp_path / "digits.index"
    assert run("index", "build", "builtin:digits", index).returncode == 0
    save(Denoiser(preset("ddpmpp_8", channels=1, model_channels=16)), tmp_path / "model")
    words = ["sample", tmp_path / "model", "--seeds", "0-3", "--steps", "2", "--json", "--audit"]
    ours, theirs = (run(*words, training) for training in (index, "builtin:digits"))
    assert ours.returncode == 0, ours.stderr
    assert json.loads(ours.stdout)["audit"]["count"] == json.loads(theirs.stdout)["audit"]["count"]
    for done in (
        run("measure", "builtin:digits", index),
        run("dataset", index, tmp_path / "x.zip"),
        run(*words, index, "--holdout", index),
    ):
        assert done.returncode == 1
        assert "an index of training images, not the images" in done.stderr
        assert "diffmem index info" in done.stderr
