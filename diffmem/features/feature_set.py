"""What images are compared by: one vector per image, with what made it and how two of them are compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np

from diffmem.atomic_io import atomic_file
from diffmem.data.storage import allocate
from diffmem.errors import InputError
from diffmem.integrity import arrays_sha256, sealed

Metric = Literal["euclidean", "cosine", "hamming"]
METRICS = get_args(Metric)
BLOCK = 4096
UNIT = 5e-3  # how far rounding, to bfloat16 at worst, takes the length of a unit vector from 1
_DTYPES = {"uint8": "U8", "float16": "F16", "float32": "F32", "float64": "F64"}


@runtime_checkable
class FeatureExtractor(Protocol):
    """What makes vectors of images.

    Attributes:
        name: Name of the features, as `diffmem.features.extractor` knows it.
        metric: How two vectors are compared.
        fingerprint: Network, hash of its weights and preprocessing, or None where they cannot be told (a function).
            Vectors of different fingerprints cannot be compared; without one nothing is cached.
        batch: Images per call.
        resizes: Whether images of any size can be compared with each other, since they are brought to one.
    """

    @property
    def name(self) -> str: ...

    @property
    def metric(self) -> Metric: ...

    @property
    def fingerprint(self) -> str | None: ...

    @property
    def batch(self) -> int: ...

    @property
    def resizes(self) -> bool: ...

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The vectors of images.

        Args:
            images: uint8 [B, C, H, W].

        Returns:
            [B, d], float32; uint8 for gray levels and bits.
        """
        ...


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """One vector per image.

    Attributes:
        vectors: [N, d], float16, float32 or float64, or uint8 (gray levels, or bits 0 and 1 for "hamming"); it may be a
            memory map and is never written to.
        metric: "euclidean", "cosine" (lengths do not matter) or "hamming" (the number of bits that differ).
        fingerprint: What made the vectors (`FeatureExtractor.fingerprint`), or None where it is unknown.
        names: N names of the images, or None.
        source: Where they came from, in words fit for a report.
        features: The name of the features.
        notes: What else a person should know, one line each.

    Raises:
        InputError: Another shape or dtype, no vectors, values that are NaN, infinite or too large to be squared, other
            values than 0 and 1 for "hamming", or vectors of length 0 for "cosine".

    Example:
        >>> some = FeatureSet(np.array([[3, 4], [0, 2]], np.float32), "cosine")
        >>> some.rows.tolist(), len(some), some.dimension
        ([[0.6000000238418579, 0.800000011920929], [0.0, 1.0]], 2, 2)
    """

    vectors: np.ndarray
    metric: Metric = "euclidean"
    fingerprint: str | None = None
    names: Sequence[str] | None = None
    source: str = "array"
    features: str = "precomputed"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_metric(self.metric)
        shape, dtype = self.vectors.shape, self.vectors.dtype
        if len(shape) != 2:
            raise InputError(f"{self.source}: features must be vectors [N, d], got shape {shape}")
        if 0 in shape:
            raise InputError(f"{self.source}: no vectors in it (shape {shape})")
        if dtype.name not in _DTYPES:
            raise InputError(f"{self.source}: vectors must be float16, float32, float64 or uint8, got {dtype}")
        if self.names is not None and len(self.names) != shape[0]:
            raise InputError(f"{self.source}: {len(self.names):,} names for {shape[0]:,} vectors")
        if self.metric == "hamming":
            if dtype != np.uint8 or any(block.max() > 1 for _, block in self.blocks()):
                raise InputError(f"{self.source}: metric='hamming' compares bits: uint8 vectors of 0 and 1")
            return
        lengths = self.lengths
        if not np.isfinite(lengths).all():
            bad = ~np.isfinite(lengths)
            raise InputError(
                f"{self.source}: {int(bad.sum()):,} vectors hold NaN, infinity, or values too large to be squared, the "
                f"first is number {int(bad.argmax())}: recompute or remove them"
            )
        if self.metric == "cosine" and not lengths.all():
            zero = lengths == 0
            raise InputError(
                f"{self.source}: {int(zero.sum()):,} vectors are 0 in every value, the first is number "
                f"{int(zero.argmax())}, and have no direction: remove those images, or compare with metric='euclidean'"
            )

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.vectors.shape))
        return f"FeatureSet({self.features} of {self.source}: {self.vectors.dtype} {shape}, {self.metric})"

    @property
    def dimension(self) -> int:
        """d, the number of values of one vector."""
        return self.vectors.shape[1]

    def name(self, index: int) -> str:
        """What to call image `index` in a report."""
        return self.names[index] if self.names is not None else f"#{index}"

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The vectors in blocks, each with the number of its first one."""
        for start in range(0, len(self.vectors), BLOCK):
            yield start, self.vectors[start : start + BLOCK]

    @cached_property
    def lengths(self) -> np.ndarray:
        """float64 [N], the Euclidean length of each vector; infinite or NaN where a value is."""
        with np.errstate(over="ignore", invalid="ignore"):
            squares = [np.einsum("nd,nd->n", block, block, dtype=np.float64) for _, block in self.blocks()]
        return np.sqrt(np.concatenate(squares))

    @property
    def unit(self) -> bool:
        """Whether every vector has length 1, up to rounding."""
        return bool((np.abs(self.lengths - 1) <= UNIT).all())

    @cached_property
    def rows(self) -> np.ndarray:
        """[N, d] as the search compares them by Euclidean distance: uint8, float32 or float64; of length 1 for
        "cosine", where the squared distance is 2 − 2 cos."""
        if self.metric != "cosine" and self.vectors.dtype != np.float16:
            return self.vectors
        lengths = self.lengths
        double = self.vectors.dtype == np.float64
        rows = allocate(self.vectors.shape, np.float64 if double else np.float32)
        for start, block in self.blocks():
            if self.metric == "cosine":
                block = block.astype(np.float64) / lengths[start : start + len(block), None]
            rows[start : start + len(block)] = block
        return rows

    def select(self, indices: Sequence[int] | np.ndarray | slice) -> FeatureSet:
        """The vectors at `indices`, with their names, in that order."""
        rows = np.arange(len(self))[indices]
        names = None if self.names is None else [self.names[row] for row in rows]
        return replace(self, vectors=self.vectors[indices], names=names)

    def save(self, path: str | Path) -> Path:
        """Writes a `.safetensors` file that `load_features` reads back with fingerprint, metric and names.

        Raises:
            InputError: It cannot be written.
        """
        return self._write(Path(path), {})

    def _write(self, path: Path, key: dict[str, Any]) -> Path:
        entry = {
            "dtype": _DTYPES[self.vectors.dtype.name],
            "shape": list(self.vectors.shape),
            "data_offsets": [0, self.vectors.nbytes],
        }
        about = {
            "metric": self.metric,
            "fingerprint": self.fingerprint,
            "names": None if self.names is None else list(self.names),
            "source": self.source,
            "features": self.features,
            "contents": arrays_sha256({"features": self.vectors}),
            "key": key,
        }
        header = {"__metadata__": {"diffmem": json.dumps(sealed(about))}, "features": entry}
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 8) % 64)
        with atomic_file(path, durable=False) as partial, open(partial, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, block in self.blocks():
                file.write(np.ascontiguousarray(block).data)
        return path


def check_metric(metric: str) -> None:
    """Raises InputError unless `metric` is one that vectors are compared by."""
    if metric not in METRICS:
        raise InputError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")


def check_comparable(some: FeatureSet, training: FeatureSet, what: str) -> None:
    """Refuses vectors that cannot be compared.

    Args:
        some: Features of the images to compare.
        training: Features of the training images.
        what: What to call the first: "generated" or "holdout".

    Raises:
        InputError: Lengths, metrics, kinds of values or the networks that made them differ, or only one side has been
            normalized.
    """
    ours, theirs = f"{what} features ({some.source})", f"training features ({training.source})"
    if some.fingerprint and training.fingerprint and some.fingerprint != training.fingerprint:
        raise InputError(
            f"{ours} and {theirs} were made by different networks or preprocessing: {some.fingerprint}; "
            f"{training.fingerprint}: compute both with the same one"
        )
    if some.dimension != training.dimension:
        raise InputError(
            f"{ours} have {some.dimension:,} values each, {theirs} {training.dimension:,}: compute both with the same "
            "one network"
        )
    if some.metric != training.metric:
        raise InputError(
            f"{ours} are compared by {some.metric} distance, {theirs} by {training.metric}: pass metric=… for both"
        )
    if (some.vectors.dtype == np.uint8) != (training.vectors.dtype == np.uint8):
        raise InputError(
            f"{ours} are {some.vectors.dtype}, {theirs} {training.vectors.dtype}: compute both in the same way"
        )
    if some.metric == "euclidean" and some.vectors.dtype != np.uint8 and some.unit != training.unit:
        normalized, other = (ours, theirs) if some.unit else (theirs, ours)
        raise InputError(
            f"{normalized} have length 1, {other} do not: normalize both or neither, or compare with metric='cosine'"
        )
