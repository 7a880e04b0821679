"""Which attention is used on a GPU: the setting, the measurement (with a clock that is told the time), the default."""

from __future__ import annotations

import json

import pytest
import torch

from diffmem.errors import InputError
from diffmem.ops import autotune as cache
from diffmem.ops.attention import autotune, torch_backend
from diffmem.ops.attention.autotune import fastest_backend, settled


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFMEM_CACHE", str(tmp_path))
    monkeypatch.delenv(autotune.SETTING, raising=False)
    monkeypatch.setattr(autotune, "CACHE", cache.AutotuneCache("attention"))


class Clock:
    """Two backends of attention that take the seconds they are told to."""

    def __init__(self, **seconds):
        self.now, self.calls = 0.0, []
        self.backends = {name: self._backend(name, each) for name, each in seconds.items()}

    def _backend(self, name, seconds):
        def run(qkv, num_heads):
            self.now += seconds
            self.calls.append(name)
            return torch_backend.attention(qkv, num_heads)

        return run

    def __call__(self):
        return self.now


def choose(monkeypatch, clock, qkv, heads=1):
    """`fastest_backend` with the clock's time; the device is this CPU, which is as good as any."""
    real = autotune.measure
    monkeypatch.setattr(autotune, "measure", lambda *arguments: real(*arguments, clock=clock))
    chosen = fastest_backend(qkv, heads, clock.backends)
    monkeypatch.setattr(autotune, "measure", real)
    return chosen


def test_the_faster_backend_is_measured_once_and_remembered_by_all_processes(monkeypatch, tmp_path):
    qkv = torch.randn(2, 24, 2, 2)
    clock = Clock(triton=3.0, torch=2.0)
    assert choose(monkeypatch, clock, qkv) == "torch"
    assert clock.calls == ["triton"] * (1 + autotune.RUNS) + ["torch"] * (1 + autotune.RUNS)
    again = Clock(triton=1.0, torch=2.0)
    assert choose(monkeypatch, again, qkv[:1]) == "torch"
    monkeypatch.setattr(autotune, "CACHE", cache.AutotuneCache("attention"))  # another process
    assert choose(monkeypatch, again, qkv) == "torch"
    assert not again.calls
    (cases,) = json.loads((tmp_path / "autotune.json").read_text())["attention"].values()
    assert cases == {"4 tokens, 1 heads of 8, float32 ieee, contiguous, inference": {"triton": 3.0, "torch": 2.0}}


def test_what_changes_the_answer_is_measured_for_itself(monkeypatch):
    qkv = torch.randn(2, 24, 2, 2)
    variants = [
        (qkv, 1), (qkv, 2), (qkv.half(), 1), (qkv.to(memory_format=torch.channels_last), 1),
        (qkv.clone().requires_grad_(), 1), (qkv[:, :, :1], 1),
    ]  # fmt: skip
    for values, heads in variants:
        clock = Clock(triton=1.0, torch=2.0)
        assert choose(monkeypatch, clock, values, heads) == "triton"
        assert clock.calls, "was taken for another case"


def test_the_setting_decides_over_everything(monkeypatch):
    clock = Clock(triton=1.0, torch=2.0)
    qkv = torch.randn(1, 24, 2, 2)
    for setting in ("torch", "triton"):
        monkeypatch.setenv(autotune.SETTING, setting)
        assert choose(monkeypatch, clock, qkv) == setting
    monkeypatch.setenv(autotune.SETTING, "cache")  # without a measurement PyTorch's, with one the faster
    assert choose(monkeypatch, clock, qkv) == "torch"
    autotune.CACHE.add(*autotune.cache_key("cpu", None, 4, 1, 8, qkv.dtype, "contiguous", False), {"triton": 1.0})
    assert choose(monkeypatch, clock, qkv) == "triton"
    assert not clock.calls
    monkeypatch.setenv(autotune.SETTING, "fast")
    with pytest.raises(InputError, match="DIFFMEM_ATTENTION=fast: choose measure, cache"):
        choose(monkeypatch, clock, qkv)


@pytest.mark.parametrize("text", ["", "[]", '{"attention": {"cpu": {"case": {}}}}', '{"attention": 3}'])
def test_a_file_that_cannot_be_read_counts_as_none(monkeypatch, tmp_path, text):
    (tmp_path / "autotune.json").write_text(text)
    clock = Clock(triton=1.0, torch=2.0)
    assert choose(monkeypatch, clock, torch.randn(1, 24, 2, 2)) == "triton"
    assert clock.calls
    assert "attention" in json.loads((tmp_path / "autotune.json").read_text())


def test_without_a_folder_to_write_to_the_process_remembers(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIFFMEM_CACHE", str(tmp_path / "file"))
    first, second = Clock(triton=1.0, torch=2.0), Clock(triton=2.0, torch=1.0)
    qkv = torch.randn(1, 24, 2, 2)
    assert choose(monkeypatch, first, qkv) == choose(monkeypatch, second, qkv) == "triton"
    assert not second.calls


def test_tracing_measures_nothing(monkeypatch):
    """Under torch.compile the choice is a constant of the graph, without a break."""
    clock = Clock(triton=1.0, torch=2.0)

    def function(qkv):
        backend = fastest_backend(qkv, 1, clock.backends)
        return qkv * (1 if backend == "triton" else 2)

    qkv = torch.ones(1, 24, 2, 2)
    out = torch.compile(function, fullgraph=True, backend="eager")(qkv)
    assert not clock.calls
    assert out[0, 0, 0, 0] == 2, "nothing was measured: PyTorch's"
    case = ("cpu", None, 4, 1, 8, torch.float32, "contiguous", False)
    autotune.CACHE.add(*autotune.cache_key(*case), {"triton": 1.0, "torch": 2.0})
    assert settled(*case) == "triton"
    torch._dynamo.reset()
    assert torch.compile(function, fullgraph=True, backend="eager")(qkv)[0, 0, 0, 0] == 1
