"""Labels from the command line: one-hot vectors are classes, others are left out, and what needs them says so."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from diffmem.cli import cli
from diffmem.data import load_images, write_images
from diffmem.data.image_set import ImageSet
from diffmem.errors import InputError

DIGITS = load_images("builtin:digits", limit=200)
TINY = ["--num-channels", 8, "--channel-mult", 1, "--num-blocks", 1, "--batch", 8, "--images", 8]


def invoke(*arguments):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if not isinstance(result.exception, (SystemExit, type(None))):
        result.stderr_bytes += str(result.exception).encode()
    return result


@pytest.fixture
def with_labels(tmp_path):
    """Digits, as EDM's zip or as .npz, with these labels."""

    def make(name, labels):
        path = tmp_path / name
        write_images(ImageSet(DIGITS.images, labels=labels), path)
        return path

    return make


def test_one_hot_labels_are_classes_in_every_command(tmp_path, with_labels):
    source = with_labels("one-hot.zip", np.eye(10, dtype=np.float32)[DIGITS.labels])
    few = with_labels("few.zip", DIGITS.labels)
    for command in (
        ("optimum", "--cond", "--seeds", "0-31", "--size", 50, "--device", "cpu"),
        ("dataset", "--size", 20),
    ):
        made = []
        for read in (source, few):
            out = tmp_path / f"{len(made)}.npz"
            arguments = [command[0], read, out, *command[1:]]
            if command[0] == "optimum":
                arguments = [command[0], "sample", read, "--out", out, *command[1:]]
            result = invoke(*arguments)
            assert result.exit_code == 0, result.output
            made.append(load_images(out))
            out.unlink()
        np.testing.assert_array_equal(made[0].images, made[1].images)
        np.testing.assert_array_equal(made[0].labels, made[1].labels)
    assert np.bincount(made[0].labels).tolist() == [2] * 10
    result = invoke("train", "--data", source, "--size", 20, "--cond", *TINY, "--dry-run")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout[: result.stdout.rindex("}") + 1])["denoiser"]["network"]["label_dim"] == 10


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (None, "--cond needs labels, but there are none"),
        (np.full((200, 3), 0.5, np.float32), "its labels are vectors of length 3 that are not one-hot"),
        (DIGITS.labels - 1, "are negative (the first: -1 of"),
        (DIGITS.labels * 10**15, "is too large to be one"),
        (DIGITS.labels * 7, "54 of the class numbers 0 to 63 do not occur (the first: 1)"),
    ],
)
def test_labels_that_the_conditional_optimum_cannot_use(tmp_path, with_labels, labels, says):
    source = with_labels("set.zip", labels)
    for use in (["sample", source, "--out", tmp_path / "x.npz"], ["sweep", source, "tikhonov:0.1", "--out", tmp_path]):
        result = invoke("optimum", *use, "--cond", "--seeds", "0-3", "--device", "cpu")
        assert result.exit_code != 0
        assert says in " ".join(str(result.exception).split())
    assert not (tmp_path / "x.npz").exists()
    if labels is not None and labels.ndim == 1:
        assert "--labels consecutive of `diffmem dataset`" in str(result.exception)
        assert invoke("dataset", source, tmp_path / "fixed.zip", "--labels", "consecutive").exit_code == 0
        np.testing.assert_array_equal(load_images(tmp_path / "fixed.zip").labels, DIGITS.labels)
    gaps = says.startswith("54 of")  # a network has inputs for them all the same
    result = invoke("train", "--data", source, "--cond", *TINY, "--dry-run")
    assert (result.exit_code == 0) == (gaps or (labels is not None and labels.ndim == 2))
    assert (f"note: {source}: {says}" in result.stderr) == gaps
    if not gaps:
        result = invoke("emm", "--data", source, "--cond", *TINY, "--out", tmp_path / "emm")
        assert isinstance(result.exception, InputError)


def test_text_labels_do_not_stop_what_does_not_use_them(tmp_path):
    source = tmp_path / "set"
    write_images(ImageSet(DIGITS.images), source)
    names = load_images(source).names
    (source / "dataset.json").write_text(json.dumps({"labels": [[name, "digit"] for name in names]}))
    note = f"note: labels are ignored: {source}: dataset.json: the label of {names[0]} is"
    for command in (
        ["audit", source, source, "--limit", 5],
        ["dataset", source, tmp_path / "a.zip", "--size", 10],
        ["train", "--data", source, *TINY, "--dry-run"],
        ["optimum", "sample", source, "--seeds", "0-3", "--steps", 2, "--out", tmp_path / "x.npz", "--device", "cpu"],
    ):
        result = invoke(*command)
        assert result.exit_code == 0, (command, result.output)
        assert note in result.stderr
    result = invoke("train", "--data", source, "--cond", *TINY, "--dry-run")
    assert "there are none that can be used" in str(result.exception)
    assert "is 'digit'" in str(result.exception)


def test_a_set_without_labels_makes_a_set_without_labels(tmp_path):
    write_images(ImageSet(DIGITS.images), tmp_path / "plain.zip")
    result = invoke("dataset", tmp_path / "plain.zip", tmp_path / "a.zip", "--size", 7)
    assert result.exit_code == 0, result.output
    assert "the subset is the first 7 images" in result.stderr
    made = load_images(tmp_path / "a.zip")
    assert made.labels is None
    np.testing.assert_array_equal(made.images, DIGITS.images[:7])
