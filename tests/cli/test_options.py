"""An option means the same in every command: one type, and a help text that begins alike."""

from __future__ import annotations

import re
from collections import defaultdict

import click
import pytest
from click.testing import CliRunner

from diffmem.cli import cli


def options(group=cli, name=""):
    """(command, option) of all commands, but for options that only say where they are now."""
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from options(command, f"{name}{command.name} ")
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                yield f"{name}{command.name}", parameter


BY_FLAG = defaultdict(list)
for command, option in options():
    for flag in option.opts:
        BY_FLAG[flag].append((command, option))
SHARED = {flag: uses for flag, uses in BY_FLAG.items() if len(uses) > 1}


def stem(option):
    """How the help text begins: what is said before the first full stop, colon, semicolon or bracket."""
    return re.split(r"[.:;(\[]", option.help or "", maxsplit=1)[0].strip()


def kind(option):
    if option.is_flag:
        return "flag"
    return type(option.type).__name__.removesuffix("ParamType").removesuffix("Range")


def test_there_are_options():
    assert len(BY_FLAG) > 90
    assert {"--out", "--seeds", "--batch", "--device", "--threads", "--images", "--json", "--compile"} <= set(SHARED)


@pytest.mark.parametrize("flag", sorted(SHARED))
def test_an_option_means_the_same_everywhere(flag):
    uses = SHARED[flag]
    stems = {command: stem(option) for command, option in uses}
    assert len(set(stems.values())) == 1, stems
    kinds = {command: kind(option) for command, option in uses}
    assert len(set(kinds.values())) == 1, kinds
    if "Choice" in kinds.values():  # one command may know more of the same words
        words = sorted((set(option.type.choices) for _, option in uses), key=len)
        assert all(few <= words[-1] for few in words), words
    several = "--value-range", "--runs"  # of one thing, or of several
    assert len({option.multiple for _, option in uses}) == 1 or flag in several
    assert len({option.nargs for _, option in uses}) == 1


def test_every_option_says_what_it_is():
    silent = [f"{command} {option.opts[0]}" for command, option in options() if not stem(option)]
    assert not silent


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["emm", "--data", "builtin:digits", "--out", "o", "--sizes", "3:12"], "--size-range MIN:MAX"),
        (["emm", "--data", "builtin:digits", "--out", "o", "--seeds", "3"], "runs per size are --repetitions"),
        (
            ["emm", "--data", "builtin:digits", "--out", "o", "--precision", "5%"],
            "the precision of EMM is --half-width",
        ),
        (["study", "run", "size", "--out", "o", "--seeds", "3"], "runs per cell are --repetitions"),
        (["study", "show", "size", "--out", "o"], "the folder of runs is --runs here"),
        (["study", "report", "--out", "."], "--runs is missing"),
        (["study", "report", "--runs", ".", "--to", "o"], "the folder of the report is --out"),
        (["optimum", "sweep", "builtin:digits", "smooth", "--report", "o"], "the output folder of a sweep is --out"),
        (["optimum", "compare", "builtin:digits", ".", "--images", "9"], "use --noisy-images"),
    ],
)
def test_options_that_meant_something_else_say_where_they_are_now(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []
