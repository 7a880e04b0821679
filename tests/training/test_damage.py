"""A bit of a run's folder that turned over: the same bits as without it, or one line, and the way out that it names."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from diffmem.cli import cli
from diffmem.data import load_images
from diffmem.errors import InputError
from diffmem.evaluation import trajectory
from diffmem.models import fingerprint, load, preset
from diffmem.sampling import SamplerConfig
from diffmem.training import RunFolder, TrainingConfig, train

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainingConfig(preset("ddpmpp_8", channels=1, model_channels=8, num_blocks=1), images=32, batch=8)


def trained(out: Path, images: int = 32) -> str:
    """The run in `out` continued to `images`; what its weights are."""
    data = load_images("builtin:digits").select(np.arange(10))
    config = TrainingConfig(**{**vars(CONFIG), "images": images})
    train(config, data, out, snapshot_images=16, resume=out.exists(), compile=False)
    return fingerprint(load(out))


def points(out: Path) -> list:
    data = load_images("builtin:digits").select(np.arange(10))
    found = trajectory(out, data=data, seeds=range(2), sampler=SamplerConfig(steps=2, compile="off"))
    return [(point.images, round(point.epochs, 6), point.count) for point in found.points]


ASKED = {"load": lambda out: fingerprint(load(out)), "trajectory": points, "train": lambda out: trained(out, 40)}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("runs") / "run"
    trained(out)
    return out


@pytest.fixture(scope="module")
def right(run, tmp_path_factory) -> dict:
    """What the undamaged run answers."""
    answers = {}
    for name, ask in ASKED.items():
        copy = tmp_path_factory.mktemp("right") / "run"
        shutil.copytree(run, copy)
        answers[name] = ask(copy)
    return answers


def files(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


def test_a_bit_that_turned_over_changes_no_answer(run, right, tmp_path):
    for number, file in enumerate(files(run)):
        for name in ASKED:
            out = tmp_path / f"{number}-{name}"
            shutil.copytree(run, out)
            content = bytearray((out / file).read_bytes())
            content[int(0.618 * len(content))] ^= 1 << (number % 8)
            (out / file).write_bytes(content)
            try:
                answer = ASKED[name](out)
            except InputError as refusal:
                said = str(refusal)
                assert re.search(r"^[^\n]*(delete|remove|restore)[^\n]*$", said), (file, name, said)
            else:
                assert answer == right[name], (file, name)


@pytest.mark.parametrize("file", ["config.json", "snapshots.json"])
@pytest.mark.parametrize("name", ["trajectory", "train"])
def test_descriptions_are_made_again_from_what_lies_beside_them(run, right, tmp_path, file, name):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    content = (out / file).read_text()
    (out / file).write_text(content.replace("images", "imaqes"))
    if (file, name) != ("config.json", "train"):  # which reads the state
        with pytest.raises(InputError, match=f"{file}: .*delete it, and"):
            ASKED[name](out)
    (out / file).unlink()
    assert ASKED[name](out) == right[name]
    if name == "train":
        assert {key: value for key, value in json.loads((out / file).read_text()).items() if key != "sha256"}


def test_a_damaged_snapshot_is_removed_and_the_others_are_used(run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    newest = RunFolder.open(out).newest()
    (newest / "config.json").write_bytes(b"\xff" + (newest / "config.json").read_bytes())
    for ask in (ASKED["load"], ASKED["trajectory"]):
        with pytest.raises(InputError, match=f"delete {newest}, and the run's other snapshots are used"):
            ask(out)
    shutil.rmtree(newest)
    assert [images for images, *_ in points(out)] == [16]
    assert RunFolder.open(out).newest().name == "000000016"


def test_info_says_what_a_run_is(run):
    found = CliRunner().invoke(cli, ["info", str(run), "--json"])
    assert found.exit_code == 0, found.output
    said = json.loads(found.output)
    assert said["training set"].startswith("10 images of builtin:digits")
    assert said["EMA weights"] == CONFIG.ema.describe(10)
    assert said["snapshots"] == "16, 32"
    lines = CliRunner().invoke(cli, ["info", str(run / "snapshots" / "000000016")]).output
    assert f"EMA weights: {CONFIG.ema.describe(10)}" in lines
