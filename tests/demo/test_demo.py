"""The demonstration, cut short: it passes through every stage, writes what it names, and goes on where it was."""

import json

import pytest

from diffmem.cli import main
from diffmem.data import load_images
from diffmem.demo import run, run_demo
from diffmem.memorization import audit


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo"), images=5 * run.BATCH, samples=12)


def test_both_models_are_the_same_but_for_their_images(demo):
    assert [len(model.training) for model in (demo.few, demo.many)] == [20, 1000]
    configs = [
        json.loads((model.folder / "run" / "config.json").read_text())["config"] for model in (demo.few, demo.many)
    ]
    assert configs[0].pop("warmup_epochs") * 20 == configs[1].pop("warmup_epochs") * 1000
    assert configs[0] == configs[1]
    seen = {*demo.few.training.names, *demo.many.training.names}
    assert not seen & {*demo.unseen.names}
    assert len(demo.unseen) == 797


def test_the_numbers_are_those_of_the_files(demo):
    page = demo.page.read_text()
    for model in (demo.few, demo.many):
        training = load_images(model.folder / "training.zip")
        again = audit(load_images(model.folder / "samples.npz"), training, holdout=demo.page.parent / "unseen.zip")
        assert again.memorized.tolist() == model.audit.memorized.tolist()
        assert again.holdout.ratio == model.audit.holdout.ratio
        assert (model.folder / "audit" / "report.html").exists()
        assert f"{model.folder.name}/run/trajectory/trajectory.html" in page
        assert len(model.trajectory.points) == run.SNAPSHOTS
    assert page.count("data:image/png") == 2 * 2 * 12
    assert json.loads(json.dumps(demo.to_dict()))["few"]["samples"] == 12


def test_begun_again_it_trains_no_more(demo, monkeypatch):
    def step(self):
        raise AssertionError("trained again")

    monkeypatch.setattr("diffmem.training.trainer.Trainer.step", step)
    again = run_demo(demo.page.parent, images=5 * run.BATCH, samples=12)
    assert again.to_dict() == demo.to_dict()


def test_command_line(demo, monkeypatch, capsys):
    short = {"images": 5 * run.BATCH, "samples": 12}
    monkeypatch.setattr("diffmem.demo.run_demo", lambda out, progress: run_demo(out, progress=progress, **short))
    with pytest.raises(SystemExit) as end:
        main(["demo", "--out", str(demo.page.parent)])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "trained on 20 digits, 16 epochs: 0 of 12 generated images are copies, 0 %" in printed
    assert f"report: {demo.page}" in printed
