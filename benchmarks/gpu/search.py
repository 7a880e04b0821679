"""The exact two nearest of uint8 images, by every backend of `diffmem.search.gpu`, and by what others would use: a
product in float16 and topk, `torch.cdist` with TF32, FAISS on the GPU where it is installed."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch

from benchmarks.gpu.cases import Case, Values, Way, measure
from benchmarks.gpu.runner import ROOT
from benchmarks.gpu.target import Target
from diffmem.ops.nearest import nearest
from diffmem.ops.nearest.cuda import nearest_cuda, refine_cuda
from diffmem.ops.registry import native_unavailable
from diffmem.precision import float32_products
from diffmem.search.gpu import GpuRows, available_backends

PAIRS = 1 << 29  # of queries and images whose distances a baseline holds at a time: 2 GB in float32
OURS = ("cuda", "int8", "faiss")  # exact
CHECKED = 64  # queries that are held against the CPU; all are held against the other backends


def run(target: Target) -> list[str]:
    sizes = [(16, 200, 48)] if target.tiny else [(10_000, 50_000, 3072), (10_000, 1_280_000, 3072), (32, 50_000, 3072)]
    wrong = []
    for count, n, d in sizes:
        if target.fits(6.0 if n < 100_000 else 15.0, f"search {count} of {n}, d = {d}"):
            for case in cases(target, count, n, d):
                wrong += measure(case, target, "search")
            target.empty_cache()
        if n == 50_000 and count > 1000:
            profile(target)
    return wrong


def images(target: Target, count: int, n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random queries [count, d] and images [n, d]; half of the queries lie near an image each."""
    training, queries = target.bytes(n, d), target.bytes(count, d, seed=1)
    half = min(count, n) // 2
    queries[:half] = training[:half] // 2 + queries[:half] // 2
    return queries, training


def cases(target: Target, count: int, n: int, d: int) -> Iterator[Case]:
    queries, training = images(target, count, n, d)
    names = list(available_backends(target.device))
    if target.tiny and stand_in() is not None:
        names.insert(0, "cuda")
    if "cuda" not in names:
        reason = "there is no g++ for the stand-in" if target.tiny else native_unavailable("cuda")
        print(f"search: the CUDA kernels are left out: {reason}")
    backends = {name: GpuRows(training, target.device, name) for name in names}

    def by(name: str, _: int) -> Values:
        return list(backends[name](queries, 2))

    ways: dict[str, Way] = {name: on_device(target, partial(by, name)) for name in names}
    ours = tuple(ways)

    def exact() -> Values:
        """Of the first queries by the CPU, of all others by int8 products."""
        found = list(backends["int8"](queries, 2))
        few = nearest(queries[:CHECKED].cpu(), training.cpu(), 2, impl="torch")
        return [torch.cat([a, b[len(a) :].cpu()]) for a, b in zip(few, found, strict=True)]

    yield Case(
        f"search {count} of {n}, d = {d}", ways | baselines(queries, training), exact, ours[0], ours,
        operations=2.0 * count * n * d, matrix="int8", capturable=False,
    )  # fmt: skip
    if "cuda" not in names or n > 100_000:
        return

    # Of each query, candidates as a filter leaves them: the answer among others.
    each = min(n, 300)
    candidates = torch.randint(0, n, (count, each), device=target.device)
    candidates[:, 0] = torch.arange(count, device=target.device) % n
    offsets = torch.arange(count + 1, device=target.device) * each

    def refine(_: int) -> Values:
        return list(refine_cuda(queries, training, candidates.flatten(), offsets, 2))

    def by_pytorch(_: int) -> Values:
        found = []
        for start in range(0, count, 64):
            listed = candidates[start : start + 64].sort(dim=1).values  # ascending: the first of equal ones is lowest
            squared = (training[listed].int() - queries[start : start + 64, None].int()).square_().sum(dim=2)
            squared[:, 1:].masked_fill_(listed[:, 1:] == listed[:, :-1], torch.iinfo(torch.int64).max)  # counts once
            best = squared.sort(dim=1, stable=True)
            found.append((best.values[:, :2].long(), listed.gather(1, best.indices[:, :2])))
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    yield Case(
        f"refine {each} candidates of {n} for {count}, d = {d}",
        {"cuda": on_device(target, refine), "PyTorch eager": by_pytorch}, partial(by_pytorch, 0), "PyTorch eager",
        ("cuda",), bytes=1.0 * count * each * d, capturable=False,
    )  # fmt: skip


def baselines(queries: torch.Tensor, training: torch.Tensor) -> dict[str, Way]:
    """What gives about the same answer. Images are made ready beforehand, as an index's would be."""
    step = max(1, PAIRS // len(training))

    def joined(found: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], values: torch.Tensor) -> Values:
        parts = [found(block) for block in values.split(step)]
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    half = (training.to(torch.float16) / 127.5 - 1).contiguous()
    half_queries = queries.to(torch.float16) / 127.5 - 1
    half_norms = torch.cat([each.float().square().sum(dim=1) for each in half.split(1 << 16)]).to(torch.float16)

    def by_products(_: int) -> Values:
        return joined(lambda x: torch.addmm(half_norms, x, half.T, alpha=-2).topk(2, largest=False), half_queries)

    ways: dict[str, Way] = {"fp16 product + topk": by_products}
    if training.numel() * 4 < 24 << 30:
        floats, float_queries = training.float(), queries.float()

        def by_cdist(_: int) -> Values:
            with float32_products("tf32"):
                return joined(lambda x: torch.cdist(x, floats).topk(2, largest=False), float_queries)

        ways["torch.cdist (TF32) + topk"] = by_cdist
    if len(training) > 100_000:  # FAISS takes its vectors from the host: half a minute
        return ways
    return ways | faiss_ways(queries, training)


def faiss_ways(queries: torch.Tensor, training: torch.Tensor) -> dict[str, Way]:
    """FAISS's flat index as its users use it, on the GPU; in a dry run on the CPU."""
    try:
        import faiss
    except ImportError:
        return {}
    index, name = faiss.IndexFlatL2(training.shape[1]), "faiss IndexFlatL2, CPU"
    if training.device.type == "cuda":
        if not faiss.get_num_gpus():
            return {}
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), training.device.index or 0, index)
        name = "faiss IndexFlatL2, GPU"
    for block in training.split(1 << 17):
        index.add(block.float().cpu().numpy())
    values = queries.float().cpu().numpy()
    return {name: lambda _: [torch.from_numpy(each) for each in index.search(values, 2)]}


@cache
def core_of_the_stand_in():
    """The CUDA kernels as code for the CPU, or None where no compiler is found."""
    from benchmarks.host_core import build_core

    if shutil.which("g++") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return build_core(Path(folder) / "nearest.so")  # stays mapped when the file is gone


def stand_in() -> contextlib.AbstractContextManager | None:
    """Puts the CUDA kernels onto the CPU while it lasts."""
    from benchmarks.host_core import on_the_stand_in

    core = core_of_the_stand_in()
    return None if core is None else on_the_stand_in(core)


def on_device(target: Target, way: Way) -> Way:
    """As it is; in a dry run on the host stand-in, where there is one."""
    if not target.tiny or stand_in() is None:
        return way

    def by_the_stand_in(number: int) -> Values:
        with stand_in():
            return way(number)

    return by_the_stand_in


def sanitized(target: Target) -> list[str]:
    """A small search and refinement, for compute-sanitizer: every kernel, odd sizes, both tilings."""
    wrong = []
    sizes = [(9, 70, 33, 2)] if target.tiny else [(70, 1500, 200, 2), (9, 300, 33, 40)]
    for count, n, d, k in sizes:
        queries, training = images(target, count, n, d)
        expected = nearest(queries.cpu(), training.cpu(), k, impl="torch")
        everything = torch.arange(n, device=target.device).repeat(count)
        offsets = torch.arange(count + 1, device=target.device) * n

        def search(_: int, queries=queries, training=training, k=k) -> Values:
            return list(nearest_cuda(queries, training, k))

        def refine(_: int, queries=queries, training=training, all=everything, offsets=offsets, k=k) -> Values:
            return list(refine_cuda(queries, training, all, offsets, k))

        for name, way in (("search", search), ("refine", refine)):
            found = on_device(target, way)(0)
            if not all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True)):
                wrong.append(f"{name} of {count} in {n}, d = {d}, k = {k} is not exact")
    return wrong


def profiled(target: Target) -> None:
    """One search that fills the device, for ncu."""
    queries, training = images(target, *((9, 70, 33) if target.tiny else (2048, 50_000, 3072)))
    on_device(target, lambda _: list(nearest_cuda(queries, training, 2)))(0)
    if target.device.type == "cuda":
        torch.cuda.synchronize()


def profile(target: Target) -> None:
    """ncu of the search kernel: tensor pipe, L2 and memory, into ncu.txt. The clocks are left alone."""
    ncu = shutil.which("ncu")
    left = target.deadline - time.monotonic() - 20
    if ncu is None or left < 15:
        print("ncu was not found" if ncu is None else "ncu: no time left")
        return
    command = [
        ncu, "--clock-control", "none", "--kernel-name", "regex:search_kernel", "--launch-count", "1",
        "--section", "SpeedOfLight", "--section", "MemoryWorkloadAnalysis", "--section", "ComputeWorkloadAnalysis",
        "--section", "Occupancy", "--section", "WarpStateStats",
        sys.executable, "-m", "benchmarks.gpu", "--stage", "profiled", "--out", str(target.out),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=min(left, 40))
        (target.out / "ncu.txt").write_text(done.stdout + done.stderr)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"ncu: {error}")
