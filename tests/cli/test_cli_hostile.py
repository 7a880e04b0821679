"""Forged files on the command line: status 1, one line that names the file, and nothing executed or written."""

from pathlib import Path

import pytest

from diffmem.cli import main

HOSTILE = Path(__file__).parents[1] / "hostile"


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pickles", "pickles2", "cifar"])
def test_forged_files(kind, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in sorted((HOSTILE / kind).iterdir()):
        command = ("audit", path, path, "--out", "report") if kind == "cifar" else ("import-edm", path, "model")
        code, message = call(capsys, *command)
        assert code == 1, (path, message)
        assert str(path) in message
        assert len(message.strip().splitlines()) == 1, message
        assert not (tmp_path / "model").exists()
    assert {path.name for path in tmp_path.rglob("*")} <= {"report"}, "something was executed"
