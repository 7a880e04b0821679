"""What a worker does: makes one shard, and leaves it finished or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.atomic_io import atomic_folder, output_lock
from diffmem.data.value_range import extremes
from diffmem.errors import InputError, OutputInUseError
from diffmem.features import FeatureExtractor, FeatureSet
from diffmem.features.feature_set import UNIT
from diffmem.indexes.images import ImageBlock, Skipped, image_blocks, natural_order
from diffmem.indexes.reading import Features, Reading
from diffmem.indexes.shards import SHARDS, ShardWriter, address_of, content_digests, read_shard
from diffmem.indexes.sources import Part, check_unchanged
from diffmem.indexes.vectors import row_blocks

WAIT = 3600.0  # seconds that a worker waits for another one that makes the same shard


@dataclass(frozen=True)
class Job:
    """One shard to make.

    Attributes:
        folder: Of the index.
        part: What it is made from.
        features, reading: How.
        rows: Rows of a block: what a worker holds at a time.
    """

    folder: str
    part: Part
    features: Features
    reading: Reading
    rows: int

    @property
    def made_from(self) -> dict[str, Any]:
        return {**self.part.made_from(), **self.features.decides(), "reading": self.reading.to_json()}

    @property
    def address(self) -> str:
        return address_of(self.made_from)

    @property
    def where(self) -> str:
        return self.part.where

    @property
    def target(self) -> Path:
        return Path(self.folder) / SHARDS / self.address


def make_shard(job: Job, device: str = "auto") -> dict[str, Any]:
    """The description of the shard, which is made unless it is there.

    Raises:
        InputError: The source cannot be read; the message names it.
    """
    if (known := read_shard(job.target)) is not None:
        return known
    with _lock(job.target):
        if (known := read_shard(job.target)) is not None:  # another worker made it meanwhile
            return known
        _remove_damaged(job.target)
        check_unchanged(job.part)
        try:
            with atomic_folder(job.target) as folder:
                return _make(job, folder, device)
        except InputError:
            # Without locks, or cut off from the cluster that took it for lost, another worker may have been faster.
            if (known := read_shard(job.target)) is not None:
                return known
            raise


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    try:
        with output_lock(target, wait=WAIT):
            yield
    except OutputInUseError as error:
        raise InputError(f"{error} (a shard of an index)") from None


def _remove_damaged(target: Path) -> None:
    if target.is_dir():
        import shutil

        shutil.rmtree(target)


def _make(job: Job, folder: Path, device: str) -> dict[str, Any]:
    writer = ShardWriter(folder)
    skipped: Skipped = []
    more: dict[str, Any] = {}
    try:
        if job.features.precomputed:
            more = _copy_rows(job, writer, skipped)
        else:
            more = _extract_rows(job, writer, skipped, device)
        order = more.pop("order", None)
        return writer.finish({"made_from": job.made_from, **more}, skipped, order)
    finally:
        writer.close()


def _extract_rows(job: Job, writer: ShardWriter, skipped: Skipped, device: str) -> dict[str, Any]:
    """The features of images."""
    pixels = job.features.name == "pixels"
    maker = job.features.extractor(device)
    names: list[str] = []
    shape: tuple[int, ...] | None = None
    dtype = np.dtype(np.uint8)
    turned = 0
    with _one_thread():
        places: dict[str, tuple[int, int]] | None = None if pixels else {}  # an index of pixels has the images
        for block in image_blocks(job.part, job.reading, job.rows, places):
            skipped += block.skipped
            turned += block.turned
            if len(block.images) == 0:
                continue
            shape, dtype = block.images.shape[1:], block.images.dtype
            if pixels:
                vectors = np.ascontiguousarray(block.images).reshape(len(block.images), -1)
                FeatureSet(vectors, "euclidean", source=job.part.where)
                writer.append(vectors, block.names)
            else:
                _check_bytes(block, maker, job.part.where)
                digests = content_digests(block.images)
                vectors = _features(block.images, digests, maker)
                _append(writer, vectors, job, block.names, digests, _taken(places, block.names))
            if job.part.kind == "tar":
                names += block.names or ()
    order = natural_order(names) if job.part.kind == "tar" else None
    return {
        "image_shape": None if shape is None else list(shape),
        "image_dtype": dtype.name,
        "turned": turned,
        "order": order,
    }


def _taken(places: dict[str, tuple[int, int]] | None, names: Sequence[str] | None) -> np.ndarray | None:
    """int64 [n, 2], places of the images of a tar archive, taken out; None of others."""
    if not places or names is None:
        return None
    return np.array([places.pop(name) for name in names], np.int64)


def _check_bytes(block: ImageBlock, maker: FeatureExtractor, where: str) -> None:
    if block.images.dtype != np.uint8:
        low, high = extremes(block.images)
        raise InputError(
            f"{where}: {maker.name} features are made of gray levels (uint8), these are {block.images.dtype}, "
            f"{low:.4g} to "
            f"{high:.4g}: give the values of black and white with value_range=(-1, 1) or (0, 1)"
        )


def _features(images: np.ndarray, digests: np.ndarray, maker: FeatureExtractor) -> np.ndarray:
    """[n, d], each different image of the block put to the network once."""
    _, leaders, of = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(leaders, kind="stable")
    leaders = leaders[order]
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    made = [maker(images[leaders[start : start + maker.batch]]) for start in range(0, len(leaders), maker.batch)]
    if len({each.shape[1] for each in made}) > 1:
        raise InputError(f"features {maker.name}: vectors of several lengths: it must be the same for every image")
    return np.concatenate(made)[place[of.reshape(-1)]]


def _copy_rows(job: Job, writer: ShardWriter, skipped: Skipped) -> dict[str, Any]:
    """Vectors that were computed elsewhere."""
    start = job.part.start
    for vectors, names in row_blocks(job.part, job.rows):
        kept = np.ones(len(vectors), bool)
        if job.reading.skip_bad:
            for row, reason in _bad_rows(vectors, job.features.metric):
                kept[row] = False
                skipped.append((names[row] if names is not None else f"#{start + row}", reason))
        start += len(vectors)
        some = vectors[kept]
        if len(some):
            _append(writer, some, job, None if names is None else [names[row] for row in np.flatnonzero(kept).tolist()])
    return {"image_shape": None}


def _bad_rows(vectors: np.ndarray, metric: str | None) -> Iterator[tuple[int, str]]:
    if vectors.dtype == np.uint8:
        return
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    for row in np.flatnonzero(~np.isfinite(squares)):
        yield int(row), "holds NaN, infinity or values too large to be squared"
    if metric == "cosine":
        for row in np.flatnonzero(squares == 0):
            yield int(row), "is 0 in every value and has no direction"


def _append(
    writer: ShardWriter, vectors: np.ndarray, job: Job, names: Any, images: np.ndarray | None = None,
    places: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Vectors as they are stored: of float32 with length 1 where they are compared by the cosine."""
    metric = job.features.metric
    assert metric is not None
    checked = FeatureSet(vectors, metric, source=job.part.where)
    writer.unit_rows += int((np.abs(checked.lengths - 1) <= UNIT).sum()) if vectors.dtype != np.uint8 else 0
    lengths = None
    if metric == "cosine" and vectors.dtype != np.uint8:
        stored = job.features.stored(vectors)
        if stored.dtype == np.float32:
            stored = checked.rows.astype(np.float32, copy=False)
        else:
            lengths = FeatureSet(stored, metric, source=job.part.where).lengths
    else:
        stored = job.features.stored(vectors)
        FeatureSet(stored, metric, source=f"{job.part.where}, as {stored.dtype}")
    writer.append(stored, names, images, lengths, places)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Networks compute with one thread meanwhile: the last bits of a vector depend on their number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
