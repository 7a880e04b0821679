"""The whole command: `diffmem audit` as a user types it, from the start of Python to the page, against what it takes to
decode its pictures alone, with Pillow, in as many processes as there are cores.

10,000 JPEG pictures against 50,000: CIFAR-10 where its archives lie in ../shared/data, else patches. They are copied
first, since cached copies are written beside them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import Bench, Contender
from benchmarks.load import cores
from diffmem.data import load_images

MINUTES = 6
ISAS = ("avx2",)
# What is measured, and the options that it takes. With a cache the copies are there already.
COMMANDS: dict[str, list[str]] = {
    "audit": ["audit"],
    "audit with cached copies": ["audit", "--cache"],
    "audit without a second look": ["audit", "--no-second-look"],
    "audit of aligned images": ["audit", "--features", "aligned"],
    "all measures": ["measure"],
}


def run(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as folder:
        small = 20 if bench.quick else 1
        generated, training, name = archives(Path(folder), 10_000 // small, 50_000 // small)
        for what, command in COMMANDS.items():
            workload = f"{name}, the command: {what}, 10,000 × 50,000 JPEG files"
            if not bench.wants(workload):
                continue
            work = partial(command_run, [*command, str(generated), str(training)], Path(folder) / "report")
            contenders = [
                Contender("diffmem", work, "a process of its own, with the page"),
                Contender(
                    "Pillow, decoding alone",
                    partial(decoded, [generated, training]),
                    f"{cores()} processes, pixels stay there",
                    package="pillow",
                ),
            ]
            bench.compare(workload, contenders, partial(check, [generated, training]), repeats=3)


def archives(folder: Path, generated: int, training: int) -> tuple[Path, Path, str]:
    """Two zips of JPEG files, and what the pictures are."""
    root = Path(os.environ.get("DIFFMEM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    ours, theirs = folder / "generated.zip", folder / "training.zip"
    found = [root / "cifar10-test.zip", root / "cifar10-train.zip"]
    if all(path.exists() for path in found) and (generated, training) == (10_000, 50_000):
        for source, target in zip(found, (ours, theirs), strict=True):
            shutil.copyfile(source, target)
        return ours, theirs, "CIFAR-10 (JPEG)"
    images = load_images(f"builtin:patches?n={generated + training}").images
    for target, part in ((ours, images[:generated]), (theirs, images[generated:])):
        with zipfile.ZipFile(target, "w") as archive:
            for index, image in enumerate(part):
                stream = io.BytesIO()
                Image.fromarray(np.moveaxis(image, 0, -1).squeeze()).save(stream, "JPEG", quality=75)
                archive.writestr(f"{index:06}.jpg", stream.getvalue())
    return ours, theirs, "patches"


def command_run(arguments: list[str], report: Path) -> list[int]:
    """Runs the command; how many images it says it has seen."""
    subprocess.run(
        [sys.executable, "-m", "diffmem", *arguments, "--out", str(report)], check=True, stdout=subprocess.DEVNULL
    )
    name = "report.json" if arguments[0] == "audit" else "measures.json"
    settings = json.loads((report / name).read_text())["settings"]
    return [settings[which]["images"] for which in ("generated", "training")]


def decoded(paths: list[Path]) -> list[tuple[int, int]]:
    """Of each archive how many pictures it holds, and the sum of their pixels."""
    with ProcessPoolExecutor(cores()) as pool:
        return [tuple(map(sum, zip(*pool.map(partial(_decoded, path), range(cores())), strict=True))) for path in paths]


def _decoded(path: Path, worker: int) -> tuple[int, int]:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")][worker :: cores()]
        pictures = (np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names)
        return len(names), sum(int(picture.sum()) for picture in pictures)


def check(paths: list[Path], answers: dict[str, Any]) -> None:
    """The command saw as many images as there are, and reading gives the pixels that Pillow gives."""
    pillow = answers["Pillow, decoding alone"]
    if [count for count, _ in pillow] != answers["diffmem"]:
        raise AssertionError(f"diffmem saw {answers['diffmem']} images, Pillow {pillow}")
    for path, (_, total) in zip(paths, pillow, strict=True):
        if int(load_images(path).images.sum(dtype=np.int64)) != total:
            raise AssertionError(f"{path.name}: other pixels than Pillow's")
