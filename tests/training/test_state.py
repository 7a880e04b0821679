"""Training states on disk: what is damaged is refused with a way out, and the way out leads to the same weights."""

from __future__ import annotations

import json
import shutil

import pytest
from processes import finished, start_script
from test_training_loop import RICH, digits, same, tiny, weights  # noqa: F401 (digits is a fixture)

from diffmem.errors import InputError
from diffmem.training import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def halted(digits, tmp_path_factory):  # noqa: F811
    """A run of 48 images with the states after 40 and 48, to be continued to 64; and one never interrupted."""
    folder = tmp_path_factory.mktemp("runs")
    train(tiny(6, **RICH), digits, folder / "halted", state_minutes=0, batch_gpu=4)
    train(tiny(8, **RICH), digits, folder / "complete", batch_gpu=4)
    return folder


def edit(change):
    def damage(state):
        path = state / "state.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return damage


def turn_a_bit(state):
    path = state / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def cut(state):
    path = state / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def resealed(change):
    """An edit that the checksum does not show: what it is there for is checked all the same."""
    from diffmem.integrity import sealed

    def damage(state):
        path = state / "state.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(sealed(values)))

    return damage


DAMAGES = {
    "a bit of a weight": turn_a_bit,
    "the end is missing": cut,
    "no weights": lambda state: (state / "state.safetensors").unlink(),
    "no counters": lambda state: (state / "state.json").unlink(),
    "counters that are no JSON": lambda state: (state / "state.json").write_text('{"images": 4'),
    "counters of depth": lambda state: (state / "state.json").write_text("[" * 100_000),
    "a number of 5000 digits": lambda state: (state / "state.json").write_text('{"images": ' + "9" * 5000 + "}"),
    "a negative count": edit(lambda values: values.update(images=-16)),
    "null": edit(lambda values: values.update(order=None)),
    "an older version": edit(lambda values: values.pop("sha256")),
    "a negative count, sealed": resealed(lambda values: values.update(images=-16)),
    "nulls, sealed": resealed(lambda values: values.update(dict.fromkeys(values))),
    "another order, sealed": resealed(lambda values: values["order"].update(random={"state": None})),
    "a negative position, sealed": resealed(lambda values: values["order"].update(position=-3)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_states_are_refused(name, halted, digits, tmp_path):  # noqa: F811
    run = shutil.copytree(halted / "halted", tmp_path / "run")
    newest, before = run / "state" / "000000048", run / "state" / "000000040"
    assert sorted(run.glob("state/*")) == [before, newest]
    DAMAGES[name](newest)
    with pytest.raises(InputError) as caught:
        train(tiny(8, **RICH), digits, run, batch_gpu=4, resume=True)
    message = str(caught.value)
    assert "\n" not in message
    if "position" not in name and "another order" not in name:
        assert f"delete the folder {newest}, and resuming continues from the state after 40 images" in message


def test_the_way_out_leads_to_the_same_weights(halted, digits, tmp_path):  # noqa: F811
    run = shutil.copytree(halted / "halted", tmp_path / "run")
    turn_a_bit(run / "state" / "000000048")
    shutil.rmtree(run / "state" / "000000048")
    train(tiny(8, **RICH), digits, run, batch_gpu=4, resume=True)
    assert same(weights(run, 64), weights(halted / "complete", 64))


def test_a_disk_that_fills_up_leaves_the_state_before(tmp_path):
    """Under a limit on the size of files, as on a full disk: one line, and no half-written state."""
    code = """
import resource, signal, sys
import torch
from pathlib import Path
from diffmem.errors import InputError
from diffmem.training.run_folder.state import save_state, latest_state
out = Path(sys.argv[1])
save_state(out, 8, {"weights": torch.zeros(10)}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
try:
    save_state(out, 16, {"weights": torch.zeros(2**20)}, {})
except InputError as error:
    print(error)
assert latest_state(out).name == "000000008", latest_state(out)
assert [path.name for path in (out / "state").iterdir()] == ["000000008"]
"""
    result = finished(start_script(code, tmp_path))
    assert result.returncode == 0, result.stderr
    assert "cannot be written" in result.stdout
    assert "File too large" in result.stdout
