"""`diffmem dataset` as a person runs it: what lies in the new archive, what is printed, what is refused."""

import hashlib
import json
import zipfile

import pytest
from click.testing import CliRunner
from command_line import run
from processes import finished, start_command

from diffmem.cli import cli
from diffmem.data import class_balanced, derive, load_images, write_edm_zip
from diffmem.errors import InputError


def invoke(*arguments):
    return CliRunner().invoke(cli, ["dataset", *map(str, arguments)])


def test_a_set_is_made_twice_alike(tmp_path):
    arguments = ("--size", 100, "--classes", 5, "--labels", "random:3", "--label-seed", 7, "--resize", 6)
    assert invoke("builtin:digits", tmp_path / "a.zip", *arguments).exit_code == 0
    # Another process, with hash seeds of its own: those of the server whose fork it is.
    result = finished(start_command("dataset", "builtin:digits", tmp_path / "b.zip", *arguments, "--json"))
    assert result.returncode == 0, result.stderr
    assert len({hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("a.zip", "b.zip")}) == 1
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        manifest = json.loads(archive.read("manifest.json"))
    assert json.loads(result.stdout) == {"path": str(tmp_path / "b.zip"), **manifest}
    expected = derive("builtin:digits", size=100, classes=5, labels="random:3", label_seed=7, resolution=6)
    assert manifest == expected.manifest
    assert load_images(tmp_path / "b.zip").fingerprint == expected.images.fingerprint


def test_summary_of_a_mixture(tmp_path):
    digits = load_images("builtin:digits")
    write_edm_zip(digits.select(slice(900, None)), tmp_path / "other.zip")
    result = invoke(
        "builtin:digits", tmp_path / "a", "--limit", 900, "--size", 200, "--mix", tmp_path / "other.zip",
        "--share", 0.25, "--class", 3,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}/a: 200 images of 1x8x8, 10 classes." in result.output
    assert "mixed(other=other.zip, share=0.25, class_index=3, seed=None)" in result.output
    changed = load_images(tmp_path / "a").images != class_balanced(digits.select(slice(900)), 200).images
    assert changed.any(axis=(1, 2, 3)).sum() == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.zip", "a.zip"], "missing.zip does not exist"),
        (["builtin:digits"], "Missing argument"),
        (
            ["builtin:digits", "a.zip", "--labels", "random"],
            "labels must be true, consecutive, none, unique or random:C",
        ),
        (["builtin:digits", "a.zip", "--label-seed", "1"], "--label-seed is for --labels random:C"),
        (["builtin:digits", "a.zip", "--mix", "builtin:digits"], "--mix, --share and --class go together"),
        (["builtin:digits", "a.zip", "--share", "2"], "0<=x<=1"),
        (["source.zip", "./source.zip"], "is also an input"),
    ],
)
def test_wrong_usage(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_edm_zip(load_images("builtin:digits", limit=3), "source.zip")
    before = (tmp_path / "source.zip").read_bytes()
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())
    assert [path.name for path in tmp_path.iterdir()] == ["source.zip"]
    assert (tmp_path / "source.zip").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.zip", "--size", "5000"], "the largest possible size is 1,746"),
        (["a.zip", "--classes", "11"], "1 to 10 are possible"),
        (["a.zip", "--mix", "builtin:patches?n=9", "--share", "0.5", "--class", "1"], "cannot be mixed"),
        (["a.tar"], "written as .zip, as .npz"),
        (["absent/a.zip"], "there is no folder absent"),
        ([""], "exists already"),
    ],
)
def test_what_cannot_be_made(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    result = invoke("builtin:digits", *arguments)
    assert isinstance(result.exception, InputError)
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_size_that_cannot_be_met_is_one_line(tmp_path):
    result = run("dataset", "builtin:digits", tmp_path / "a.zip", "--size", 5000)
    assert result.returncode == 1
    assert "largest possible size is 1,746" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert not any(tmp_path.iterdir())
