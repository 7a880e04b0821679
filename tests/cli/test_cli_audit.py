"""`diffmem audit` as a person or a pipeline runs it: whole command lines, their output and exit status."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from processes import finished, start_command

import diffmem
from diffmem.data import ImageSet, write_edm_zip, write_folder
from diffmem.ops.registry import native_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """training.zip: 600 digits; copies.zip: 30 slightly disturbed ones of them and 10 unseen; unseen.zip: 200 more."""
    folder = tmp_path_factory.mktemp("sets")
    digits = diffmem.load_images("builtin:digits")
    copies = digits.images[:30].copy()
    copies[:, 0, 3, 3] ^= 16
    write_edm_zip(digits.select(slice(0, 600)), folder / "training.zip")
    mixture = ImageSet(np.concatenate([copies, digits.images[600:610]]))
    write_edm_zip(mixture, folder / "copies.zip")
    write_edm_zip(digits.select(slice(700, 900)), folder / "unseen.zip")
    with zipfile.ZipFile(folder / "copies.zip") as archive:
        (folder / "one.png").write_bytes(archive.read(archive.namelist()[0]))
    return folder


def test_json_is_the_python_result_and_nothing_else(folder):
    sets = (folder / "copies.zip", folder / "training.zip", "--holdout", folder / "unseen.zip")
    from_python = diffmem.audit(folder / "copies.zip", folder / "training.zip", holdout=folder / "unseen.zip")
    for arguments, expected in (
        ((*sets, "--json", "full"), from_python.to_dict()),
        (("--json=full", *sets), from_python.to_dict()),
        ((*sets, "--json"), from_python.summary()),
        (("--json", *sets), from_python.summary()),  # what follows is no value of --json
    ):
        result = run("audit", *arguments)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout) == json.loads(json.dumps(expected))
    assert json.loads(result.stdout)["count"] >= 30


def test_verdict_and_report(folder, tmp_path):
    out = tmp_path / "new" / "report"
    result = run("audit", folder / "copies.zip", folder / "training.zip", "--out", out)
    assert result.returncode == 0, result.stderr
    assert "of 40 images are copies of one of 600 training images" in result.stdout
    assert "95 % interval" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "samples.csv"]
    report = json.loads((out / "report.json").read_text())
    with open(out / "samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40
    assert sum(int(row["memorized"]) for row in rows) == report["count"]
    assert rows[0]["name"].endswith(".png")
    assert rows[0]["nearest_index"] == "0"
    assert rows[0]["nearest_squared_distance"] == str(16**2)
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "data:image/png;base64," in page


def test_gate(folder, tmp_path):
    sets = (folder / "copies.zip", folder / "training.zip")
    closed = run("audit", *sets, "--fail-above", "0.3", "--json", "--out", tmp_path / "report")
    assert closed.returncode == 3
    assert closed.stderr.startswith("gate closed: the 95 % interval")
    assert json.loads(closed.stdout)["gate"]["state"] == "closed"
    assert (tmp_path / "report" / "report.html").exists()
    undecided = run("audit", *sets, "--require-below", "0.8", "--max-copies", 40)
    assert undecided.returncode == 4
    assert "audit more images" in undecided.stderr
    passed = run("audit", *sets, "--fail-above", "0.8", "--require-below", "0.999", "--max-copies", 40)
    assert (passed.returncode, passed.stderr) == (0, "")
    told = run("audit", *sets, "--max-copies", 3, "--junit", tmp_path / "gate.xml")
    assert told.returncode == 3
    assert '<testcase classname="diffmem audit.gate" name="at most 3 copies">' in (tmp_path / "gate.xml").read_text()


def test_floats_are_told_what_to_do_and_a_black_set_does_not_pass(folder, tmp_path):
    digits = diffmem.load_images("builtin:digits").images
    np.save(tmp_path / "signed.npy", digits[:30].astype(np.float32) / 127.5 - 1)
    np.save(tmp_path / "unit.npy", digits[:600].astype(np.float32) / 255)
    refused = run("audit", tmp_path / "signed.npy", folder / "training.zip")
    assert refused.returncode == 1
    assert "--value-range -1, 1" in refused.stderr.replace(",", ", ").replace("  ", " ")
    mixed = run("audit", tmp_path / "signed.npy", tmp_path / "unit.npy")
    assert mixed.returncode == 1
    options = ["--value-range", "generated=-1,1", "--value-range", "training=0,1"]
    assert " ".join(options) in mixed.stderr
    assert "30 of 30" in run("audit", tmp_path / "signed.npy", tmp_path / "unit.npy", *options).stdout
    np.save(tmp_path / "black.npy", np.zeros_like(digits[:200]))
    gate = run("audit", tmp_path / "black.npy", folder / "training.zip", "--fail-above", "0.1", "--json")
    assert gate.returncode not in (0, 1, 2)
    assert json.loads(gate.stdout)["warnings"]
    assert "of a single color" in gate.stderr
    assert "gate undecided" in gate.stderr


def test_sheets_are_cut(folder, tmp_path):
    digits = diffmem.load_images("builtin:digits").images[:16, 0]
    sheet = digits.reshape(4, 4, 8, 8).swapaxes(1, 2).reshape(1, 1, 32, 32)
    write_folder(ImageSet(sheet), tmp_path / "sheets")
    refused = run("audit", tmp_path / "sheets", folder / "training.zip")
    assert "--resize 8" in refused.stderr
    assert "sheets of 4x4 images" in refused.stderr
    result = run("audit", tmp_path / "sheets", folder / "training.zip", "--split-grid")
    assert "16 of 16" in result.stdout, result.stderr


def test_options_reach_the_audit(folder):
    result = run(
        "audit", "builtin:digits", folder / "training.zip", "--limit", 50, "--flip", "--threshold", "1/2",
        "--duplicates", "keep", "--duplicate-radius", 2, "--resize", 4, "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    metadata = json.loads(result.stdout)
    assert metadata["total"] == 50
    assert metadata["settings"]["generated"]["shape"] == [1, 4, 4]
    chosen = {name: metadata["settings"][name] for name in ("flip", "threshold", "duplicates", "duplicate_radius")}
    assert chosen == {"flip": True, "threshold": "1/2", "duplicates": "keep", "duplicate_radius": 2.0}


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["audit"], 2, "Missing argument"),
        (["audit", "missing.zip", "builtin:digits"], 2, "missing.zip does not exist"),
        (["audit", "builtin:digits", "builtin:digits", "--threshold", "many"], 2, "not a number"),
        (["audit", "builtin:digits", "builtin:digits", "--fail-above", "2"], 2, "0<=x<=1"),
        (["audit", "builtin:digits", "builtin:digits", "--require-below", "nan"], 2, "not a share"),
        (["audit", "builtin:digits", "builtin:patches"], 1, "--color"),
        (["audit", "builtin:digits", "builtin:digits", "--device", "abacus"], 1, "device 'abacus' is unknown"),
        (["audit", "builtin:digits", "builtin:digits", "--device", "cuda:99"], 1, "device 'cuda:99' is not available"),
        (["audit", "builtin:digits", "builtin:digits", "--junit", "x.xml"], 2, "give --require-below or another limit"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_bad_usage_and_bad_sets(arguments, status, words):
    result = run(*arguments)
    assert result.returncode == status
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_debug_shows_the_traceback():
    result = run("audit", "builtin:digits", "builtin:patches", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_bad_files_end_in_one_line(folder, tmp_path):
    corrupt = tmp_path / "corrupt.zip"
    with zipfile.ZipFile(folder / "copies.zip") as source, zipfile.ZipFile(corrupt, "w") as target:
        for number, name in enumerate(source.namelist()):
            target.writestr(name, source.read(name)[:30] if number == 3 else source.read(name))
        bad = source.namelist()[3]
    result = run("audit", corrupt, folder / "training.zip")
    assert result.returncode == 1
    assert bad in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    skipped = run("audit", corrupt, folder / "training.zip", "--skip-bad", "--json")
    assert skipped.returncode == 0, skipped.stderr
    metadata = json.loads(skipped.stdout)
    assert metadata["total"] == 39
    assert [file["name"] for file in metadata["settings"]["generated"]["skipped"]] == [bad]

    truncated = tmp_path / "truncated.zip"
    truncated.write_bytes((folder / "training.zip").read_bytes()[:5000])
    result = run("audit", folder / "copies.zip", truncated)
    assert result.returncode == 1
    assert "truncated.zip" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_output_folder_that_cannot_be_written(folder, tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    started = time.monotonic()
    result = run("audit", "builtin:patches?n=50000", "builtin:patches?n=50000", "--out", blocked / "report")
    assert result.returncode == 1
    assert "cannot be written" in result.stderr
    assert time.monotonic() - started < 60  # found out before the work, not after it


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_leaves_nothing_half_written(tmp_path, number, status):
    """Ctrl-C, or a service manager, in the middle of a large audit."""
    random = np.random.default_rng(0)
    np.save(tmp_path / "noise.npy", random.integers(0, 256, (40_000, 3, 32, 32), dtype=np.uint8))
    out = tmp_path / "report"
    with start_command("audit", tmp_path / "noise.npy", tmp_path / "noise.npy", "--out", out) as process:
        lock = tmp_path / ".report.lock"
        while process.poll() is None and not (lock.exists() and f"process {process.pid}" in lock.read_text()):
            time.sleep(0.05)
        second = run("audit", "builtin:digits", "builtin:digits", "--limit", 5, "--out", out)
        assert second.returncode == 1
        assert f"process {process.pid}" in second.stderr
        time.sleep(0.5)
        assert process.poll() is None, process.communicate()
        process.send_signal(number)
        _stdout, stderr = process.communicate()
    assert process.returncode == status
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert list(out.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["noise.npy", "report"]


def test_reader_that_goes_away(folder, tmp_path):
    """The work goes on, and its status stays."""
    for gate, status in (("", 0), ("--max-copies 3", 3)):
        out = tmp_path / f"report{status}"
        reader, writer = os.pipe()
        os.close(reader)
        command = ("audit", folder / "copies.zip", folder / "training.zip", "--out", out, *gate.split())
        result = finished(start_command(*command, stdout=writer))
        os.close(writer)
        assert result.returncode == status
        assert "Traceback" not in result.stderr
        assert "BrokenPipe" not in result.stderr
        assert (out / "report.html").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_output_that_is_full(folder):
    with open("/dev/full", "w") as full:
        command = ("audit", "--json", folder / "copies.zip", folder / "training.zip")
        result = finished(start_command(*command, stdout=full.fileno()))
    assert result.returncode == 1
    assert result.stderr == "diffmem: No space left on device\n"


def test_names_that_are_no_text(folder, tmp_path):
    """Bytes that are no UTF-8, control characters and those that reorder text, in files, folders and outputs."""
    odd = os.fsdecode(b"caf\xe9")
    samples = tmp_path / odd / "exe\u202egnp"
    samples.mkdir(parents=True)
    for name in (f"{odd}.png", "two\nlines\x1b[31m.png", "=cmd.png"):
        shutil.copy(folder / "one.png", samples / name)
    (samples / f"cut{odd}.png").write_bytes(b"\x89PNG")
    out = tmp_path / odd / "report"
    result = run("audit", samples, folder / "training.zip", "--skip-bad", "--out", out)
    assert result.returncode == 0, result.stderr
    assert "cutcaf\\xe9.png" in result.stdout
    for stream in (result.stdout, result.stderr):
        assert not set(stream) & set("\x1b\u202e")
    assert "\\u202e" in (out / "report.html").read_text(encoding="utf-8")
    assert json.loads((out / "report.json").read_text())["settings"]["generated"]["source"] == str(samples)
    with open(out / "samples.csv", newline="", encoding="utf-8") as file:
        names = [row["name"] for row in csv.DictReader(file)]
    assert sorted(names) == ["'=cmd.png", "caf\\xe9.png", "two\\nlines\\x1b[31m.png"]
    failed = run("audit", samples, folder / "training.zip")
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1


def test_folder_of_seeds(folder, tmp_path):
    digits = diffmem.load_images("builtin:digits")
    write_folder(digits.select(slice(0, 12)), tmp_path / "samples", seeds=range(995, 1007))
    metadata = json.loads(run("audit", tmp_path / "samples", folder / "training.zip", "--json").stdout)
    assert metadata["count"] == 12


def test_faiss_from_the_command_line(monkeypatch):
    pytest.importorskip("faiss", reason="FAISS is optional: pip install 'diffmem[faiss]'")
    arguments = ["audit", "builtin:digits", "builtin:digits", "--limit", 40, "--device", "cpu"]
    result = run(*arguments, "--index", "flat")
    assert result.returncode == 0, result.stderr
    assert "40 of 40 images are copies" in result.stdout
    assert "index Flat (32 candidates per image re-ranked exactly): recall of the nearest and second" in result.stdout
    assert "copies by exact search: 40\n" in result.stdout
    result = run(*arguments, "--index", "ivf16", "--json")
    assert json.loads(result.stdout)["settings"]["search"]["index"] == "IVF16,Flat"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    result = run(*arguments, "--index", "ivf16")
    assert "--index" in result.stderr
    assert result.returncode == 2


def test_nothing_slow_is_imported_for_a_page(tmp_path):
    """Each of these takes a second of every audit; PyTorch where the compiled core does all alone."""
    script = f"""
import sys
from diffmem.cli import cli
cli.main(["audit", "builtin:patches?n=20&seed=1", "builtin:patches?n=1200", "--out", {str(tmp_path / "out")!r}],
         standalone_mode=False)
print([name for name in ("matplotlib.figure", "sympy", "torch", "triton") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    needed = native_module() is None or torch.cuda.is_available()
    assert done.stdout.splitlines()[-1] in (["['torch']"] if needed else ["[]"])
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
