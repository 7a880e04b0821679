"""Compact codes of float vectors, a byte per coordinate, that bound distances (csrc/vector_scan/vector_scan.h).

A code is made in one pass over the vectors, with a rotation that comes from a sample of at most `SAMPLE` of them:
leading principal components first, what is left of the space turned at random behind them. How good the sample is
decides how much is pruned, never the answer. Codes lie in memory, or in a folder, memory-mapped, with a subfolder per
shard:

    rotation.json       format, metric, dimension, shift, unit (sealed)
    rotation.npy        float32 [d, d], rows nearly orthonormal, of norm at most 1
    mean.npy            float32 [d]
    <shard>/shard.json  rows, and the SHA-256 of the shard's vectors as they were read (sealed)
    <shard>/code.npy    uint8 [n, width]
    <shard>/terms.npy   float32 [n, 6]

A shard's folder appears when it is complete. Its name is the key of the shard's contents, or says which file these were
read from: path, size and time of change.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.atomic_io import atomic_folder, atomic_replacement
from diffmem.errors import InputError
from diffmem.inert.boundary import parsing
from diffmem.inert.documents import read_json
from diffmem.integrity import sealed, unsealed
from diffmem.lazy import torch
from diffmem.ops.registry import native_module
from diffmem.progress import Progress, silent
from diffmem.search.basis import principal_components
from diffmem.search.vector_shards import VectorShards

FORMAT = "diffmem-vector-codes-1"
LEAD = 64  # kLead of csrc/vector_scan/vector_scan.h, and the unit of widths
LARGEST_DIMENSION = 4096
LARGEST_SHIFT = 10
SAMPLE = 8192
SAMPLE_VALUES = 1 << 24
TERMS = 6
CHECKED = 16  # rows of each shard whose code is made again when a folder is opened
LARGEST = 1e12  # of the scaled length of a query; longer ones are compared with every vector


@dataclass(frozen=True)
class Rotation:
    """How vectors become codes.

    Attributes:
        matrix: float32 [d, d], spectral norm at most 1, the first `LEAD` rows leading principal components.
        mean: float32 [d].
        unit: A power of two: scaled vectors have values of the size of 1.
        shift: Of the products of leading coordinates, even: these have steps 2^(shift / 2) times as large.
        stretch: At least 1 / (least singular value of `matrix`).
    """

    matrix: torch.Tensor
    mean: torch.Tensor
    unit: float
    shift: int
    stretch: float

    @property
    def dimension(self) -> int:
        return self.matrix.shape[1]

    @property
    def width(self) -> int:
        """Bytes of a code."""
        return -(-self.dimension // LEAD) * LEAD

    @property
    def eta(self) -> float:
        """Bound on the rounding of `rotate`, relative to the length of its result.

        z = (x − mean) · unit has a relative error of u = 2^-24 (a difference is rounded once, the rest is exact); a
        product of d terms one of γ_d = d u / (1 − d u) of ‖a‖‖z‖ (Higham, §3.1), so that d products are together
        within γ_d √d of ‖z‖ ≤ stretch · ‖result‖ / (1 − …). Four more u for the steps' products in the core.
        """
        d, u = self.dimension, 2.0**-24
        products = (d + 2) * u / (1 - (d + 2) * u) * math.sqrt(d) + u
        return products * self.stretch / (1 - products * self.stretch) + 4 * u

    def rotate(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 [n, d] of float32 rows; a row that is not finite then, or too long, is far beyond `LARGEST`."""
        from diffmem.precision import float32_products

        scaled = rows - self.mean
        scaled *= self.unit
        with float32_products("ieee"):
            rotated = scaled @ self.matrix.T
        if not bool(torch.isfinite(rotated.abs().max())):
            rotated[~torch.isfinite(rotated).all(dim=1)] = 2 * LARGEST
        return rotated

    def encode(self, rows: torch.Tensor, queries: bool) -> tuple[np.ndarray, np.ndarray]:
        """Bytes uint8 [n, width] and terms float32 [n, 6] of float32 rows."""
        code = torch.empty((len(rows), self.width), dtype=torch.uint8).numpy()
        terms = np.empty((len(rows), TERMS), np.float32)
        rotated = self.rotate(rows).contiguous() if len(rows) else rows
        native_module().vector_scan_encode(
            v=rotated.data_ptr(),
            count=len(rows),
            d=self.dimension,
            width=self.width,
            shift=self.shift,
            queries=queries,
            eta=self.eta,
            code=code.ctypes.data,
            terms=terms.ctypes.data,
            threads=torch.get_num_threads(),
        )
        return code, terms

    def reaches(self, queries: torch.Tensor) -> torch.Tensor:
        """bool [Q]: which queries are near enough to the training vectors for a code."""
        return ((queries.double() - self.mean.double()) * self.unit).norm(dim=1) < LARGEST / 4


def rotation_of(sample: torch.Tensor) -> Rotation:
    """The rotation for vectors like those of `sample`, float32 [n, d]."""
    d = sample.shape[1]
    mean = sample.double().mean(dim=0).float()
    centered = sample.double() - mean.double()
    # Of most vectors; those that are many times longer than others bound nothing. Between 2^-120 and 2^120, so that it
    # and its products are float32.
    sizes = centered.abs().amax(dim=1)
    size = float(sizes[sizes > 0].median()) if bool((sizes > 0).any()) else 1.0
    exponent = min(120, max(-120, -math.frexp(size)[1]))
    unit = 2.0**exponent
    centered = (centered * unit).clamp(-4, 4).float()
    lead = min(LEAD, d)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(d, d, generator=generator, dtype=torch.float64)
    leading = principal_components(centered, lead).double()
    directions[:, : len(leading)] = leading.T
    matrix = torch.linalg.qr(directions).Q.T.contiguous().float()
    highest = math.inf
    while highest > 1 - 1e-9:  # once or twice: float32 rounds what is scaled
        gram = matrix.double() @ matrix.double().T
        # ‖A‖² = ‖AAᵀ‖ is at most the largest row sum; its least eigenvalue at least the least diagonal less the others.
        sums = gram.abs().sum(dim=1)
        highest = float(sums.max()) * (1 + 1e-10)
        if highest > 1 - 1e-9:
            matrix = (matrix.double() / (math.sqrt(highest) * (1 + 1e-7))).float()
    least = float((2 * gram.diagonal() - sums).min()) - 1e-10
    rotated = (centered @ matrix.T).abs()
    shift = 0
    if d > LEAD:
        # Leading coordinates get larger steps where they are longer, so that one step fits the rest of most vectors.
        leading_size, rest = (float(part.amax(dim=1).median()) for part in (rotated[:, :lead], rotated[:, lead:]))
        ratio = math.log2(leading_size / rest) if min(leading_size, rest) > 0 else 0
        shift = 2 * min(LARGEST_SHIFT // 2, max(0, math.ceil(ratio)))
    return Rotation(matrix, mean, unit, shift, 1 / math.sqrt(least) * (1 + 1e-9))


@dataclass(frozen=True)
class Codes:
    """The codes of all shards: bytes uint8 [n, width] and terms float32 [n, 6] for each."""

    rotation: Rotation
    code: list[np.ndarray]
    terms: list[np.ndarray]
    digests: list[str]


def make(shards: VectorShards, progress: Progress = silent) -> Codes:
    """Codes in memory: d + 24 bytes per vector."""
    rotation = rotation_of(_sample(shards))
    codes = Codes(rotation, [], [], [])
    for shard, array in enumerate(shards.arrays):
        codes.code.append(torch.empty((len(array), rotation.width), dtype=torch.uint8).numpy())
        codes.terms.append(np.empty((len(array), TERMS), np.float32))
        codes.digests.append(_fill(shards, shard, rotation, codes.code[-1], codes.terms[-1], progress))
    return codes


def open_folder(
    folder: Path, shards: VectorShards, keys: Sequence[str] | None = None, progress: Progress = silent
) -> Codes:
    """Codes in a folder, memory-mapped; those of shards that it lacks are made first, one after the other.

    Args:
        folder: Is made where it is missing.
        shards: The vectors.
        keys: Names of the shards' contents.
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: The folder holds codes of other vectors (metric, dimension), is damaged or is something else.
    """
    rotation = _rotation_in(folder, shards)
    codes = Codes(rotation, [], [], [])
    names = [key_of(shards, shard) for shard in range(len(shards.arrays))] if keys is None else list(keys)
    for shard, name in enumerate(names):
        place = folder / hashlib.sha256(name.encode()).hexdigest()[:32]
        if not place.is_dir():
            _make_shard(place, shards, shard, rotation, progress)
        code, terms, digest = _open_shard(place, shards, shard, rotation)
        codes.code.append(code)
        codes.terms.append(terms)
        codes.digests.append(digest)
    return codes


def key_of(shards: VectorShards, shard: int) -> str:
    """What names a shard's contents without reading them, where it lies in a file; else their hash."""
    array = shards.arrays[shard]
    if isinstance(array, np.memmap) and array.filename is not None:
        path = Path(array.filename)
        about = path.stat()
        parts = (str(path.resolve()), about.st_size, about.st_mtime_ns, array.offset, array.shape, array.dtype.str)
        return repr(parts)
    return shards.digest(shard)


def _sample(shards: VectorShards) -> torch.Tensor:
    return shards.sample(min(SAMPLE, max(256, SAMPLE_VALUES // shards.dimension)))


def _fill(
    shards: VectorShards, shard: int, rotation: Rotation, code: np.ndarray, terms: np.ndarray, progress: Progress
) -> str:
    """Writes a shard's codes block by block; returns the digest of its vectors."""
    first, count = int(shards.starts[shard]), len(shards.arrays[shard])
    digest = shards.new_digest(shard)
    for start in range(0, count, shards.block_rows):
        progress("coding training vectors", first + start, len(shards))
        part = slice(start, min(count, start + shards.block_rows))
        code[part], terms[part] = rotation.encode(shards.block(first + part.start, first + part.stop), False)
        shards.add_to_digest(digest, shard, part)
    progress("coding training vectors", first + count, len(shards))
    return str(digest.hexdigest())


def _rotation_in(folder: Path, shards: VectorShards) -> Rotation:
    description = folder / "rotation.json"
    if not description.is_file():
        if folder.exists() and (not folder.is_dir() or any(not each.name.startswith(".") for each in folder.iterdir())):
            raise InputError(f"{folder} exists and holds no codes of vectors: choose another folder for them")
        made = rotation_of(_sample(shards))
        with atomic_replacement(folder) as partial:
            np.save(partial / "rotation.npy", made.matrix.numpy())
            np.save(partial / "mean.npy", made.mean.numpy())
            made_of = {
                "format": FORMAT,
                "metric": shards.metric,
                "dimension": shards.dimension,
                "shift": made.shift,
                "unit": made.unit.hex(),
                "stretch": made.stretch.hex(),
                "rotation": _sha256(made.matrix.numpy(), made.mean.numpy()),
            }
            (partial / "rotation.json").write_text(json.dumps(sealed(made_of), indent=1) + "\n")
    advice = "delete the folder, and the codes are made again"
    with parsing(folder, "a folder of vectors' codes", advice):
        about: dict[str, Any] = unsealed(read_json(description, advice), description, advice)
        if about.get("format") != FORMAT:
            raise InputError(f"{folder}: codes from another version of diffmem: {advice}")
        if (about["metric"], about["dimension"]) != (shards.metric, shards.dimension):
            raise InputError(
                f"{folder}: codes of vectors of {about['dimension']} values compared by {about['metric']}, not of "
                f"{shards.dimension} by {shards.metric}: choose another folder for them"
            )
        matrix = np.load(folder / "rotation.npy", allow_pickle=False)
        mean = np.load(folder / "mean.npy", allow_pickle=False)
        if _sha256(matrix, mean) != about["rotation"]:
            raise InputError(f"{folder}: damaged (its rotation does not match its checksum): {advice}")
        return Rotation(
            torch.from_numpy(matrix),
            torch.from_numpy(mean),
            float.fromhex(about["unit"]),
            int(about["shift"]),
            float.fromhex(about["stretch"]),
        )


def _make_shard(place: Path, shards: VectorShards, shard: int, rotation: Rotation, progress: Progress) -> None:
    count = len(shards.arrays[shard])
    with atomic_folder(place, durable=False) as partial:
        code = np.lib.format.open_memmap(partial / "code.npy", "w+", np.uint8, (count, rotation.width))
        terms = np.lib.format.open_memmap(partial / "terms.npy", "w+", np.float32, (count, TERMS))
        digest = _fill(shards, shard, rotation, code, terms, progress)
        for array in (code, terms):
            if isinstance(array, np.memmap):
                array.flush()
        about = {"format": FORMAT, "rows": count, "vectors": digest}
        (partial / "shard.json").write_text(json.dumps(sealed(about), indent=1) + "\n")


def _open_shard(
    place: Path, shards: VectorShards, shard: int, rotation: Rotation
) -> tuple[np.ndarray, np.ndarray, str]:
    advice = "delete it, and the codes are made again"
    with parsing(place, "codes of a shard", advice):
        about = unsealed(read_json(place / "shard.json", advice), place / "shard.json", advice)
        count = len(shards.arrays[shard])
        code = np.load(place / "code.npy", mmap_mode="r" if count else None, allow_pickle=False)
        terms = np.load(place / "terms.npy", mmap_mode="r" if count else None, allow_pickle=False)
        expected = (np.dtype(np.uint8), (count, rotation.width), np.dtype(np.float32), (count, TERMS))
        if (code.dtype, code.shape, terms.dtype, terms.shape) != expected or about["rows"] != count:
            raise InputError(f"{place}: damaged (its codes are not those of {count:,} vectors): {advice}")
        some = np.linspace(0, count - 1, min(CHECKED, count)).astype(np.int64)
        found = rotation.encode(shards.gather(some + shards.starts[shard]), False)
        # Another processor's products are rounded otherwise: a coordinate may fall on the next step.
        steps = np.abs(found[0].astype(np.int16) - code[some].astype(np.int16))
        if len(some) and (steps.max() > 1 or not np.allclose(found[1], terms[some], rtol=1e-2, atol=1e-6)):
            raise InputError(f"{place}: the codes are not those of {shards.names[shard]}: {advice}")
        return code, terms, about["vectors"]


def _sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
