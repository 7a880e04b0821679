"""The README's commands and code work as written, in the README's order, each in what the ones before it left."""

import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from edm_snapshots import network, pretended_edm_modules, snapshot
from golden_networks import golden, state_dict
from processes import finished, start_command, start_script

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^\$ (.*)", re.MULTILINE)
SNAPSHOT = "network-snapshot-012000.pkl"
# Two minutes are promised, on two cores that do nothing else: here other tests run beside.
LONGEST = 900


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the examples run. There lies what the README does not make: a snapshot of EDM's, here a tiny one."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        config, tensors = golden("ncsnpp-ve-cond")
        edm = pretended_edm_modules(patch, folder / "executed")
        net = network(edm, config["precond"], config["kwargs"], state_dict(tensors))
        (folder / SNAPSHOT).write_bytes(pickle.dumps(snapshot(edm, net)))
    return folder


def test_there_are_examples():
    assert {language for language, _ in EXAMPLES} == {"bash", "console", "python"}


@pytest.mark.parametrize(("language", "code"), EXAMPLES, ids=lambda value: value.strip().splitlines()[0][:40])
def test_example(language, code, folder):
    if language == "python":
        results = [finished(start_script(code, cwd=folder), LONGEST)]
    else:
        lines = COMMANDS.findall(code) if language == "console" else code.splitlines()
        results = [run(line, folder) for line in lines]
    assert results
    for result in results:
        assert result.returncode == 0, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
    assert not (folder / "executed").exists()


def run(line: str, folder: Path) -> subprocess.CompletedProcess:
    """A line of a shell: a command of diffmem, whose output may go to a file, in a process that has imported PyTorch;
    all else by the shell itself."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    operators = [word for word in words if set(word) <= set("();<>|&")]
    if words[0] == "diffmem" and (not operators or operators == [words[-2]] == [">"]):
        result = finished(start_command(*words[1 : -2 if operators else None], cwd=folder), LONGEST)
        if operators:
            (folder / words[-1]).write_text(result.stdout)
        return result
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euxc", line], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True,
        timeout=LONGEST,
    )  # fmt: skip


def test_the_shell_runs_what_is_more_than_a_command(tmp_path):
    assert run("printf 'one\\ntwo\\n' | head -1", tmp_path).stdout == "one\n"
    assert run("diffmem info --nonsense", tmp_path).returncode == 2
    assert run("diffmem info --json > info.json", tmp_path).returncode == 0
    assert '"torch"' in (tmp_path / "info.json").read_text()


def test_commands_need_nothing_that_a_new_user_does_not_have():
    """Beside the built-in sets and what earlier commands made, commands name one file that others give: EDM's."""
    commands = [line for language, code in EXAMPLES if language in ("bash", "console") for line in code.splitlines()]
    inputs = re.findall(r"[\w.-]+\.(?:zip|pkl|npz|pt|tar\.gz)", "\n".join(commands))
    assert set(inputs) == {SNAPSHOT, "train-1k.zip", "samples.npz", "samples.zip"}


def test_the_table_is_that_of_the_results():
    from benchmarks.readme_table import with_table

    assert with_table(README) == README
