"""`diffmem train` as a person runs it: a run, its interruption and continuation, dry runs, refusals."""

import json
import signal
import time

import numpy as np
import pytest
from processes import start_command

from diffmem.cli import main
from diffmem.models import load
from diffmem.training import read_records

TINY = [
    "--data",
    "builtin:digits",
    "--num-channels",
    "8",
    "--num-blocks",
    "1",
    "--channel-mult",
    "1,1",
    "--batch",
    "32",
]


@pytest.fixture
def run(capfd, one_thread):
    """Runs `diffmem train` in this process: (status, standard output, standard error)."""

    def call(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["train", *map(str, arguments)])
        return end.value.code, *capfd.readouterr()

    return call


def test_interrupted_and_continued(run, tmp_path):
    out = tmp_path / "run"
    command = ["train", *TINY, "--epochs", "500", "--snapshot-images", "64", "--out", out, "--grid", "4"]
    with start_command(*command, env={"OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None and not ((out / "grids").exists() and (out / "stats.jsonl").exists()):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert f"diffmem train --resume --out {out}" in stderr
    assert "Traceback" not in stderr
    assert '"model_channels": 8' in stdout
    assert "s per step" in stdout
    done = json.loads((out / "stats.jsonl").read_text().splitlines()[-1])["images"]

    status, stdout, stderr = run(
        *TINY, "--images", done + 64, "--snapshot-images", 64, "--out", out, "--grid", 0, "--resume"
    )
    assert status == 0, stderr
    assert "continuing after" in stdout
    assert "finished" in stdout
    denoiser = load(out / "snapshots" / f"{read_records(out)[-1].images:09d}")
    assert (denoiser.channels, denoiser.resolution) == (1, 8)


def test_a_run_is_continued_without_other_options_and_sampled(run, tmp_path, capfd):
    out = tmp_path / "run"
    chosen = ("--size", 20, "--xflip", "--lr", 0.003, "--compile", "no", "--snapshot-images", 64, "--grid", 0)
    assert run(*TINY, *chosen, "--epochs", 4, "--out", out)[0] == 0
    before = json.loads((out / "config.json").read_text())["config"]
    status, stdout, stderr = run("--resume", "--out", out, "--epochs", 8)
    assert status == 0, stderr
    assert "continuing after 160 images" in stdout
    after = json.loads((out / "config.json").read_text())["config"]
    assert after == {**before, "images": 320}
    kept = [snapshot.images for snapshot in read_records(out)]
    assert kept == [64, 128, 160, 192, 256, 320]  # at the interval of the first command
    # What differs is named; where the command is not known any more, the run's own configuration is enough.
    for conflict, words in ((("--lr", 0.001), "lr (0.003 there, 0.001 here)"), (("--size", 10), "not the 20 images")):
        status, _, stderr = run("--resume", "--out", out, *conflict)
        assert status == 1
        assert words in " ".join(stderr.split())
    (out / "command.json").unlink()
    assert run("--resume", "--out", out, "--images", 352)[0] == 0
    assert "there is no run to resume" in run("--resume", "--out", tmp_path / "none")[2]
    assert run("--out", tmp_path / "none")[0] == 2

    with pytest.raises(SystemExit) as end:
        main(
            [
                "sample",
                str(out),
                "--seeds",
                "0-3",
                "--solver",
                "unipc",
                "--steps",
                "3",
                "--audit",
                "builtin:digits",
                "--json",
            ]
        )
    stdout, stderr = capfd.readouterr()
    assert end.value.code == 0, stderr
    assert f"sampling its newest snapshot, {out / 'snapshots' / '000000352'}" in stderr
    assert json.loads(stdout)["audit"]["settings"]["flip"] is True  # as the run counts mirrored images


def test_dry_run_takes_every_factor(run, tmp_path):
    status, stdout, stderr = run(
        "--data", "builtin:digits", "--resize", 16, "--color", "rgb", "--cond", "--arch", "ncsnpp", "--precond", "edm",
        "--num-channels", 16, "--channel-mult", "1,1", "--num-blocks", 2, "--embedding", "positional",
        "--skips", "16,8.1", "--dropout", 0.2, "--duration", 3, "--batch", 64, "--batch-gpu", 8,
        "--optimizer", "adamw", "--lr", 1e-3,
        "--weight-decay", 1e-4, "--ema-target", 0.9, "--tikhonov", 0.01, "--augment", 0.1, "--window", 0.2, "--seed", 7,
        "--dry-run",
    )  # fmt: skip
    assert status == 0, stderr
    config, end = json.JSONDecoder().raw_decode(stdout)
    assert "60.0 epochs" in stdout[end:]
    network = config["denoiser"]["network"]
    expected = {
        "resolution": 16, "channels": 3, "label_dim": 10, "augment_dim": 9, "model_channels": 16,
        "channel_mult": [1, 1], "num_blocks": 2, "embedding": "positional", "encoder": "residual", "dropout": 0.2,
        "attn_resolutions": [8],
        "skip_connections": [True, True, True, False, True, False],
    }  # fmt: skip
    assert {name: network[name] for name in expected} == expected
    assert config["denoiser"]["preconditioning"]["type"] == "edm"
    assert config["images"] == 60 * 1797
    averaging = {"rule": "target", "halflife_images": 500_000, "rampup": 0.05, "target": 0.9, "protocol": "paper"}
    assert config["ema"] == averaging
    chosen = {"optimizer": "adamw", "weight_decay": 1e-4, "tikhonov": 0.01, "augment": 0.1, "window": 0.2, "seed": 7}
    assert {name: config[name] for name in chosen} == chosen
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--epochs", "1"], 2, "--out"),
        (["--out", "run"], 1, "exactly one of --images N, --epochs N and --duration N"),
        (["--out", "run", "--epochs", "1", "--preset", "big"], 1, "no preset 'big'"),
        (["--out", "run", "--epochs", "1", "--skips", "64"], 1, "skip connection 64: there are 8.0, 8.1, 4.0, 4.1"),
        (["--out", "run", "--epochs", "1", "--channel-mult", "a,b"], 2, "list of whole numbers"),
        (["--out", "run", "--epochs", "1", "--ema-rule", "target"], 1, "needs --ema-target N, such as 0.99"),
        (
            ["--out", "run", "--epochs", "1", "--ema-target", "0.5", "--ema-rule", "constant"],
            1,
            "--ema-target is 0.5, but",
        ),
        (["--out", "run", "--epochs", "nan"], 1, "--epochs is nan, but must be"),
        (["--out", "run", "--epochs", "1", "--lr", "nan"], 1, "--lr is nan, but must be a finite number"),
        (["--out", "run", "--epochs", "1", "--num-channels", "3"], 1, "--num-channels is 3, but must be even"),
        (
            ["--out", "run", "--epochs", "1", "--cond", "--data", "plain.npy"],
            1,
            "--cond needs labels, but there are none",
        ),
    ],
)
def test_mistakes_end_in_one_line(arguments, status, words, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "plain.npy" in arguments:
        monkeypatch.chdir(tmp_path.parent)
        np.save("plain.npy", np.zeros((30, 1, 8, 8), np.uint8))
    ended, _, stderr = run(*TINY, *arguments)
    assert ended == status
    assert words in " ".join(stderr.replace("│", " ").split())
    assert "Traceback" not in stderr
    assert not list(tmp_path.iterdir())
