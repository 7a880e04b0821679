"""`make gpu` without a GPU: its dry run runs every stage's lines; what fails, hangs or does not fit stops no other."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import torch
from triton_interpreter import why_not
from zygote import Zygote

from benchmarks import bench_kernels, readme_table
from benchmarks.gpu import build, runner
from benchmarks.gpu.adopt import adopt_results
from benchmarks.gpu.cases import Case, errors
from benchmarks.gpu.jobs import DRY_JOBS, IMPLEMENTATIONS, JOBS, SAMPLER, TRAINING
from benchmarks.gpu.runner import Compilations, Job, Stage
from benchmarks.gpu.target import KINDS, Target
from diffmem.ops import registry

ROOT = Path(__file__).parents[2]
IMPORTED = [
    "pytest", "torch._dynamo", "numpy", "diffmem.optimum", "diffmem.training", "benchmarks.gpu.command",
    "benchmarks.gpu.correctness", "benchmarks.gpu.search", "benchmarks.gpu.sampler", "benchmarks.gpu.training",
    "benchmarks.gpu.operations", "benchmarks.gpu.optimum", "benchmarks.gpu.ceilings", "benchmarks.gpu.compile",
    *(f"diffmem.ops.{op}.triton_kernels" for op in ("group_norm_silu", "attention", "posterior_mean")),
]  # fmt: skip


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_dry_run_covers_every_stage_kernel_and_baseline(tmp_path):
    """The command itself; it leaves results in its folder and nothing elsewhere. Its dozen processes are forks of one
    that has imported what they need, Triton as its interpreter."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    interpreted = {**environment, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "DIFFMEM_GPU_TESTS": "interpret"}
    with Zygote(IMPORTED, interpreted) as zygote:
        command = ["make", "gpu", f"OUT={tmp_path / 'out'}", "INTERPRET=1", f"PYTHON={zygote.executable}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    out = tmp_path / "out"
    log = (out / runner.LOG).read_text() if (out / runner.LOG).exists() else ""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:] + log[-4000:]
    assert not list(home.iterdir())

    metadata = json.loads((out / runner.STAGES_FILE).read_text())
    assert [(each["stage"], each["status"]) for each in metadata["stages"]] == [
        (stage.name, "finished") for stage in runner.STAGES
    ]
    assert metadata["compilations"] == {job.name: "finished" for job in DRY_JOBS}
    assert len([path for path in out.rglob("*") if path.is_file()]) <= 8
    assert (out / runner.SUMMARY).read_text().strip() in done.stdout

    by_stage = json.loads((out / "launched.json").read_text())
    launched = {tuple(each) for names in by_stage.values() for each in names}
    assert launched == {
        (subject.op, launch.name)
        for subject in bench_kernels.SUBJECTS
        for launch in bench_kernels.every_launch(subject)
    }
    with (out / runner.RESULTS).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    found: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if row["subject"] != "ceilings":
            assert float(row["seconds"]) > 0
            kind = row["workload"].split()[0]
            step = row["workload"].split()[-1] if row["subject"] == "operations" else ""
            found.setdefault((row["subject"], f"{kind} {step}".strip()), set()).add(row["contender"])
    kernels = {"cuda"} if shutil.which("g++") else set()
    faiss = {"faiss IndexFlatL2, CPU"} if find_spec("faiss") else set()
    expected = {
        ("operations", "group_norm_silu inference"): {"triton", "PyTorch eager", "torch.compile"},
        ("operations", "group_norm_silu training"): {"triton", "PyTorch eager", "torch.compile"},
        ("operations", "attention inference"): {"triton", "SDPA"},
        ("operations", "attention training"): {"triton", "SDPA"},
        ("search", "search"): kernels | faiss | {"int8", "fp16 product + topk", "torch.cdist (TF32) + topk"},
        ("sampler", "Heun"): set(IMPLEMENTATIONS),
        ("training", "train"): set(IMPLEMENTATIONS),
        ("optimum", "posterior"): {"triton", "torch", "cdist, softmax"},
        ("optimum", "optimum"): {"diffmem", "cdist, softmax, matmul"},
    }
    if kernels:
        expected["search", "refine"] = {"cuda", "PyTorch eager"}
    assert found == expected
    assert {row["workload"] for row in rows if row["subject"] == "ceilings"} == {f"device: {kind}" for kind in KINDS}
    assert "did not fit" not in log
    with pytest.raises(click.ClickException, match="no results of a GPU"):
        adopt_results(out)


def fake(stage, out, limit, interpret, only=""):
    """Stages that end, fail, hang, and start what hangs."""
    code = {
        "good": "print('all well')",
        "bad": "raise SystemExit('1 wrong: it is')",
        "hangs": "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('so far', flush=True); time.sleep(60)",
        "writes": f"open({str(out / 'results.csv')!r}, 'w').write('subject,workload,contender,seconds,ratio,note\\n"
        "s,a workload,ours,0.5,1,fine\\n')",
        "compile": f"import time; time.sleep(0.3); print('compiled', {only!r})",
    }[stage]
    return [sys.executable, "-c", code]


def test_a_stage_that_fails_or_hangs_stops_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ENDING", 0.2)
    monkeypatch.setattr(runner, "SHORTEST", 0.5)
    stages = [Stage("bad", 1, 30), Stage("hangs", 1, 1.5), Stage("writes", 1, 30), Stage("good", 1, 30)]
    said = []
    outcomes = runner.run(
        tmp_path, budget=60, stages=stages, jobs=[Job("one", 1), Job("two", 1)], command=fake, say=said.append
    )
    assert [(each.stage, each.status, each.detail) for each in outcomes] == [
        ("bad", "failed", "1 wrong: it is"), ("hangs", "ended at its limit", "so far"), ("writes", "finished", ""),
        ("good", "finished", "all well"),
    ]  # fmt: skip
    metadata = json.loads((tmp_path / runner.STAGES_FILE).read_text())
    assert metadata["compilations"] == {"one": "finished", "two": "finished"}
    summary = (tmp_path / runner.SUMMARY).read_text()
    assert said[-1] == summary.rstrip("\n")
    assert "a workload" in summary
    assert "compiled one" in (tmp_path / runner.LOG).read_text()


def test_what_does_not_fit_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ENDING", 0.2)
    monkeypatch.setattr(runner, "SHORTEST", 2.0)
    began = time.monotonic()
    stages = [Stage("hangs", 1, 100), Stage("good", 1, 100)]
    outcomes = runner.run(tmp_path, budget=3.0, stages=stages, command=fake, say=lambda line: None)
    assert [(each.stage, each.status) for each in outcomes] == [
        ("hangs", "ended at its limit"), ("good", "did not fit"),
    ]  # fmt: skip
    assert time.monotonic() - began < 30
    only = runner.run(tmp_path, stages=stages, only=["good"], command=fake, say=lambda line: None)
    assert [each.stage for each in only] == ["good"]


def test_compilations_share_cores_and_memory():
    running, ended = [], set()

    def start(job):
        running.append(job.name)
        return SimpleNamespace(poll=lambda: 0 if job.name in ended else None, returncode=0)

    jobs = [Job("large", 50), Job("larger", 60), Job("small", 5), Job("other", 5), Job("last", 1)]
    work = Compilations(jobs, start, at_once=3, gigabytes=60)
    assert work.poll()
    assert running == ["large", "small", "other"]  # the larger one has to wait, the last for a core
    ended |= {"small"}
    work.poll()
    assert running[3:] == ["last"]
    ended |= {"large", "other", "last"}
    work.poll()
    assert running[4:] == ["larger"]  # alone, it may be as large as it likes
    ended.add("larger")
    assert not work.poll()
    assert set(work.outcomes.values()) == {"finished"}


def test_the_plan_fits_the_budget():
    assert sum(stage.planned for stage in runner.STAGES) <= runner.BUDGET - 60
    assert all(stage.planned <= stage.limit for stage in runner.STAGES)
    assert {variant.precision for variant in (*SAMPLER, *TRAINING)} == {"ieee", "tf32", "bf16"}
    assert {(variant.batch, variant.precision, variant.compiled) for variant in SAMPLER} == {
        (batch, precision, compiled)
        for batch in (512, 64) for precision in ("ieee", "tf32", "bf16") for compiled in (True, False)
    }  # fmt: skip
    assert len(JOBS) == 2 * sum(variant.compiled for variant in (*SAMPLER, *TRAINING))


def test_a_wrong_answer_is_reported():
    """Off by more than twice PyTorch's error, not the same twice, or not the exact integers."""
    right = torch.linspace(0, 1, 5)
    calls = iter(range(9))
    ways = {"triton": lambda _: [right + 1e-3], "PyTorch eager": lambda _: [right]}
    exact = lambda: [right.double()]  # noqa: E731
    found = errors(Case("op", ways, exact, "PyTorch eager", ("triton",)))
    assert ["off by" in each for each in found] == [True]
    drifting = {"triton": lambda _: [right + 1e-6 * next(calls) * right], "PyTorch eager": lambda _: [right]}
    assert errors(Case("op", drifting, exact, "PyTorch eager", ("triton",))) == ["triton: two runs differ"]
    integers = {"cuda": lambda _: [torch.tensor([2, 3])], "faiss": lambda _: [torch.tensor([9.5, 9.5])]}
    case = Case("search", integers, lambda: [torch.tensor([2, 4])], "cuda", ("cuda",))
    assert errors(case) == ["cuda is not exact"]


def test_rotating_buffers_are_larger_than_the_cache(monkeypatch, tmp_path):
    target = Target(torch.device("cuda"), False, tmp_path, "card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 << 20))
    for size in (1 << 20, 30 << 20, 1 << 30):
        assert (target.sets(size) - 1) * size >= 2 * (50 << 20) or target.sets(size) == 24
        assert target.sets(size) >= 2


def test_the_core_is_built_for_one_gpu(tmp_path, monkeypatch):
    """By CMake alone; what it makes takes the place of diffmem/_C."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    steps = []

    def run(command, **options):
        steps.append(command)
        (tmp_path / "build" / "_C.cpython-312.so").write_bytes(b"new")
        (tmp_path / "build" / "diffmem_build_info.json").write_text('{"native": true}')

    module = build.build("90", tmp_path / "build", 60, run)
    assert [each[1] for each in steps] == ["-S", "--build"]
    assert "-DDIFFMEM_CUDA_ARCHITECTURES=90-real" in steps[0]
    assert f"-DPython_EXECUTABLE={sys.executable}" in steps[0]
    (package := tmp_path / "diffmem").mkdir()
    (package / module.name).write_bytes(b"old")
    build.put(module, tmp_path / "build" / "diffmem_build_info.json", package)
    assert {path.name: path.read_bytes() for path in package.iterdir()} == {
        "_C.cpython-312.so": b"new", "_build_info.json": b'{"native": true}',
    }  # fmt: skip


@pytest.mark.parametrize(("module", "cuda"), [
    (None, False), (SimpleNamespace(with_cuda=False), False), (SimpleNamespace(with_cuda=True), True),
])  # fmt: skip
def test_a_core_of_another_python_is_none(monkeypatch, capsys, module, cuda):
    """_build_info.json lies beside the modules of all Pythons."""
    monkeypatch.setattr(registry, "native_module", lambda: module)
    monkeypatch.setattr(registry, "build_info", lambda: {"native": True, "cuda": True, "cuda_reason": "nvcc"})
    exec(build.FOUND)
    found = json.loads(capsys.readouterr().out)
    assert (found["present"], found["cuda"]) == (module is not None, cuda)


def test_results_are_adopted_under_the_card_s_name(tmp_path):
    """… and the README's table shows them: ours against each baseline, but for the single operations."""
    columns = ("subject", "workload", "contender", "seconds", "ratio", "note", "machine", "threads", "versions",
               "commit")  # fmt: skip
    rows = [
        ("ceilings", "device: int8", "measured", "", "", "1e15 operations/s"),
        ("sampler", "Heun batch 512 bf16 compiled", "diffmem", "0.02", "1", "700 images/s"),
        ("sampler", "Heun batch 512 bf16 compiled", "PyTorch's", "0.03", "1.5", "500 images/s"),
        ("operations", "attention 1", "triton", "0.001", "1", ""),
        ("operations", "attention 1", "SDPA", "0.002", "2", ""),
    ]  # fmt: skip
    out, results = tmp_path / "out", tmp_path / "results"
    out.mkdir()
    results.mkdir()
    with (out / runner.RESULTS).open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows([*row, "NVIDIA H100 80GB HBM3", "16", "torch 2.11.0", "abc"] for row in rows)
    (out / runner.STAGES_FILE).write_text('{"dry_run": false}')
    path = adopt_results(out, results)
    assert path == results / "gpu.nvidia-h100-80gb-hbm3.csv"
    adopt_results(out, results)  # replaces its own
    assert len(path.read_text().splitlines()) == 1 + len(rows)
    table = readme_table.table(results)
    assert "| Heun batch 512 bf16 compiled | – | 20 ms | PyTorch's | 30 ms | 1.5× |" in table
    assert "attention" not in table
    assert "Measured on NVIDIA H100 80GB HBM3, 16 threads; torch 2.11.0; commit abc." in table
