"""`python -m benchmarks.gpu` without a GPU: the dry run computes, checks and lists every kernel and every baseline."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import bench_kernels, gpu

# Runs the command, and says at the end which kernels were launched.
RECORDED = """
import json, os, sys
os.environ["TRITON_INTERPRET"] = "1"
from benchmarks import bench_kernels, gpu
import importlib
names = set()
for subject in bench_kernels.SUBJECTS:
    module = importlib.import_module(f"diffmem.ops.{subject.op}.triton_kernels")
    def launch(kernel, *arguments, _op=subject.op, _launch=module.launch, **named):
        names.add((_op, kernel.__name__.strip("_")))
        _launch(kernel, *arguments, **named)
    module.launch = launch
gpu.main(sys.argv[1:], standalone_mode=False)
print(json.dumps(sorted(names)))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="no triton here: pip install 'diffmem[triton]'")
def test_dry_run_covers_every_kernel_and_baseline(tmp_path):
    command = [sys.executable, "-c", RECORDED, "--interpret", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    launched = {tuple(each) for each in json.loads(done.stdout.splitlines()[-1])}
    assert launched == {
        (subject.op, launch.name)
        for subject in bench_kernels.SUBJECTS
        for launch in bench_kernels.every_launch(subject)
    }
    with (tmp_path / "dry-run-of-the-gpu-benchmark.quick.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    found: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if row["workload"] != "device":
            assert float(row["seconds"]) > 0
            subject, *_, step = row["workload"].split()
            found.setdefault((subject, step if step in gpu.STEPS else ""), set()).add(row["contender"])
    kernels = {"kernel"} if shutil.which("g++") else set()
    faiss = {"faiss IndexFlatL2, CPU"} if find_spec("faiss") else set()
    for step in gpu.STEPS:
        assert found.pop(("group_norm_silu", step)) == {"triton", "PyTorch eager", "torch.compile"}
        assert found.pop(("attention", step)) == {"triton", "SDPA", "torch.compile"}
    cuda = {"cuda"} if kernels else set()
    assert found.pop(("search", "")) == cuda | faiss | {"int8", "torch.cdist + topk"}
    if kernels:
        assert found.pop(("refine", "")) == {"kernel", "PyTorch eager"}
    assert found.pop(("network", "inference")) == {"triton", "PyTorch eager"}
    assert found.pop(("network", "training")) == {"triton", "PyTorch eager", "triton, compiled", "PyTorch, compiled"}
    assert found.pop(("posterior", "")) == {"triton", "PyTorch in blocks", "cdist, softmax"}
    assert not found


def test_a_wrong_answer_is_reported():
    """Off by more than twice PyTorch's error, not the same twice, or not the exact integers."""
    right = torch.linspace(0, 1, 5)
    calls = iter(range(9))
    ways = {"triton": lambda: [right + 1e-3], "PyTorch eager": lambda: [right]}
    exact = lambda: [right.double()]  # noqa: E731
    assert ["off by" in each for each in gpu.errors(gpu.Case("op", ways, exact, "PyTorch eager"))] == [True]
    drifting = {"triton": lambda: [right + 1e-6 * next(calls) * right], "PyTorch eager": lambda: [right]}
    assert gpu.errors(gpu.Case("op", drifting, exact, "PyTorch eager")) == ["triton: two runs differ"]
    integers = {"kernel": lambda: [torch.tensor([2, 3])], "faiss IndexFlatL2, CPU": lambda: [torch.tensor([9.5, 9.5])]}
    assert gpu.errors(gpu.Case("search", integers, lambda: [torch.tensor([2, 4])], "kernel")) == ["kernel is not exact"]
