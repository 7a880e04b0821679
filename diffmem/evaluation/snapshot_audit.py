"""What is known of one snapshot: which of its images, by seed, are copies; kept in a file that later audits extend."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.atomic_io import atomic_file
from diffmem.inert.boundary import parsing
from diffmem.integrity import NoChecksumError, load_arrays, save_arrays
from diffmem.memorization import CopyDetector, CopyRate, ReportsRate, SequentialTest
from diffmem.memorization.plausibility import Collapse
from diffmem.models import Denoiser
from diffmem.sampling import SamplerConfig, is_compiled, sample_batches

SHOWN = 24  # copies whose images are kept
PROTOCOL_SEEDS = range(10_000)


@dataclass(frozen=True, eq=False)
class SnapshotAudit(ReportsRate):
    """The audited images of a snapshot, in the order in which they were sampled.

    Attributes:
        seeds: int64 [n].
        memorized: bool [n], by the rule, duplicates collapsed.
        nearest: int64 [n], the training image.
        ratios: float32 [n], d1/d2.
        digests: uint64 [n], of the pixels (0: not known, in audits of earlier versions).
        constant: bool [n], of a single color.
        copies: uint8 [m, C, H, W], the first copies, at most 24.
        copy_seeds: int64 [m], their seeds.
    """

    seeds: np.ndarray
    memorized: np.ndarray
    nearest: np.ndarray
    ratios: np.ndarray
    digests: np.ndarray
    constant: np.ndarray
    copies: np.ndarray
    copy_seeds: np.ndarray

    @staticmethod
    def none(image_shape: tuple[int, int, int]) -> SnapshotAudit:
        """No image audited yet."""
        numbers = np.zeros(0, np.int64)
        pixels = np.zeros((0, *image_shape), np.uint8)
        none, figures = np.zeros(0, bool), np.zeros(0, np.float32)
        return SnapshotAudit(numbers, none, numbers, figures, np.zeros(0, np.uint64), none, pixels, numbers)

    @property
    def rate(self) -> CopyRate:
        return CopyRate.of(self.memorized)

    def collapse(self) -> Collapse | None:
        """How much the images are one and the same; None where that is not known of all of them."""
        if not self.total or not self.digests.all():
            return None
        counts = np.unique(self.digests, return_counts=True)[1]
        return Collapse(self.total, float(self.constant.mean()), False, int(counts.max()), len(counts))

    def of(self, seeds: Sequence[int]) -> SnapshotAudit:
        """The part that belongs to `seeds`."""
        rows = np.isin(self.seeds, seeds)
        shown = np.isin(self.copy_seeds, seeds)
        per_image = (self.seeds, self.memorized, self.nearest, self.ratios, self.digests, self.constant)
        return SnapshotAudit(*(values[rows] for values in per_image), self.copies[shown], self.copy_seeds[shown])

    def and_then(
        self, seeds: np.ndarray, images: np.ndarray, memorized: np.ndarray, nearest: np.ndarray, ratios: np.ndarray
    ) -> SnapshotAudit:
        """This and the images of further seeds."""
        room = max(0, SHOWN - len(self.copies))
        return SnapshotAudit(
            np.concatenate([self.seeds, seeds]),
            np.concatenate([self.memorized, memorized]),
            np.concatenate([self.nearest, nearest]),
            np.concatenate([self.ratios, ratios.astype(np.float32)]),
            np.concatenate([self.digests, _digests(images)]),
            np.concatenate([self.constant, (images == images[:, :, :1, :1]).all(axis=(1, 2, 3))]),
            np.concatenate([self.copies, images[memorized][:room]]),
            np.concatenate([self.copy_seeds, seeds[memorized][:room]]),
        )


def _digests(images: np.ndarray) -> np.ndarray:
    """Numbers above 0 that are equal for equal images, and else hardly ever; uint64 [n]."""
    hashes = [hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=8).digest() for image in images]
    return np.array([int.from_bytes(digest, "little") or 1 for digest in hashes], np.uint64)


def audit_snapshot(
    denoiser: Denoiser,
    detector: CopyDetector,
    seeds: Sequence[int],
    *,
    settings: SamplerConfig,
    question: SequentialTest | None = None,
    known: SnapshotAudit | None = None,
    after_batch: Callable[[SnapshotAudit], None] = lambda audited: None,
) -> SnapshotAudit:
    """`known` and the images of `seeds`, sampled in this order, batch by batch, until all are there or the question is
    answered by those of them that are.

    Args:
        denoiser: The network of the snapshot.
        detector: Decides which images are copies.
        seeds: Where they are some of the protocol's, the answer is about those 10,000, else about the probability that
            an image is a copy.
        settings: How to sample.
        question: Sampling stops when it is answered; None: all seeds are sampled.
        known: Images, of these or other seeds, that need not be sampled again.
        after_batch: Called with all that is known so far.
    """
    shape = (denoiser.channels, denoiser.resolution, denoiser.resolution)
    audited = SnapshotAudit.none(shape) if known is None else known
    of = len(PROTOCOL_SEEDS) if set(seeds) <= set(PROTOCOL_SEEDS) else None
    done = set(audited.seeds.tolist())
    left = [seed for seed in seeds if seed not in done]
    if question is not None and settings.compile == "auto" and not is_compiled(denoiser):
        settings = replace(settings, compile="off")  # the answer may come after a few batches
    batches = sample_batches(denoiser, left, config=settings)
    while True:
        asked = audited.of(seeds)
        if question is not None and question.answer(asked.count, asked.total, of) is not None:
            break
        made = next(batches, None)
        if made is None:
            break
        images = made.images.numpy()
        found = detector.judge(images)
        seeds_made, nearest = made.seeds.numpy(), found.neighbors
        audited = audited.and_then(seeds_made, images, found.memorized, nearest.indices[:, 0], nearest.distance_ratios)
        after_batch(audited)
    return audited


class AuditFiles:
    """The audits of a run's snapshots: a file for each snapshot and way to audit it.

    folder: where they lie. way: all that decides the verdict of an image beside snapshot and seed, in JSON types.
    """

    def __init__(self, folder: Path, way: dict[str, Any]):
        self.folder = folder
        self.way = json.dumps(way, sort_keys=True)
        self._key = hashlib.sha256(self.way.encode()).hexdigest()[:8]

    def path(self, images: int) -> Path:
        return self.folder / f"{images:09d}-{self._key}.npz"

    def read(self, images: int, fingerprint: str) -> SnapshotAudit | None:
        """What is known of the snapshot after `images`, if that is the denoiser with this fingerprint."""
        path = self.path(images)
        if not path.exists():
            return None
        advice = "delete it, and its images are sampled again"
        try:
            stored = load_arrays(path, advice)
        except NoChecksumError:
            return None
        with parsing(path, "an audit of a snapshot", advice):
            if str(stored["way"]) != self.way or str(stored["fingerprint"]) != fingerprint:
                return None
            count = len(stored["seeds"])
            unknown = {"digests": np.zeros(count, np.uint64), "constant": np.zeros(count, bool)}
            stored = unknown | dict(stored)
            return SnapshotAudit(**{name: stored[name] for name in SnapshotAudit.__dataclass_fields__})

    def write(self, images: int, fingerprint: str, audited: SnapshotAudit) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        fields = {name: getattr(audited, name) for name in SnapshotAudit.__dataclass_fields__}
        with atomic_file(self.path(images)) as partial, partial.open("wb") as stream:
            about = {"way": np.array(self.way), "fingerprint": np.array(fingerprint)}
            save_arrays(stream, {**about, **fields}, compress=True)


def way_of(settings: SamplerConfig, training_fingerprint: str, flip: bool, device_type: str) -> dict[str, Any]:
    """What decides an image's verdict beside snapshot and seed. Batch size and compiling change it by rounding only."""
    sampler = {name: value for name, value in settings.to_json().items() if name not in ("batch", "compile")}
    return {**sampler, "training": training_fingerprint, "flip": flip, "device": device_type}
