"""Exact nearest training images: `TrainingIndex` against FAISS flat, FAISS Panorama and `torch.cdist` + `topk`.

Pictures are CIFAR-10's where its archives lie in ../shared/data (or $DIFFMEM_DATA), else 32×32 patches of
scikit-learn's photographs. The baselines get their best conditions: data already in float32, all queries in one call,
all threads; Panorama's data and queries are rotated beforehand, and its 64 levels and batches of 128 are what did best
of 8 to 96 levels on CIFAR-10.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Bench, Contender, best_isa, isa
from benchmarks.rows import read_table
from diffmem.data import load_images
from diffmem.ops.nearest import nearest
from diffmem.search import Neighbors, TrainingIndex

MINUTES = 15
ISAS = ("avx2",)
K = 2
CHECKED = 48  # queries whose answers are compared with the exact op
PICTURES = "CIFAR-10 (JPEG)"
CDIST_BATCH = 512
PANORAMA_LEVELS, PANORAMA_BATCH = 64, 128
SIZES = (1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000)  # N of the chart
FAISS_LARGEST = 100_000  # beyond it float32 copies of the training set do not fit small machines


def run(bench: Bench) -> None:
    scale = 20 if bench.quick else 1
    name = PICTURES if archives() else "patches"
    shown = any(bench.wants(f"{name}, {what}") for what in ("10,000 queries", "32 queries", "everything included"))
    grows = any(bench.wants(f"cost against N, {size}") for size in SIZES)
    if shown or grows:
        training, queries, _ = pictures(50_000 // scale, 10_000 // scale)
    if shown:
        against_everyone(bench, name, training, queries)
        everything_included(bench, name, training, queries)
    rng = np.random.default_rng(0)
    if bench.wants("white noise, 10,000 queries"):
        noise = [rng.integers(0, 256, (n // scale, 3072), dtype=np.uint8) for n in (50_000, 10_000)]
        against(bench, "white noise, 10,000 queries", *noise, repeats=3)
    if bench.wants("patches, 10,000 queries"):
        patches = rows(load_images(f"builtin:patches?n={60_000 // scale}").images)
        against(bench, "patches, 10,000 queries", patches[10_000 // scale :], patches[: 10_000 // scale], repeats=3)
    if bench.wants("digits, 297 queries"):
        digits = rows(load_images("builtin:digits").images)
        against(bench, "digits, 297 queries", digits[297:], digits[:297])
    if grows:
        cost_against_size(bench, name, training, queries[: 1000 // scale])


def against(bench: Bench, workload: str, training: np.ndarray, queries: np.ndarray, repeats: int = 5) -> None:
    """This search against FAISS flat."""
    index = TrainingIndex(training)
    contenders = [
        Contender("diffmem", lambda: index.query(queries, K)),
        Contender("faiss IndexFlatL2", faiss_flat(training, queries)),
    ]
    bench.compare(workload, contenders, checked_by(training, queries), repeats)


def against_everyone(bench: Bench, name: str, training: np.ndarray, queries: np.ndarray) -> None:
    index = TrainingIndex(training)
    for count, repeats in ((len(queries), 3), (32, 15)):
        workload = f"{name}, {'10,000' if count > 32 else count} queries"
        if not bench.wants(workload):
            continue
        some = queries[:count]
        flat = faiss_flat(training, some)
        contenders = [
            Contender("diffmem", lambda some=some: index.query(some, K)),
            Contender("faiss IndexFlatL2", flat),
        ]
        if count > 32:
            contenders += [
                Contender("faiss IndexFlatL2Panorama", faiss_panorama(training, some), "rotated beforehand"),
                Contender("torch.cdist + topk", torch_cdist(training, some), f"batches of {CDIST_BATCH}"),
            ]
        bench.compare(workload, contenders, checked_by(training, some), repeats)


def everything_included(bench: Bench, name: str, training: np.ndarray, queries: np.ndarray) -> None:
    """From arrays in files to the answer."""
    import faiss

    workload = f"{name}, everything included"
    if not bench.wants(workload):
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "training.npy", Path(folder) / "queries.npy"]
        for path, values in zip(paths, (training, queries), strict=True):
            np.save(path, values)

        def ours() -> Neighbors:
            return TrainingIndex(np.load(paths[0])).query(np.load(paths[1]), K)

        def flat() -> tuple[np.ndarray, np.ndarray]:
            index = faiss.IndexFlatL2(training.shape[1])
            index.add(np.load(paths[0]).astype(np.float32))
            return index.search(np.load(paths[1]).astype(np.float32), K)

        contenders = [Contender("diffmem", ours, "read, index, search"), Contender("faiss IndexFlatL2", flat)]
        bench.compare(workload, contenders, checked_by(training, queries), 3)


def cost_against_size(bench: Bench, name: str, training: np.ndarray, queries: np.ndarray) -> None:
    """Queries against training sets of growing size, memory-mapped; beyond the pictures there are, altered copies."""
    note = f"{name}, {len(queries)} queries, memory-mapped"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "training.npy"
        everyone = grown(training, SIZES[-3 if bench.quick else -1], path)
        for size in SIZES:
            if size > len(everyone):
                break
            if not bench.wants(f"cost against N, {size}"):
                continue
            some = everyone[:size]
            contenders = []
            with resident() as memory:
                start = time.perf_counter()
                index = TrainingIndex(some)
                built = time.perf_counter() - start
                index.query(queries, K)
                held = memory()
            contenders.append(
                Contender("diffmem", lambda index=index: index.query(queries, K),
                          f"{note}; built in {built:.2f} s; {held / 2**20:.0f} MB resident beside the page cache"),
            )  # fmt: skip
            if size <= FAISS_LARGEST:
                contenders.append(Contender("faiss IndexFlatL2", faiss_flat(some, queries), note))
            bench.compare(f"cost against N, {size}", contenders, checked_by(some, queries), 3)
            del index, contenders
            gc.collect()
    draw_chart(bench)


# ------------------------------------------------------------------------------------------------------- baselines


def faiss_flat(training: np.ndarray, queries: np.ndarray) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    import faiss

    index = faiss.IndexFlatL2(training.shape[1])
    for start in range(0, len(training), 10_000):
        index.add(training[start : start + 10_000].astype(np.float32))
    floats = queries.astype(np.float32)
    return lambda: index.search(floats, K)


def faiss_panorama(training: np.ndarray, queries: np.ndarray) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    import faiss

    mean = torch.from_numpy(training).float().mean(dim=0)
    centered = torch.from_numpy(training).float() - mean
    _, rotation = torch.linalg.eigh(centered[::4].T @ centered[::4])
    rotation = rotation.flip(1)
    index = faiss.IndexFlatL2Panorama(training.shape[1], PANORAMA_LEVELS, PANORAMA_BATCH)
    index.add((centered @ rotation).numpy())
    rotated = ((torch.from_numpy(queries).float() - mean) @ rotation).numpy()
    return lambda: index.search(rotated, K)


def torch_cdist(training: np.ndarray, queries: np.ndarray) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    y, x = torch.from_numpy(training).float(), torch.from_numpy(queries).float()

    def search() -> tuple[np.ndarray, np.ndarray]:
        found = [torch.cdist(batch, y).topk(K, largest=False) for batch in x.split(CDIST_BATCH)]
        return (
            torch.cat([part.values for part in found]).square().numpy(),
            torch.cat([part.indices for part in found]).numpy(),
        )

    return search


def checked_by(training: np.ndarray, queries: np.ndarray) -> Callable[[dict], None]:
    """Ours must be exact, and the baselines' distances right to their float32 rounding."""

    def check(answers: dict) -> None:
        some = np.linspace(0, len(queries) - 1, min(len(queries), CHECKED)).astype(np.int64)
        expected, indices = nearest(
            torch.from_numpy(queries[some]), torch.from_numpy(np.asarray(training)), K, impl="torch"
        )
        for name, answer in answers.items():
            if isinstance(answer, Neighbors):
                np.testing.assert_array_equal(answer.squared_distances[some], expected)
                np.testing.assert_array_equal(answer.indices[some], indices)
            else:
                np.testing.assert_allclose(answer[0][some], expected, rtol=2e-3, atol=2000, err_msg=name)

    return check


# ------------------------------------------------------------------------------------------------------------ data


def rows(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.reshape(len(images), -1))


def archives() -> list[Path]:
    """CIFAR-10's training and test images, or nothing."""
    root = Path(os.environ.get("DIFFMEM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    found = [root / f"cifar10-{part}.zip" for part in ("train", "test")]
    return found if all(archive.exists() for archive in found) else []


def pictures(training: int, queries: int) -> tuple[np.ndarray, np.ndarray, str]:
    """uint8 [N, 3072], [Q, 3072] and what they are."""
    if found := archives():
        parts = [rows(load_images(archive).images) for archive in found]
        return parts[0][:training], parts[1][:queries], PICTURES
    patches = rows(load_images(f"builtin:patches?n={training + queries}").images)
    return patches[queries:], patches[:queries], "patches"


def grown(images: np.ndarray, size: int, path: Path) -> np.ndarray:
    """`size` rows in a file, memory-mapped: the images, then mirrored, shifted and brightened copies of them."""
    whole = np.lib.format.open_memmap(path, "w+", np.uint8, (size, images.shape[1]))
    square = images.reshape(-1, 3, 32, 32)
    rng = np.random.default_rng(0)
    for start in range(0, size, len(images)):
        part = square[: size - start]
        if start:
            part = np.roll(part[..., :: rng.choice((-1, 1))], rng.integers(-6, 7, 2), axis=(2, 3)).astype(np.int16)
            part = np.clip(part + rng.integers(-30, 31, (len(part), 1, 1, 1)), 0, 255)
        whole[start : start + len(part)] = part.reshape(len(part), -1)
    whole.flush()
    return np.load(path, mmap_mode="r")


@contextmanager
def resident() -> Iterator[Callable[[], int]]:
    """A function that says the largest memory this process has held so far, page cache (its mapped files) apart."""
    import threading

    def anonymous() -> int:
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: max(peak, anonymous())
    finally:
        done.set()
        watcher.join()


def draw_chart(bench: Bench) -> None:
    """Seconds against N, log-log, from the table as it then is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = [row for row in read_table(bench.path) if row["isa"] == isa()]
    if isa() != best_isa() or not any(row["workload"].startswith("cost against N") for row in table):
        return
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for contender, mark in (("faiss IndexFlatL2", "s"), ("diffmem", "o")):
        points = sorted(
            (int(row["workload"].rpartition(" ")[2]), float(row["seconds"]))
            for row in table
            if row["contender"] == contender and row["workload"].startswith("cost against N")
        )
        if points:
            axes.loglog(*zip(*points, strict=True), marker=mark, label=contender)
    note = next(row for row in table if row["workload"].startswith("cost against N"))
    axes.set_xlabel("training images N")
    axes.set_ylabel("seconds")
    axes.set_title(
        f"Two nearest training images, exactly\n{note['note'].partition(';')[0]}\n{note['machine']}", fontsize=9
    )
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.savefig(bench.path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
