"""Exact nearest float vectors: `VectorIndex` against FAISS flat, SQfp16, IVF and HNSW, and from disk.

FAISS gets its best conditions: float32 vectors in memory, all queries in one call, all threads. Its approximate indexes
are rows of the same workload, and their notes say what they find: the shares of first and second neighbors whose
distance is the exact one. `vector_sets.py` says what the vectors are. The runs from disk (`on disk`) are processes of
their own (`vectors_worker.py`), which report the memory they took.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import vector_sets
from benchmarks.harness import Bench, Contender
from diffmem.search import VectorIndex

MINUTES = 40
ISAS = ("avx2",)
K = 2
LARGEST = 100_000  # vectors up to which all of FAISS's indexes are tried: IVF and HNSW take minutes to build beyond
DISK_SHARDS, DISK_QUERIES, DISK_CHECKED = 10, 1000, 8
SCALE_SHARDS = (1, 2, 4, 8)


def run(bench: Bench) -> None:
    scale = 50 if bench.quick else 1
    queries = 1000 // scale
    for name, training, some in vector_sets.given():
        against_faiss(bench, name, lambda training=training: training, lambda some=some: some[:queries])
    for size in (100_000, 1_000_000):
        count = size // scale
        against_faiss(
            bench, "crop features", lambda count=count: crops(count), lambda: crop_queries()[:queries], count, queries
        )
        against_faiss(
            bench, "white noise", lambda count=count: vector_sets.white_noise(count, 0),
            lambda: vector_sets.white_noise(queries, 1), count, queries,
        )  # fmt: skip
    against_faiss(
        bench, "crop features", lambda: crops(100_000 // scale), lambda: crop_queries()[:8], 100_000 // scale, 8
    )
    for name in ("white noise", "crop spectrum"):
        on_disk(bench, name)


def crops(count: int) -> np.ndarray:
    """The first of the crop features that are kept in `storage`."""
    path = vector_sets.storage() / "crops.npy"
    if path.exists() and len(found := np.load(path, mmap_mode="r")) >= count:
        return np.asarray(found[:count])
    return vector_sets.crop_features(count)


def crop_queries() -> np.ndarray:
    path = vector_sets.storage() / "crop-queries.npy"
    return np.load(path) if path.exists() else vector_sets.crop_queries(1000)


def against_faiss(
    bench: Bench,
    name: str,
    training: Callable[[], np.ndarray],
    queries: Callable[[], np.ndarray],
    count: int | None = None,
    asked: int | None = None,
) -> None:
    import faiss

    count = len(training()) if count is None else count
    asked = len(queries()) if asked is None else asked
    workload = f"vectors: {name}, {count:,}, {asked:,} queries"
    if not bench.wants(workload):
        return
    rows, some = training(), queries()
    wide, asked_wide = np.ascontiguousarray(rows, np.float32), np.ascontiguousarray(some, np.float32)
    faiss.omp_set_num_threads(torch.get_num_threads())
    start = time.perf_counter()
    index = VectorIndex([rows])
    built = time.perf_counter() - start
    exact = index.query(some, K)
    stored = rows.nbytes + count * (index.codes.rotation.width + 24 if index.codes is not None else 0)
    contenders = [
        Contender(
            "diffmem", lambda: index.query(some, K),
            f"exact; built in {built:.2f} s, {stored / 2**20:,.0f} MB; level 2 for "
            f"{index.stats.fine / index.stats.bounded:.1%} of the pairs, {index.stats.refined / asked:.0f} exact "
            "distances per query",
        )
    ]  # fmt: skip
    lists = min(1024, int(4 * count**0.5))
    factories = [("IndexFlatL2", "Flat", ())]
    if count <= LARGEST:
        factories.append(("IndexScalarQuantizer fp16", "SQfp16", ()))
    if asked >= 20 and count <= LARGEST:
        factories.append((f"IVF{lists},Flat", f"IVF{lists},Flat", tuple((f"nprobe={p}", p) for p in (8, 64))))
        factories.append(("HNSW32", "HNSW32,Flat", tuple((f"efSearch={p}", p) for p in (32, 256))))
    for label, factory, settings in factories:
        start = time.perf_counter()
        other = faiss.index_factory(rows.shape[1], factory)
        if not other.is_trained:
            other.train(wide[np.linspace(0, count - 1, min(count, 64 * lists)).astype(np.int64)])
        other.add(wide)
        seconds = time.perf_counter() - start
        size = len(faiss.serialize_index(other)) if count <= LARGEST else count * (4 * rows.shape[1] + 16)
        for setting, value in settings or (("", None),):
            search = faiss_search(other, setting.partition("=")[0], value, asked_wide)
            found = search()[0]
            recall = [
                float((found[:, j] <= exact.squared_distances[:, j] * (1 + 1e-4) + 1e-6).mean()) for j in range(K)
            ]
            contenders.append(
                Contender(
                    f"faiss {label}" + (f" {setting}" if setting else ""), search,
                    f"built in {seconds:.2f} s, {size / 2**20:,.0f} MB; recall of first and second {recall[0]:.1%}, "
                    f"{recall[1]:.1%}",
                )
            )  # fmt: skip

    def check(answers: dict[str, Any]) -> None:
        ours, flat = answers["diffmem"], answers["faiss IndexFlatL2"]
        # FAISS's distances are float32 sums of squares of length 1.
        np.testing.assert_allclose(ours.squared_distances, flat[0], atol=2e-5, rtol=1e-4)
        every = VectorIndex([rows], method="torch").query(some[:8], K)
        np.testing.assert_array_equal(ours.indices[:8], every.indices)
        np.testing.assert_array_equal(ours.squared_distances[:8], every.squared_distances)

    bench.compare(workload, contenders, check, repeats=3 if count <= LARGEST else 1)


def faiss_search(
    index: Any, parameter: str, value: int | None, queries: np.ndarray
) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    import faiss

    def search() -> tuple[np.ndarray, np.ndarray]:
        if value is not None:
            faiss.ParameterSpace().set_index_parameter(index, parameter, value)
        return index.search(queries, K)

    return search


# ---------------------------------------------------------------------------------------------------------- from disk


def on_disk(bench: Bench, name: str) -> None:
    """Ten million vectors of 512 float16 in ten shards, codes beside them; and what 1, 2, 4 and 8 million cost, with
    one thread and with two, of white noise."""
    rows = 2000 if bench.quick else vector_sets.SHARD
    total = DISK_SHARDS * rows
    workload = f"vectors: {name}, {total:,} on disk, {DISK_QUERIES:,} queries"
    scaled = [scaled_workload(name, shards * rows, threads) for threads in (1, 2) for shards in SCALE_SHARDS]
    wanted = [each for each in (workload, *(scaled if name == "white noise" else ())) if bench.wants(each)]
    if not wanted:
        return
    folder = vector_sets.storage() / f"{name.replace(' ', '-')}-{rows}"
    if shutil.disk_usage(vector_sets.storage()).free < total * 1600 and not (folder / "queries.npy").exists():
        print(f"{workload}: not measured, {total * 1600 / 2**30:.0f} GB of disk are needed", file=sys.stderr)
        return
    make_shards(folder, name, rows)
    codes = folder / "codes"
    if workload in wanted:
        shutil.rmtree(codes, ignore_errors=True)
        record(bench, workload, work(folder, DISK_SHARDS, check=DISK_CHECKED))
    for threads in (1, 2):
        shutil.rmtree(codes, ignore_errors=True)
        built = 0.0
        for shards in SCALE_SHARDS:  # codes that are there are kept: what more rows take is added
            if not any(f", {threads} threads" in each for each in wanted):
                break
            report = work(folder, shards, threads=threads)
            built += report["opened"]
            record(bench, scaled_workload(name, shards * rows, threads), report | {"opened": built})


def scaled_workload(name: str, rows: int, threads: int) -> str:
    return f"vectors: {name}, {rows:,} on disk, {threads} threads"


def make_shards(folder: Path, name: str, rows: int) -> None:
    """Shards of float16 vectors, unless they are there."""
    if (folder / "queries.npy").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    draw = vector_sets.white_noise if name == "white noise" else vector_sets.Spectrum(crops(50_000)).draw
    for shard in range(DISK_SHARDS):
        path = folder / f"{shard:03}.npy"
        if not path.exists():
            partial = path.with_suffix(".partial")
            with partial.open("wb") as stream:
                np.save(stream, draw(rows, 100 + shard))
            partial.replace(path)
    np.save(folder / "queries.npy", draw(DISK_QUERIES, 99))


def work(folder: Path, shards: int, *, threads: int = 0, check: int = 0) -> dict[str, Any]:
    """What a process of `vectors_worker.py` reports."""
    command = [sys.executable, "-m", "benchmarks.vectors_worker", str(folder), str(shards), str(DISK_QUERIES)]
    command += ["--threads", str(threads)] if threads else []
    command += ["--check", str(check)] if check else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def record(bench: Bench, workload: str, report: dict[str, Any]) -> None:
    if not report.get("same", True):
        raise AssertionError(f"{workload}: the answer is not that of a comparison with every vector")
    memory = (
        f"{report['RssAnon'] / 2**30:.2f} GB anonymous, {report['RssFile'] / 2**30:.2f} GB of mapped files resident"
    )
    used = {"threads": str(report["threads"]), "load": report["load"], "steal": report["steal"]}
    for what, seconds, note in (
        ("build codes", report["opened"], f"{report['rows'] / report['opened'] / 1e6:.2f} million vectors/s; {memory}"),
        (
            "query", report["seconds"],
            f"{DISK_QUERIES} queries; level 2 for {report['fine']:.1%} of the pairs, {report['refined']:.0f} exact "
            f"distances per query; {memory}"
            + (f"; {report['checked']} queries checked" if "checked" in report else ""),
        ),
    ):  # fmt: skip
        bench.record(
            workload, f"diffmem, {what}", note, version=Contender("diffmem", lambda: None).version,
            seconds=f"{seconds:.6g}", fastest=f"{seconds:.6g}", repeats="1", times=f"{seconds:.6g}", **used,
        )  # fmt: skip
    bench.write()
