"""Which device a call runs on, and that this suite asks for the CPU where there is a GPU."""

from pathlib import Path

import pytest
import torch
from processes import finished, start_script

from diffmem.devices import SETTING, is_cpu, pick_device
from diffmem.errors import InputError

HERE = Path(__file__).parent


@pytest.mark.parametrize(("setting", "gpu", "expected"), [
    (None, False, "cpu"), (None, True, "cuda"), ("cpu", True, "cpu"), ("cuda:0", True, "cuda:0"), ("", True, "cuda"),
])  # fmt: skip
def test_auto(monkeypatch, setting, gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    if setting is None:
        monkeypatch.delenv(SETTING, raising=False)
    else:
        monkeypatch.setenv(SETTING, setting)
    assert str(pick_device()) == str(pick_device("auto")) == expected
    assert pick_device("cpu").type == "cpu"
    assert is_cpu() == (expected == "cpu")
    assert is_cpu("cpu")
    assert is_cpu(torch.device("cpu"))


def test_a_setting_that_is_no_device(monkeypatch):
    monkeypatch.setenv(SETTING, "abacus")
    with pytest.raises(InputError, match="device 'abacus' is unknown"):
        pick_device()
    monkeypatch.setenv(SETTING, "auto")
    for asked in (pick_device, is_cpu):
        with pytest.raises(InputError, match="device 'auto' is unknown"):
            asked()


# One of each kind that would pick a GPU by itself: audit, search, sampling, training. The whole suite passes so too:
# pytest -p pretended_gpu
ASK_FOR_THE_CPU = [
    "memorization/test_audit.py::test_floats_are_audited_too", "search/test_index_stored.py",
    "cli/test_cli_audit.py::test_json_is_the_python_result_and_nothing_else",
    "evaluation/test_generate.py::test_churn_and_class_reach_the_sampler",
    "training/test_training_loop.py::test_global_random_numbers_are_left_alone",
]  # fmt: skip


def test_tests_ask_for_the_cpu_where_a_gpu_is_seen():
    code = "import sys, pytest; sys.exit(int(pytest.main(sys.argv[1:])))"
    named = [HERE / each for each in ASK_FOR_THE_CPU]
    command = ("-q", "-x", "-p", "pretended_gpu", "-p", "no:cacheprovider", "-p", "no:xdist", *named)
    done = finished(start_script(code, *command, cwd=HERE.parent))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
