"""The examples work: notebooks cell by cell, and what CI systems are told to run."""

import ast
import json
import os
import subprocess
from pathlib import Path

import pytest
from processes import finished, start_script
from test_docs import options_of

from diffmem.cli import cli, main

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
RUN = """
import ast, json, sys
names = {"__name__": "__main__"}
for code in json.load(open(sys.argv[1])):
    tree, last = ast.parse(code), None
    if isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, "cell", "exec"), names)
    if last is not None and (value := eval(compile(last, "cell", "eval"), names)) is not None:
        print("shown:", value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path):
    """Its cells run in their order, what is shown at their ends has pictures, and it is stored as it was run."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    (tmp_path / "cells.json").write_text(json.dumps(["".join(cell["source"]) for cell in cells]))
    result = finished(start_script(RUN, tmp_path / "cells.json", cwd=tmp_path, env={"OMP_NUM_THREADS": "1"}))
    assert result.returncode == 0, result.stderr[-3000:]
    shown = [line for line in result.stdout.split("shown: ") if "<" in line]
    assert any("data:image/png" in each for each in shown)
    stored = json.dumps([cell["outputs"] for cell in cells])
    assert "data:image/png" in stored
    assert "are copies of one of" in stored
    assert '"output_type": "error"' not in stored


def test_there_are_two_notebooks():
    assert len(NOTEBOOKS) == 2


def ci(name: str) -> dict:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load((EXAMPLES / "ci" / name).read_text())


def test_the_action_passes_on_what_the_gate_decided(tmp_path, monkeypatch):
    action = ci("action.yml")
    step = next(step for step in action["runs"]["steps"] if step.get("id") == "audit")
    assert set(step["env"].values()) == {
        f"${{{{ inputs.{name} }}}}" for name in action["inputs"] if name != "requirement"
    }  # fmt: skip
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "diffmem"
    # What the step calls is run in this process, which has imported everything; the step gets what it said.
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > called\necho "60 of 60 images are copies"\nexit 3\n')
    command.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}",
        "GENERATED": "builtin:digits", "TRAINING": "builtin:digits", "HOLDOUT": "", "REQUIRE_BELOW": "0.05",
        "OPTIONS": "--limit 60 --device cpu", "GITHUB_OUTPUT": str(tmp_path / "out"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }  # fmt: skip
    shell = ["bash", "-e", "-o", "pipefail", "-c", step["run"]]
    result = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 3, result.stdout + result.stderr
    assert (tmp_path / "out").read_text() == "state=closed\n"
    assert "60 of 60 images are copies" in (tmp_path / "summary").read_text()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main((tmp_path / "called").read_text().splitlines())
    assert end.value.code == 3
    assert 'failures="1"' in (tmp_path / "diffmem-gate.xml").read_text()
    assert (tmp_path / "diffmem-report" / "report.html").exists()


def test_the_workflows_call_commands_with_options_that_exist():
    workflow, gitlab = ci("pre-merge.yml"), ci("gitlab-ci.yml")
    steps = workflow["jobs"]["copies"]["steps"]
    lines = [step["run"] for step in steps if "run" in step] + gitlab["copies"]["script"]
    used = next(step["with"] for step in steps if step.get("uses", "").endswith("/audit"))
    assert set(used) <= set(ci("action.yml")["inputs"])
    commands = [line.split() for line in lines if line.startswith("diffmem ")]
    assert len(commands) == 3
    for words in commands:
        assert {word for word in words if word.startswith("--")} <= options_of(cli.commands[words[1]])
    assert ast.literal_eval(str(gitlab["copies"]["artifacts"]["reports"])) == {"junit": "gate.xml"}
