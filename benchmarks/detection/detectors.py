"""Detectors of copies as their users run them: each takes a training set and gives scores, lower = more like a copy."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from diffmem.features.aligned import AlignedMatcher
from diffmem.search import TrainingIndex

Scores = Callable[[np.ndarray], np.ndarray]  # of images [Q, C, H, W]: float64 [Q]
BATCH = 256
IMAGENET_SIZE = 96  # of SSCD's pictures where images are small; large ones keep their size


@dataclass(frozen=True)
class Detector:
    """One way to look for copies.

    Attributes:
        name: Of the detector.
        prepare: Takes the training images [N, C, H, W] and returns what scores others.
        thresholds: What its users take for a copy: score below this, by name.
        missing: Why it cannot be run here, or "".
    """

    name: str
    prepare: Callable[[np.ndarray], Scores]
    thresholds: dict[str, float] = field(default_factory=dict)
    missing: str = ""


def aligned(training: np.ndarray) -> Scores:
    matcher = AlignedMatcher(training)
    return lambda images: matcher.match(images).scores


def pixels(training: np.ndarray) -> Scores:
    """d1/d2, the paper's rule."""
    index = TrainingIndex(training)

    def ratio(images: np.ndarray) -> np.ndarray:
        squared = index.query(images, 2).squared_distances.astype(np.float64)
        return np.sqrt(np.divide(squared[:, 0], squared[:, 1], out=np.ones(len(squared)), where=squared[:, 1] > 0))

    return ratio


def mifid(training: np.ndarray) -> Scores:
    """The least cosine distance of torchmetrics' memorization-informed FID, of pixels instead of Inception's features
    (whose weights come from the net)."""
    index = TrainingIndex(unit(training.reshape(len(training), -1).astype(np.float32)))

    def least(images: np.ndarray) -> np.ndarray:
        squared = index.query(unit(images.reshape(len(images), -1).astype(np.float32)), 1).squared_distances[:, 0]
        return squared / 2  # 1 − cos

    return least


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def perceptual_hash(training: np.ndarray) -> Scores:
    """imagehash.phash: 64 bits, Hamming distance to the nearest."""
    known = hashes(training)

    def nearest(images: np.ndarray) -> np.ndarray:
        found = hashes(images)
        blocks = [np.bitwise_count(found[i : i + 64, None] ^ known).min(axis=1) for i in range(0, len(found), 64)]
        return np.concatenate(blocks).astype(np.float64)

    return nearest


def hashes(images: np.ndarray) -> np.ndarray:
    """uint64 [Q]."""
    import imagehash

    bits = np.stack([imagehash.phash(picture(each)).hash.ravel() for each in images])
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).convert("RGB")


def sscd(training: np.ndarray) -> Scores:
    """The ONNX file that DIFFMEM_SSCD names: uint8 [B, H, W, 3] in, unit float32 [B, 512] out."""
    import onnxruntime

    session = onnxruntime.InferenceSession(os.environ["DIFFMEM_SSCD"], providers=["CPUExecutionProvider"])
    (first,) = session.get_inputs()

    def vectors(images: np.ndarray) -> np.ndarray:
        size = max(IMAGENET_SIZE, *images.shape[2:])
        parts = []
        for start in range(0, len(images), 32):
            pictures = [picture(each).resize((size, size), Image.Resampling.BICUBIC) for each in images[start:][:32]]
            parts.append(session.run(None, {first.name: np.stack([np.asarray(each) for each in pictures])})[0])
        return unit(np.concatenate(parts).astype(np.float32))

    index = TrainingIndex(vectors(training))
    return lambda images: index.query(vectors(images), 1).squared_distances[:, 0] / 2


def detectors() -> list[Detector]:
    """All of them, with why some cannot be run here."""
    no_hash = "" if importlib.util.find_spec("imagehash") else "pip install imagehash"
    no_sscd = "" if os.environ.get("DIFFMEM_SSCD") else "DIFFMEM_SSCD names no ONNX file"
    if not no_sscd and not importlib.util.find_spec("onnxruntime"):
        no_sscd = "pip install onnxruntime"
    return [
        Detector("aligned", aligned),
        Detector("pixels, d1/d2 (the paper's rule)", pixels, {"1/3": 1 / 3}),
        Detector("imagehash phash", perceptual_hash, {"10 bits": 10.5}, no_hash),
        Detector("MiFID's cosine distance, pixels", mifid, {"0.1": 0.1}),
        Detector("SSCD", sscd, {"cosine > 0.5": 0.5, "cosine > 0.75": 0.25}, no_sscd),
    ]
