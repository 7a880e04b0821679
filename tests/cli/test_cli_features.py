"""`diffmem audit` with other features and rules, as a person runs it."""

import json

import numpy as np
import pytest
import torch
from command_line import run

import diffmem
from diffmem.data import write_edm_zip
from diffmem.features import extract


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """training.zip, unseen.zip, and dark.zip: 20 darkened training images and 30 others; with hashes beside them."""
    folder = tmp_path_factory.mktemp("sets")
    digits = diffmem.load_images("builtin:digits").select(np.random.default_rng(0).permutation(1797))
    dark = digits.select(np.r_[0:20, 1400:1430])
    dark.images[:20] //= 2
    sets = {"training": digits.select(slice(0, 600)), "unseen": digits.select(slice(700, 1100)), "dark": dark}
    for name, images in sets.items():
        write_edm_zip(images, folder / f"{name}.zip")
        np.save(folder / f"{name}.npy", images.images.reshape(len(images), -1).astype(np.float16) + 1)
    return folder


def test_calibrated_aligned_search(folder, tmp_path):
    arguments = ("audit", folder / "dark.zip", folder / "training.zip", "--holdout", folder / "unseen.zip")
    result = run(*arguments, "--features", "aligned", "--rule", "calibrated", "--alarms", "0.02", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "images are copies of one of 600 training images" in result.stdout
    assert "a copy: its score (aligned residual / others' of aligned) is below" in result.stdout
    assert "false alarms: at most 2 % of images that are not copies, 1.0 of 50" in result.stdout
    assert "not covered: alignment does not detect copies that were rotated" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert sum(report["memorized"][:20]) == 20
    assert report["calibration"]["images"] == 400
    assert len(report["p_values"]) == len(report["scores"]) == len(report["verdicts"]) == 50
    page = (tmp_path / "report.html").read_text()
    assert "gray levels" not in page
    assert "400</strong> unseen real images set the threshold" in page
    header = (tmp_path / "samples.csv").read_text().splitlines()[0]
    assert "verdict,score,p_value,q_value" in header
    summary = run(*arguments, "--features", "aligned", "--rule", "calibrated", "--alarms", "0.02", "--json")
    assert json.loads(summary.stdout)["calibration"] == report["calibration"]
    assert json.loads(summary.stdout)["blind_spots"] == report["blind_spots"]
    assert "scores" not in json.loads(summary.stdout)


def test_vectors_alone_and_beside_images(folder):
    alone = run(
        "audit", folder / "dark.npy", folder / "training.npy", "--features", "precomputed", "--rule", "similarity",
        "--threshold", "0.99", "--json", "full",
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    assert "not 1, are compared by the cosine" in alone.stderr
    given = [
        f"--vectors={name}={folder / file}.npy" for name, file in (("generated", "dark"), ("training", "training"))
    ]
    beside = run(
        "audit", folder / "dark.zip", folder / "training.zip", *given, "--rule", "similarity", "--threshold", "0.99",
        "--json=full", "--metric", "cosine",
    )  # fmt: skip
    assert beside.returncode == 0, beside.stderr
    assert json.loads(alone.stdout)["scores"] == json.loads(beside.stdout)["scores"]
    assert json.loads(beside.stdout)["second_look"] is not None
    assert json.loads(alone.stdout)["second_look"] is None


def test_networks_keep_their_features_beside_the_sources(folder, tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        network = torch.jit.trace(
            torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten()), torch.zeros(1, 3, 8, 8)
        )
        network.save(str(tmp_path / "net.pt"))
    for name in ("dark", "training"):
        (tmp_path / f"{name}.zip").write_bytes((folder / f"{name}.zip").read_bytes())
    command = [
        "audit", tmp_path / "dark.zip", tmp_path / "training.zip", "--features", f"torchscript:{tmp_path / 'net.pt'}",
        "--preprocessing", "0-1", "--rule", "similarity", "--threshold", "0.999", "--json=full",
    ]  # fmt: skip
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("*.diffmem-features-*.safetensors"))) == 2
    assert run(*command).stdout == result.stdout
    again = extract(tmp_path / "dark.zip", f"torchscript:{tmp_path / 'net.pt'}", preprocessing="0-1")
    assert again.metric == "cosine"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--features", "sscd"], 1, "pass the file as --weights PATH"),
        (["--features", "ssdc"], 1, "--features ssdc is unknown: choose pixels"),
        (["--rule", "similarity"], 1, "--rule similarity of pixels needs --threshold NUMBER"),
        (["--rule", "calibrated"], 1, "pass --holdout SOURCE"),
        (["--rule", "calibrated", "--holdout", "{unseen}", "--alarms", "0.001"], 1, "or raise it to --alarms 0.0025"),
        (["--alarms", "0.1"], 1, "is only for --rule calibrated"),
        (["--alarms", "2"], 2, "--alarms"),
        (["--threshold", "0"], 2, "--threshold"),
        (["--vectors", "{training}"], 2, "must be SET=PATH, where SET is one of"),
        (["--features", "hash", "--vectors", "training={training}"], 2, "precomputed features"),
        (["--features", "aligned", "--weights", "x.pt"], 2, "uses no network"),
        (["--features", "hash", "--weights", "x.pt"], 1, "does not take --weights PATH: remove it"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(arguments, status, words, folder, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(folder))
    places = {name: str(folder / f"{name}.zip") for name in ("training", "unseen")}
    result = run("audit", folder / "dark.zip", folder / "training.zip", *(each.format(**places) for each in arguments))
    assert result.returncode == status, result.stdout + result.stderr
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_gates_keep_their_status(folder):
    base = ("audit", folder / "dark.zip", folder / "training.zip", "--features", "aligned")
    for gate, status in (
        (("--max-copies", 30), 0), (("--max-copies", 3), 3), (("--require-below", "0.01"), 3),
        (("--require-below", "0.45"), 4), (("--fail-above", "0.9"), 0),
    ):  # fmt: skip
        result = run(*base, *gate)
        assert result.returncode == status, (gate, result.stdout, result.stderr)
