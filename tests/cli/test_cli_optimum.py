"""`diffmem optimum` as a person runs it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from diffmem.cli import main


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_copies_and_fewer_of_them(capsys, tmp_path):
    command = ["optimum", "builtin:digits", "--size", "100", "--cond", "--seeds", "0-29", "--audit"]
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


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "nothing to do"),
        (["--audit", "--regularize", "ridge:1"], 2, "is no regularization"),
        (["--audit", "--class", "3"], 2, "--class goes with --cond"),
        (["--out", "o.npz", "--report", "r"], 2, "--report goes with --audit"),
        (["--audit", "--subset", "9999"], 1, "subset: 9999 images cannot be drawn"),
        (["--audit", "--size", "9999"], 1, "largest possible size"),
    ],
)
def test_bad_usage(capsys, tmp_path, monkeypatch, arguments, status, words):
    monkeypatch.chdir(tmp_path)
    found, out, err = run(capsys, "optimum", "builtin:digits", *arguments)
    assert found == status
    assert words in " ".join(err.replace("│", " ").split())
    assert out == ""
    assert list(tmp_path.iterdir()) == []
