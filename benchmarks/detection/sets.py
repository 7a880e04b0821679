"""What detectors are held against: CIFAR-10 (JPEG) with judged pairs, and 256×256 photographs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from diffmem.data import load_images

DATA = Path(os.environ.get("DIFFMEM_DATA", Path(__file__).parents[3] / "shared" / "data"))
LOOKED_AT = Path(__file__).parent / "cifar10-looked-at.json"
SIZE, STRIDE = 256, 64
LEFT_OUT = ("color", "logo", "motorcycle_right", "retina")  # test charts, and the twin of motorcycle_left


@dataclass(frozen=True)
class Cifar:
    """CIFAR-10 (JPEG) and what is known about its test set.

    Attributes:
        training: uint8 [50000, 3, 32, 32].
        test: uint8 [10000, 3, 32, 32].
        pairs: Test image: training image, of the near duplicates that ciFAIR lists.
        judged: Test image: "copy", "unclear" or "no", of those that were looked at.
    """

    training: np.ndarray
    test: np.ndarray
    pairs: dict[int, int]
    judged: dict[int, str]

    @property
    def others(self) -> np.ndarray:
        """Test images that are neither listed nor were found to be, perhaps, copies: what alarms are counted on."""
        known = {*self.pairs, *(image for image, verdict in self.judged.items() if verdict != "no")}
        return np.array([image for image in range(len(self.test)) if image not in known])


def cifar() -> Cifar | None:
    """None where the archives, or the list (DIFFMEM_JUDGED, or beside them), are not there."""
    lists = Path(os.environ.get("DIFFMEM_JUDGED", DATA / "cifar10-near-duplicates.json"))
    archives = [DATA / f"cifar10-{part}.zip" for part in ("train", "test")]
    if not all(path.exists() for path in (*archives, lists)):
        print(f"without CIFAR-10: {DATA} (DIFFMEM_DATA) or {lists} (DIFFMEM_JUDGED) is not there")
        return None
    known = json.loads(lists.read_text())
    ours = json.loads(LOOKED_AT.read_text())
    every = {each["test"]: each["train"] for each in known["pairs"]}
    pairs = {each["test"]: each["train"] for each in known["pairs"] if each["kind"] == "near-duplicate"}
    looked_at = {each["test"]: each["judged"] for each in (*ours["looked_at"], *known.get("looked_at", []))}
    looked_at |= {image: "unclear" for image in every if image not in pairs}  # very similar: neither copy nor alarm
    training, test = (load_images(path).images for path in archives)
    return Cifar(training, test, pairs, looked_at)


def photographs() -> tuple[np.ndarray, np.ndarray]:
    """256×256 crops of photographs that come with scikit-learn and scikit-image: training images and, of other
    photographs, unseen ones."""
    from sklearn.datasets import load_sample_images

    found = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    if spec := find_spec("skimage"):  # the files alone; importing its data module wants a cache folder
        folder = Path(spec.submodule_search_locations[0]) / "data"
        for path in sorted((*folder.glob("*.png"), *folder.glob("*.jpg"))):
            image = Image.open(path)
            if image.mode == "RGB" and min(image.size) >= SIZE and path.stem not in LEFT_OUT:
                found[path.stem] = np.asarray(image)
    sides: list[list[np.ndarray]] = [[], []]
    for number, name in enumerate(sorted(found)):
        height, width = found[name].shape[:2]
        # Crops of one photograph overlap as shifted copies do: by more than what any detector forgives.
        for top in range(0, height - SIZE + 1, STRIDE):
            for left in range(0, width - SIZE + 1, STRIDE):
                sides[number % 2].append(found[name][top : top + SIZE, left : left + SIZE].transpose(2, 0, 1))
    return np.stack(sides[0]), np.stack(sides[1])
