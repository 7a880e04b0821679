"""Messages name only options that the command has: the library names its parameters, the command line its flags."""

import ast
import re
from functools import cache
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import diffmem
from diffmem.cli import cli
from diffmem.cli.options import NAMED_PARAMETERS, in_options

PACKAGE = Path(diffmem.__file__).parent
RECOMMENDED = re.compile(r"\b(?:with|pass|choose|take|or|and) ([a-z_]+)=(?:['…\d]|True|N\b|\{…\})")
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")


def commands(group=cli, name=""):
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from commands(command, f"{name}{command.name} ")
        else:
            yield f"{name}{command.name}", command


def flags_of(command):
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


COMMANDS = dict(commands())


@cache
def messages():
    return list(_messages())


def _messages():
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("cli", "demo"):
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        inner = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in nodes:
            if isinstance(node, (ast.JoinedStr, ast.Constant)) and id(node) not in docstrings | inner:
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                words = "".join(str(part.value) if isinstance(part, ast.Constant) else "{…}" for part in parts)
                if " " in words:
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}", words


def test_the_library_names_no_flags():
    found = messages()
    assert len(found) > 300
    for where, text in found:
        text = re.sub(r"`diffmem [^`]*`", "", text)  # a whole command
        assert not FLAG.search(text), f"{where}: {text}"


def test_parameters_that_messages_recommend_are_options_somewhere():
    """Whatever a message says to pass, some command has a flag for, and `in_options` knows which."""
    recommended = {name for _, text in messages() for name in RECOMMENDED.findall(text)}
    assert {"resize", "color", "key", "layout", "skip_bad", "alpha", "labels"} <= recommended
    assert recommended <= {*NAMED_PARAMETERS, "index"}, recommended
    known = {parameter.name for command in COMMANDS.values() for parameter in command.params}
    for name, aliases in NAMED_PARAMETERS.items():
        assert known & set(aliases) or name == "value_range", name


@pytest.mark.parametrize(
    ("name", "command"), list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_translated_messages_name_options_of_the_command(name, command):
    texts = [text.replace("{…}", "16") for _, text in messages()]
    texts += [f"pass {parameter}={value} to go on" for parameter in NAMED_PARAMETERS for value in ("…", "'x'", "True")]
    own = flags_of(command)
    dataset = flags_of(cli.commands["dataset"])
    for text in texts:
        told = re.sub(r"`diffmem [^`]*`", "", in_options(text, command))
        named = set(re.findall(FLAG, told))
        assert named <= own or (named <= own | dataset and " of `diffmem dataset`" in in_options(text, command))


@pytest.mark.parametrize(
    ("name", "command"), list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_help_names_options_that_exist(name, command):
    everywhere = set().union(*(flags_of(each) for each in COMMANDS.values())) | {"--nproc-per-node", "--help"}
    text = " ".join(
        [command.help or "", *(parameter.help or "" for parameter in command.params if hasattr(parameter, "help"))]
    )
    for flag in FLAG.findall(text):
        assert flag in everywhere, f"{name}: {flag}"


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def fails(*arguments):
    result = run(*arguments)
    assert result.exit_code != 0
    return " ".join(str(result.exception).split())


def test_what_messages_advise_helps(tmp_path):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "two.npz", a=images, b=images[:, ::-1])
    plain = tmp_path / "plain.npy"
    np.save(plain, images)
    two = tmp_path / "two.npz"
    assert "pick the array of images with --key NAME: a, b" in fails("audit", two, plain)
    assert run("audit", two, plain, "--key", "a").exit_code == 0
    assert run("audit", two, two, "--key", "generated=a", "--key", "training=b").exit_code == 0
    assert "--key NAME" in fails("train", "--data", two, "--dry-run")

    odd = tmp_path / "odd.npy"
    np.save(odd, rng.integers(0, 256, (12, 3, 8, 3), dtype=np.uint8))
    assert "--layout NCHW or --layout NHWC" in fails("audit", odd, odd)
    assert run("audit", odd, odd, "--layout", "nhwc").exit_code == 0
    assert "'xyz' is not one of nchw, nhwc" in run("audit", odd, odd, "--layout", "xyz").output

    folder = tmp_path / "set"
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:02}.png")
    (folder / "99.png").write_bytes(b"broken")
    for command in (
        ["audit", folder, plain], ["dataset", folder, tmp_path / "made.zip"], ["train", "--data", folder, "--dry-run"],
        ["optimum", "sample", folder, "--seeds", "0-1", "--steps", 2, "--device", "cpu"],
    ):  # fmt: skip
        assert "pass --skip-bad to skip such files" in fails(*command), command
        if command[0] in ("audit", "dataset"):
            assert run(*command, "--skip-bad").exit_code == 0
    (folder / "99.png").unlink()
    Image.fromarray(np.dstack([images[0], np.full((8, 8), 128, np.uint8)])).save(folder / "98.png")
    assert "--alpha white or --alpha black, or pass --alpha drop" in fails("audit", folder, plain)
    assert run("audit", folder, plain, "--alpha", "drop").exit_code == 0
    Image.fromarray(images[0, ..., 0]).save(folder / "97.png")
    assert "pass --color rgb or --color gray" in fails("audit", folder, plain, "--alpha", "white")
    for color in ("rgb", "gray", "grey"):
        assert run("audit", folder, plain, "--alpha", "white", "--color", color).exit_code == 0
    Image.fromarray(images[0, :4]).save(folder / "96.png")
    assert "pass --resize N to resize" in fails("audit", folder, plain, "--alpha", "drop", "--color", "rgb")
    assert "pass --resize N to resize" in fails("dataset", folder, tmp_path / "x", "--alpha", "drop", "--color", "rgb")


def test_alpha_of_arrays_and_files_alike(tmp_path):
    rng = np.random.default_rng(2)
    rgba = rng.integers(0, 256, (3, 4, 5, 6), dtype=np.uint8)
    for index, image in enumerate(rgba):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"{index}.png")
    for alpha, background in (("drop", None), ("white", 255), ("black", 0)):
        files = diffmem.load_images(tmp_path, alpha=alpha).images
        arrays = diffmem.load_images(rgba, alpha=alpha).images
        if background is None:
            np.testing.assert_array_equal(files, rgba[:, :3])
            np.testing.assert_array_equal(arrays, files)
            continue
        share = rgba[:, 3:] / 255
        exact = rgba[:, :3] * share + background * (1 - share)
        assert np.abs(files - exact).max() <= 1
        assert np.abs(arrays - exact).max() <= 0.5
        floats = diffmem.load_images(torch.from_numpy(rgba / np.float32(255)), alpha=alpha).images
        np.testing.assert_allclose(floats * 255, exact, atol=1e-3)
    with pytest.raises(diffmem.errors.InputError, match="alpha='white'"):
        diffmem.load_images(rgba, color="rgb")
    rgba[:, 3] = 255
    np.testing.assert_array_equal(diffmem.load_images(rgba, color="rgb").images, rgba[:, :3])
    assert diffmem.load_images(rgba).image_shape == (4, 5, 6)
