"""`diffmem optimum` as a person runs it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from diffmem.cli import main


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_copies_and_fewer_of_them(capsys, tmp_path):
    command = ["optimum", "sample", "builtin:digits", "--size", "100", "--cond", "--seeds", "0-29"]
    status, out, _ = run(capsys, *command, "--out", tmp_path / "copies.npz")
    assert status == 0
    assert "optimum of 100 images 1x8x8" in out
    assert "30 of 30 images are copies" in out
    with np.load(tmp_path / "copies.npz") as file:
        assert file["images"].shape == (30, 1, 8, 8)
        assert sorted(set(file["labels"])) <= list(range(10))
    assert [path.name for path in tmp_path.iterdir()] == ["copies.npz"]
    status, out, _ = run(capsys, *command, "--regularize", "tikhonov:1", "--json")
    assert status == 0
    assert json.loads(out)["audit"]["ratio"] == 0


def test_a_network_is_compared(capsys, tmp_path):
    network = ["--num-channels", "8", "--channel-mult", "1", "--num-blocks", "1"]
    settings = ["--images", "16", "--batch", "8", "--warmup-epochs", "0", "--grid", "0", "--compile", "no"]
    data = ["--size", "50"]
    status, *_ = run(
        capsys, "train", "--data", "builtin:digits", *data, *network, *settings, "--device", "cpu", "--out",
        tmp_path / "run",
    )  # fmt: skip
    assert status == 0
    few = ["--noisy-images", "6", "--levels", "5"]
    command = ["optimum", "compare", "builtin:digits", tmp_path / "run", *data, *few]
    status, out, err = run(
        capsys, *command, "--steps", "3", "--holdout", "builtin:digits", "--out", tmp_path / "report"
    )
    assert status == 0
    assert "50 of 1,797 images of builtin:digits are training images" in err
    assert "on 6 training, 6 unseen, 6 generated noisy images" in out
    assert "At no noise level has the model memorized its training set" in out  # it has hardly been trained
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "compare.csv", "compare.html", "compare.json", "compare.svg",
    ]  # fmt: skip
    page = (tmp_path / "report" / "compare.html").read_text()
    assert page.count('src="data:image/png') == 6 * (3 * 6 + 1)
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", "")
    rows = (tmp_path / "report" / "compare.csv").read_text().splitlines()
    assert len(rows) == 6
    assert rows[0].startswith("sigma,training_gap,training_gap_low,training_gap_high")
    status, out, _ = run(capsys, *command, "--steps", "3", "--json")
    found = json.loads(out)
    assert list(found["sets"]) == ["training", "generated"]
    assert found["memorization_score"] is None
    status, _, err = run(capsys, *command, "--size", "60")
    assert status == 1
    assert "was trained on" in err


def test_a_sweep_and_its_page(capsys, tmp_path):
    command = ["optimum", "sweep", "builtin:digits", "tikhonov:0,1"]
    options = ["--size", "100", "--steps", "6", "--out", tmp_path]
    status, out, _ = run(capsys, *command, "bayes:exp(-60)", "--seeds", "0-9", *options)
    assert status == 0
    assert "half of the images are copies" not in out  # c = 0 is on no logarithmic axis
    assert (tmp_path / "sweep.csv").read_text().splitlines()[1].startswith("tikhonov,0,10,10,1,")
    assert (tmp_path / "sweep.html").read_text().count('class="strip"') == 3
    for kind in ("tikhonov", "bayes"):
        with Image.open(tmp_path / f"{kind}.png") as picture:
            assert picture.width == 8 * (32 + 4)
    status, out, _ = run(capsys, *command, "--seeds", "0-11", *options, "--json")
    points = json.loads(out)["points"]
    assert [(point["variant"], point["count"], point["total"]) for point in points] == [
        ("tikhonov:0", 12, 12),
        ("tikhonov:1", 0, 12),
    ]


SAMPLE, COMPARE, SWEEP = (["optimum", name, "builtin:digits"] for name in ("sample", "compare", "sweep"))
OLD = ["optimum", "builtin:digits"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([*SAMPLE, "--no-audit"], 2, "nothing to do: give --out"),
        ([*SAMPLE, "--regularize", "ridge:1"], 2, "is not a regularization"),
        ([*SAMPLE, "--class", "3"], 2, "--class goes with --cond"),
        ([*SAMPLE, "--levels", "9"], 2, "No such option"),
        ([*SAMPLE, "--audit"], 2, "are always audited against SOURCE"),
        ([*SAMPLE, "--out", "o.npz", "--no-audit", "--report", "r"], 2, "--report does not go with --no-audit"),
        ([*SAMPLE, "--out", "o.npz", "--no-audit", "--max-copies", "1"], 2, "--max-copies does not go with --no-audit"),
        ([*SAMPLE, "--restart"], 2, "--restart goes with --out"),
        ([*SAMPLE, "--subset", "9999"], 1, "subset: 9999 images cannot be drawn"),
        ([*SAMPLE, "--size", "9999"], 1, "largest possible size"),
        ([*COMPARE, ".", "--audit"], 2, "No such option"),
        ([*COMPARE, "."], 1, "no config.json in it"),
        ([*SWEEP, "smooth", "--regularize", "smooth:1", "--out", "r"], 2, "No such option"),
        ([*SWEEP, "smooth"], 2, "Missing option '--out'"),
        ([*SWEEP, "ridge", "--out", "r"], 2, "is not a sweep"),
        ([*OLD, "--audit"], 2, "write `diffmem optimum sample SOURCE"),
        ([*OLD, "--compare", "run", "--images", "8"], 2, "write `diffmem optimum compare SOURCE CHECKPOINT"),
        (["optimum", "--sweep=smooth", "builtin:digits"], 2, "write `diffmem optimum sweep SOURCE"),
    ],
)
def test_bad_usage(capsys, tmp_path, monkeypatch, arguments, status, words):
    monkeypatch.chdir(tmp_path)
    found, out, err = run(capsys, *arguments)
    assert found == status
    assert words in " ".join(err.replace("│", " ").split())
    assert out == ""
    assert list(tmp_path.iterdir()) == []
