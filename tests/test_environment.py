"""What `diffmem info` says of FAISS, of which an environment holds one package."""

import sys
import types

import pytest
from click.testing import CliRunner

from diffmem import environment
from diffmem.cli import cli


@pytest.mark.parametrize(("installed", "gpus", "line"), [
    ({}, None, "FAISS: none"),
    ({"faiss-cpu": "1.9"}, 0, "FAISS: faiss-cpu 1.9, on the CPU"),
    ({"faiss-gpu": "1.15.1"}, 2, "FAISS: faiss-gpu 1.15.1, on 2 GPU(s)"),
    ({"faiss-gpu-cuvs": "1.15.1"}, None, "FAISS: faiss-gpu-cuvs 1.15.1, on the CPU; it cannot be imported"),
    ({"faiss-cpu": "1.9", "faiss-gpu": "1.15.1"}, 0,
     "FAISS: faiss-cpu 1.9, faiss-gpu 1.15.1, on the CPU; faiss-cpu and faiss-gpu provide the same module: "
     "pip uninstall faiss-cpu faiss-gpu, then install the one you want"),
])  # fmt: skip
def test_info_says_which_faiss(monkeypatch, installed, gpus, line):
    version = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: installed.get(name) if "faiss" in name else version(name))
    module = types.SimpleNamespace(get_num_gpus=lambda: gpus)
    monkeypatch.setitem(sys.modules, "faiss", None if gpus is None else module)
    done = CliRunner().invoke(cli, ["info"])
    assert done.exit_code == 0
    assert any(each.startswith(line) for each in done.output.splitlines()), done.output
    # The other FAISS is offered only where there is none.
    offered = [name for name in ("faiss-cpu", "faiss-gpu") if f"  {name} not installed" in done.output]
    assert offered == ([] if installed else ["faiss-cpu", "faiss-gpu"])
