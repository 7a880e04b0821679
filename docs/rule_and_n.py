"""Table of "The 1/3 rule moves with N": python docs/rule_and_n.py [TRAINING]

The same noisy copies of the first 300 training images are measured against growing training sets. TRAINING: by default
CIFAR-10 (JPEG) in ../shared/data. Writes the table between the marks of docs/rule-and-n.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import diffmem

DOCS = Path(__file__).parent
PAGE = DOCS / "rule-and-n.md"
BEGIN, END = "<!-- table: python docs/rule_and_n.py -->", "<!-- end of table -->"
CIFAR = DOCS.parents[1] / "shared/data/cifar10-train.zip"
SIZES, COPIES, DEVIATION = (300, 1000, 5000, 20_000, 50_000), 300, 15
MEASURES = ("ratio_raw", "calibrated_l2", "authenticity", "m3", "distance_ratio", "tile_max", "top1_similarity")
ROWS = {
    "found by d1/d2 < 1/3": lambda found: f"{round(COPIES * found['ratio_raw'])} of {COPIES}",
    "mean d1/d2": lambda found: f"{found['distance_ratio']:.3f}",
    "calibrated L2 < 1": lambda found: f"{round(COPIES * found['calibrated_l2'])}",
    "not authentic": lambda found: f"{round(COPIES * (1 - found['authenticity']))}",
    "below M3's median": lambda found: f"{round(COPIES * found['m3'])}",
    "M3's median": lambda found: f"{found['m3_median']:.0f}",
    "mean tile maximum": lambda found: f"{found['tile_max']:.1f}",
    "mean largest cosine": lambda found: f"{found['top1_similarity']:.4f}",
}


def noisy_copies(images: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, DEVIATION, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def measured(training: np.ndarray) -> Iterator[tuple[int, diffmem.Measures]]:
    """N, and what the measures say of the same copies beside the first N training images."""
    copies = noisy_copies(training[:COPIES])
    for size in SIZES:
        if size <= len(training):
            yield size, diffmem.measure(copies, training[:size], measures=MEASURES)


def table(training: np.ndarray) -> str:
    found = dict(measured(training))
    lines = ["| N | " + " | ".join(f"{size:,}" for size in found) + " |", "| --- |" + " ---: |" * len(found)]
    lines += [
        f"| {name} | " + " | ".join(shown(each) for each in found.values()) + " |" for name, shown in ROWS.items()
    ]
    return "\n".join(lines)


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else CIFAR
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(diffmem.load_images(source).images)}\n{END}{after}")


if __name__ == "__main__":
    main()
