"""Switches of precision: read and set whichever of PyTorch's two families the user has set, and left as they were."""

import pytest
import torch
from processes import finished, start_script

from diffmem.errors import InputError
from diffmem.precision import float32_products, measured_convolutions, warn_where_slow

NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")
# What a user may have set; each in a process of its own, since some of it cannot be taken back.
SETTINGS = {
    "": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "b.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.set_float32_matmul_precision('high'); b.cuda.matmul.allow_tf32 = False": "ieee",
    "b.cudnn.allow_tf32 = False": "ieee",
}
if NEW:
    SETTINGS |= {
        "b.cuda.matmul.fp32_precision = 'tf32'": "tf32",
        "b.cudnn.conv.fp32_precision = 'ieee'": "ieee",
        "b.fp32_precision = 'tf32'": "tf32",
        "b.fp32_precision = 'ieee'; b.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    }
SCRIPT = """
import os
import torch
from diffmem.precision import float32_products, matmul_precision
from diffmem.ops.attention.tiles import precision_of
b = torch.backends
reads = {
    "gm": torch.get_float32_matmul_precision, "allow": lambda: b.cuda.matmul.allow_tf32,
    "cudnn": lambda: b.cudnn.allow_tf32,
}
if NEW:
    # The old ones may be readable afterwards where they were not before; what the new ones say has to be the same.
    new = {
        "matmul": lambda: b.cuda.matmul.fp32_precision, "conv": lambda: b.cudnn.conv.fp32_precision,
        "rnn": lambda: b.cudnn.rnn.fp32_precision, "all": lambda: b.fp32_precision,
        "cpu": lambda: b.mkldnn.matmul.fp32_precision,
    }
same = new if NEW else reads
def check(setting, expected):
    exec(setting)
    before = {name: read() for name, read in same.items()}
    assert (matmul_precision(), precision_of(torch.float32)) == (expected, expected), before
    assert precision_of(torch.bfloat16) == "ieee"
    with float32_products("ieee"):
        assert (matmul_precision(), reads["allow"](), reads["cudnn"]()) == ("ieee", False, False)
        with float32_products("tf32"):
            assert (matmul_precision(), reads["allow"](), reads["cudnn"]()) == ("tf32", True, True)
        assert (matmul_precision(), reads["allow"](), reads["cudnn"]()) == ("ieee", False, False)
    after = {name: read() for name, read in same.items()}
    assert after == before, (before, after)
for setting, expected in SETTINGS.items():
    child = os.fork()
    if child == 0:
        check(setting, expected)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, setting
"""


def test_every_setting_of_a_user_is_read_and_left():
    script = SCRIPT.replace("NEW", repr(NEW)).replace("SETTINGS", repr(SETTINGS))
    done = finished(start_script(script))
    assert done.returncode == 0, done.stderr[-2000:]


def test_switches_come_back_after_an_error():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with pytest.raises(ZeroDivisionError), float32_products("tf32"):
        _ = 1 / 0
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    with pytest.raises(InputError, match="'fp8', but must be one of ieee, tf32, bf16, fp16"), float32_products("fp8"):
        pass


def test_half_precision_without_instructions_is_said_once(monkeypatch, caplog):
    for supported in (True, False):
        warn_where_slow.cache_clear()
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda supported=supported: supported)
        for _ in range(2):
            warn_where_slow("bf16", "cpu")
            warn_where_slow("bf16", "cuda")
            warn_where_slow("ieee", "cpu")
        said = [record.getMessage() for record in caplog.records]
        assert said == (
            [] if supported else ["this CPU has no instructions for bf16, which takes longer than ieee on it"]
        )
    warn_where_slow.cache_clear()


def test_convolutions_are_measured_on_a_gpu_only():
    assert not torch.backends.cudnn.benchmark
    for device, deterministic, expected in (("cuda", False, True), ("cpu", False, False), ("cuda", True, False)):
        torch.use_deterministic_algorithms(deterministic)
        try:
            with measured_convolutions(torch.device(device)):
                assert torch.backends.cudnn.benchmark is expected
        finally:
            torch.use_deterministic_algorithms(False)
        assert not torch.backends.cudnn.benchmark
