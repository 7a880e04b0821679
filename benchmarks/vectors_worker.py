"""One run of `VectorIndex` over shards on disk, in a process of its own: seconds and memory, as JSON.

`python -m benchmarks.vectors_worker FOLDER SHARDS QUERIES [--build] [--threads N] [--check N]`: FOLDER holds `000.npy`,
`001.npy`, … and `queries.npy`; the codes lie in `codes` beside them and are made again with --build. Memory is the
highest resident anonymous memory (RssAnon of /proc/self/status), which no other process shares and no memory map backs;
pages of mapped files (RssFile) are the page cache's, and the system takes them back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.load import Meter
from diffmem.search import VectorIndex


class Memory:
    """The highest resident memory of this process while it is open, in bytes, by kind."""

    def __init__(self) -> None:
        self.peak = {"RssAnon": 0, "RssFile": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        status = Path("/proc/self/status")
        while status.exists() and not self._stop.wait(0.02):
            for kind, size in re.findall(r"^(RssAnon|RssFile):\s+(\d+) kB", status.read_text(), re.MULTILINE):
                self.peak[kind] = max(self.peak[kind], int(size) * 1024)

    def close(self) -> dict[str, int]:
        self._stop.set()
        self._thread.join()
        return self.peak


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("shards", type=int)
    parser.add_argument("queries", type=int)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--check", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    codes = given.folder / "codes"
    if given.build and codes.exists():
        shutil.rmtree(codes)
    memory, meter = Memory(), Meter()
    start = time.perf_counter()
    index = VectorIndex([given.folder / f"{i:03}.npy" for i in range(given.shards)], codes=codes)
    opened = time.perf_counter() - start
    queries = np.load(given.folder / "queries.npy")[: given.queries]
    start = time.perf_counter()
    found = index.query(queries)
    seconds = time.perf_counter() - start
    report = {
        "rows": len(index), "queries": len(queries), "threads": given.threads, "opened": opened, "seconds": seconds,
        "phases": index.stats.seconds, "fine": index.stats.fine / max(1, index.stats.bounded),
        "refined": index.stats.refined / len(queries), **memory.close(), **meter.load().columns(),
    }  # fmt: skip
    if given.check:
        start = time.perf_counter()
        every = VectorIndex(index.shards.arrays, method="torch").query(queries[: given.check])
        same = np.array_equal(every.indices, found.indices[: given.check])
        same &= np.array_equal(every.squared_distances, found.squared_distances[: given.check])
        report |= {"checked": given.check, "same": bool(same), "check_seconds": time.perf_counter() - start}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
