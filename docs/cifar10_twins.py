"""Picture and table of "What CIFAR-10's test set shares with its training set": python docs/cifar10_twins.py [DATA]

DATA is a folder that holds cifar10-train.zip and cifar10-test.zip (every 10 consecutive images hold one of each class,
so that image numbers are those of benchmarks/detection/cifar10-looked-at.json). Writes docs/images/cifar10-twins.png: a
test image, the training image that aligned search finds, the same brought over the test image, and the difference. With
or without DATA, writes the table of the page from benchmarks/results/detection.csv.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from diffmem.data import load_images
from diffmem.features.aligned import align_pairs

ROOT = Path(__file__).parents[1]
LOOKED_AT = ROOT / "benchmarks/detection/cifar10-looked-at.json"
PICTURE = ROOT / "docs/images/cifar10-twins.png"
RESULTS = ROOT / "benchmarks/results/detection.csv"
PAGE = ROOT / "docs/cifar10-twins.md"
BEGIN, END = "<!-- table: python docs/cifar10_twins.py -->", "<!-- end of table -->"
SHOWN = (781, 3301, 2681, 1995, 5167, 7366, 7851, 3175, 675, 8872, 9510, 5756)  # test images
COLUMNS, ZOOM, GAP = 4, 2, 6


def sheet(rows: list[np.ndarray]) -> Image.Image:
    """Rows of images [m, 3, h, w], side by side, enlarged."""
    size = rows[0].shape[-1] * ZOOM
    width, height = len(rows[0]) * size + GAP, size + GAP
    lines = -(-len(rows) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * width - GAP, lines * height - GAP), "white")
    for number, images in enumerate(rows):
        for place, image in enumerate(images):
            tile = Image.fromarray(image.transpose(1, 2, 0)).resize((size, size), Image.Resampling.NEAREST)
            page.paste(tile, (number % COLUMNS * width + place * size, number // COLUMNS * height))
    return page


def picture(data: str) -> None:
    twins = {each["test"]: each["train"] for each in json.loads(LOOKED_AT.read_text())["looked_at"]}
    test = load_images(f"{data}/cifar10-test.zip").images[list(SHOWN)]
    training = load_images(f"{data}/cifar10-train.zip").images[[twins[each] for each in SHOWN]]
    pairs = align_pairs(test, training)
    rows = np.stack([test, training, pairs.aligned_training, pairs.difference], axis=1)
    sheet(list(rows)).quantize(256).save(PICTURE, optimize=True)


def table() -> str:
    with RESULTS.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    shown = {(row["detector"], row["set"], row["disguise"], row["threshold"]): row for row in rows}

    def share(*key: str) -> str:
        row = shown[key]
        return f"{float(row['recall']):.1%} ({float(row['low']):.1%} to {float(row['high']):.1%})"

    lines = [
        "| score | listed, 0.1 % alarms | listed, 1 % alarms | planted, 0.1 % alarms |",
        "| --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row["detector"] for row in rows):
        listed = [share(name, "near duplicates", "listed", f"{alarms} alarms") for alarms in ("0.1%", "1.0%")]
        planted = share(name, "CIFAR-10 (JPEG)", "all of everyday strength", "0.1% alarms")
        lines.append(f"| {name} | {' | '.join(listed)} | {planted} |")
    return "\n".join(lines)


def main(data: str | None = None) -> None:
    if data is not None:
        picture(data)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
