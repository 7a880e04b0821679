"""What is logged under "diffmem": what was skipped, resumed, made again, must not be relied on; and that nothing of it
is printed, by the library or twice by the command line."""

import logging
import os

import numpy as np
import pytest
import torch
from command_line import run
from processes import finished, start_script

import diffmem
from diffmem.data import write_folder
from diffmem.evaluation import generate
from diffmem.models import EDM, Denoiser, DenoiserConfig, UNetConfig
from diffmem.ops.autotune import AutotuneCache
from diffmem.sampling import SamplerConfig


@pytest.fixture(scope="module")
def digits():
    return diffmem.load_images("builtin:digits", limit=200)


@pytest.fixture
def damaged(digits, tmp_path):
    """A folder of 20 digits and a file that is none."""
    write_folder(diffmem.ImageSet(digits.images[:20]), tmp_path / "set")
    (tmp_path / "set" / "cut.png").write_bytes(b"\x89PNG")
    (tmp_path / "set" / "scan.svg").write_bytes(b"another kind of file")
    return tmp_path / "set"


def test_skipped_files_and_packed_copies(damaged, caplog):
    caplog.set_level(logging.DEBUG, "diffmem")
    images = diffmem.load_images(damaged, skip_bad=True, cache=True)
    (skipped,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert skipped.name == "diffmem.data.load"
    assert "skipped cut.png" in skipped.getMessage()
    (note,) = images.notes
    assert note in caplog.messages
    caplog.clear()
    diffmem.load_images(images)  # known already
    assert caplog.messages == []
    diffmem.load_images(damaged, skip_bad=True, cache=True)
    assert any("read from its cached copy" in message for message in caplog.messages)
    (damaged / "cut.png").unlink()
    caplog.clear()
    diffmem.load_images(damaged, skip_bad=True, cache=True)
    assert any("it is rebuilt" in message for message in caplog.messages)


def test_names_in_records_are_text_and_hide_nothing(digits, tmp_path, caplog):
    """Whoever writes the file's name does not write to the log, nor break what encodes it."""
    (tmp_path / "set").mkdir()
    write_folder(diffmem.ImageSet(digits.images[:3]), tmp_path / "set")
    (tmp_path / "set" / os.fsdecode(b"caf\xe9\nforged\x1b[31m.png")).write_bytes(b"\x89PNG")
    diffmem.load_images(tmp_path / "set", skip_bad=True)
    (record,) = caplog.records
    assert r"skipped caf\xe9\nforged\x1b[31m.png" in record.getMessage()
    record.getMessage().encode()
    assert (record.name, record.filename) == ("diffmem.data.load", "load.py")


def test_warnings_of_an_audit(digits, caplog):
    black = np.zeros((50, 1, 8, 8), np.uint8)
    result = diffmem.audit(black, digits)
    assert result.warnings
    logged = [record for record in caplog.records if record.name == "diffmem.memorization.detector"]
    assert [record.getMessage() for record in logged] == [f"array: {warning}" for warning in result.warnings]
    assert {record.levelname for record in logged} == {"WARNING"}


def test_what_is_resumed_and_what_is_remembered(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "diffmem")
    torch.manual_seed(0)
    network = UNetConfig(
        resolution=4, channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=()
    )
    denoiser = Denoiser(DenoiserConfig(network, EDM())).eval()
    sampler = SamplerConfig(steps=2, batch=2, compile="off")
    from diffmem.evaluation.seed_store import SeedStore

    write = SeedStore.write

    def interrupted(self, records, *rest):
        write(self, records, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(SeedStore, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(denoiser, range(6), out=tmp_path / "out.npz", sampler=sampler)
    monkeypatch.setattr(SeedStore, "write", write)
    assert caplog.messages == []
    generate(denoiser, range(6), out=tmp_path / "out.npz", sampler=sampler)
    (message,) = caplog.messages
    assert message.endswith("out.npz.partial: resumes with 2 of 6 images")
    caplog.clear()
    (tmp_path / "file").touch()
    AutotuneCache("attention", tmp_path / "file" / "cache.json").add("cpu", "case", {"torch": 1.0})
    (message,) = caplog.messages
    assert "cannot be written" in message


def test_the_command_line_says_each_thing_once_and_the_library_nothing(damaged, digits, tmp_path, capfd):
    np.save(tmp_path / "black.npy", np.zeros((50, 1, 8, 8), np.uint8))
    result = run("audit", tmp_path / "black.npy", "builtin:digits", "--json")
    assert result.returncode == 0
    warnings = diffmem.audit(tmp_path / "black.npy", "builtin:digits").warnings
    assert result.stderr.count("warning: ") == len(warnings) > 0
    assert result.stderr.count("of a single color") == 1
    result = run("audit", damaged, "builtin:digits", "--skip-bad")
    assert (result.stdout + result.stderr).count("cut.png") == 1
    # Warnings of libraries without a handler would be printed by Python itself.
    code = f"import diffmem; diffmem.load_images({str(damaged)!r}, skip_bad=True)"
    done = finished(start_script(code))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert capfd.readouterr() == ("", "")
