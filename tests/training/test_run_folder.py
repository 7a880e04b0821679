"""A run's folder for those who come after it: where its training set is, also as earlier versions recorded it."""

import json

import pytest
from test_training_loop import tiny

from diffmem.data import DatasetSpec
from diffmem.errors import InputError
from diffmem.integrity import sealed
from diffmem.training import RunFolder, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train(tiny(1), DatasetSpec("builtin:digits", size=20), out, device="cpu", compile=False)
    return out


def rewritten(run, folder, **data):
    """The run with other words about its training set."""
    values = json.loads((run / "config.json").read_text())
    del values["sha256"], values["data"]["data_source"]
    values["data"] |= data
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(sealed(values)))
    return folder


def test_the_training_set_is_found_again(run, tmp_path):
    spec = DatasetSpec("builtin:digits", size=20)
    assert RunFolder.open(run).dataset == spec
    recorded = {"path": "builtin:digits", "size": 20, "resize": None, "color": None, "skip_bad": False}
    for number, name in enumerate(("found_at", "data_source")):
        earlier = RunFolder.open(rewritten(run, tmp_path / str(number), **{name: recorded}))
        assert earlier.dataset == spec
        assert earlier.training_images().fingerprint == spec.load().fingerprint
        train(tiny(2), spec, earlier.path, device="cpu", compile=False, resume=True)
        assert json.loads((earlier.path / "config.json").read_text())["data"]["data_source"] == spec.to_json()
    with pytest.raises(InputError, match="does not record where its training set is"):
        RunFolder.open(rewritten(run, tmp_path / "without")).training_images()


@pytest.mark.parametrize("values", [[], "x", 3, {"quality": 1}, {"path": 3}, {"path": "a", "size": "many"}])
def test_nonsense_about_the_training_set_is_one_line(run, tmp_path, values):
    folder = rewritten(run, tmp_path / "run", data_source=values)
    with pytest.raises(InputError, match="does not say where the training set is: ") as caught:
        RunFolder.open(folder).training_images()
    assert str(folder / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)
