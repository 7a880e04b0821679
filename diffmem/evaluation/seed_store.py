"""What is remembered of the images of seeds, batch by batch, so that nothing is sampled or searched twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.atomic_io import atomic_file, atomic_write, output_lock
from diffmem.errors import InputError
from diffmem.inert.boundary import parsing
from diffmem.integrity import load_arrays, read_sealed, save_arrays, sealed
from diffmem.logs import logger
from diffmem.memorization import Detection

_log = logger(__name__)
FORMAT = "diffmem-seeds-2"
_RUN = "run.json"
_RESTART = "start over with restart=True"


@dataclass(frozen=True, eq=False)
class SeedRecords:
    """What is known about the images of n seeds. Per-image arrays follow `seeds`.

    Attributes:
        seeds: int64 [n].
        digests: uint64 [n], equal for equal images, and else hardly ever.
        constant: bool [n], images of a single color.
        images: uint8 [m, C, H, W], those of the images that are kept.
        image_seeds: int64 [m], their seeds.
        labels: int64 [n] or float32 [n, label_dim], the classes, where the denoiser has any.
        detection: What was decided about the n images; None where nobody asked.
    """

    seeds: np.ndarray
    digests: np.ndarray
    constant: np.ndarray
    images: np.ndarray
    image_seeds: np.ndarray
    labels: np.ndarray | None = None
    detection: Detection | None = None

    @classmethod
    def of(
        cls, seeds: np.ndarray, images: np.ndarray, labels: np.ndarray | None, detection: Detection | None
    ) -> SeedRecords:
        """Of a batch of uint8 images [n, C, H, W], all of which are kept."""
        constant = (images == images[:, :, :1, :1]).all(axis=(1, 2, 3))
        return cls(seeds, _digests(images), constant, images, seeds, labels, detection)

    @classmethod
    def join(cls, parts: Sequence[SeedRecords]) -> SeedRecords:
        """The records of several batches as one; all of them were judged, or none."""
        if len(parts) == 1:
            return parts[0]
        names = ("seeds", "digests", "constant", "images", "image_seeds")
        arrays = [np.concatenate([getattr(part, name) for part in parts]) for name in names]
        labels = [part.labels for part in parts if part.labels is not None]
        found = [part.detection for part in parts if part.detection is not None]
        return cls(
            *arrays,  # type: ignore[arg-type, call-arg] # as many as there are names
            np.concatenate(labels) if labels else None,
            Detection.join(found) if found else None,
        )

    def __len__(self) -> int:
        return len(self.seeds)

    def select(self, seeds: Sequence[int]) -> SeedRecords:
        """The records of those of `seeds` that are known, in this order."""
        if self.seeds.tolist() == list(seeds):
            return self
        rows, kept = _rows_of(self.seeds, seeds), _rows_of(self.image_seeds, seeds)
        return SeedRecords(
            self.seeds[rows], self.digests[rows], self.constant[rows], self.images[kept], self.image_seeds[kept],
            None if self.labels is None else self.labels[rows],
            None if self.detection is None else self.detection.select(rows),
        )  # fmt: skip

    def keep(self, chosen: np.ndarray) -> SeedRecords:
        """The same with fewer images: those for which `chosen`, bool [m], says so."""
        values = {each.name: getattr(self, each.name) for each in fields(SeedRecords)}
        return SeedRecords(**{**values, "images": self.images[chosen], "image_seeds": self.image_seeds[chosen]})

    @property
    def image_rows(self) -> np.ndarray:
        """int64 [m]: which of the n images the kept ones are."""
        return _rows_of(self.seeds, self.image_seeds)


def _rows_of(known: np.ndarray, seeds: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where those of `seeds` that are among the `known` stand there, in the order of `seeds`."""
    row_of = {seed: row for row, seed in enumerate(known.tolist())}
    return np.array([row_of[seed] for seed in map(int, seeds) if seed in row_of], np.int64)


def _digests(images: np.ndarray) -> np.ndarray:
    hashes = [hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=8).digest() for image in images]
    return np.array([int.from_bytes(digest, "little") for digest in hashes], np.uint64)


class SeedStore:
    """Records of images by seed, in a folder: `run.json` says what decides them, and a `block-….npz` holds each batch.

    A block appears in one step, when it is complete, and carries a checksum; it is named after its first seed, and,
    where several batches were joined, their number. So a process may be killed at any time and loses the batch it was
    at. Several processes may write to one store: what both of them make is the same, and counts once.

    Args:
        folder: It is made when the first run begins.
        identity: All that decides the records of a seed, in JSON types, by names that messages can show.
        temporary: For a run that removes its store at the end (`generate`): blocks are not forced to the disk, and one
            that a crash of the machine damaged is made again. Otherwise a damaged block is an error.

    Example:
        >>> import tempfile
        >>> store = SeedStore(Path(tempfile.mkdtemp()) / "seeds", {"denoiser": "0a1b", "solver": "heun"})
        >>> store.begin()
        >>> store.read()
        []
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], *, temporary: bool = False) -> None:
        self.folder, self.temporary = Path(folder), temporary
        self.identity = json.loads(json.dumps(identity))  # as it reads when it comes back

    @classmethod
    def within(cls, parent: str | Path, name: str, identity: dict[str, Any]) -> SeedStore:
        """The store for this identity among others in a folder: each has a folder of its own there.

        Args:
            parent: The folder of all of them.
            name: How the store's folder begins.
            identity: As for `SeedStore`.

        Raises:
            InputError: The folder holds files of an older version.
        """
        parent = Path(parent)
        if old := sorted(parent.glob("*.npz")):
            raise InputError(
                f"{old[0]}: written by an older version of diffmem: delete the .npz files in {parent}, and their "
                "images are sampled again"
            )
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return cls(parent / f"{name}-{key[:8]}", identity)

    def begin(self, restart: bool = False) -> None:
        """Makes the folder ready for a run.

        Args:
            restart: Drop what another run has left.

        Raises:
            InputError: The folder holds the records of a run with another identity, things of others, or files of an
                older version; or it cannot be written to.
        """
        if restart:
            self.remove()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                run = self._run()
                if run is None:
                    self._write_run(None)
                    return
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written: {error.strerror or error}") from None
        kept = run["identity"]
        names = [name for name in {**kept, **self.identity} if kept.get(name) != self.identity.get(name)]
        if names:
            differences = ", ".join(
                f"{name} {_short(kept.get(name))} (now {_short(self.identity.get(name))})" for name in names
            )
            raise InputError(
                f"{self.folder} holds part of another run: {differences}; finish that one with its own settings, or "
                f"{self._advice}"
            )

    @property
    def compiled(self) -> bool | None:
        """Whether the run's steps are compiled, so that all of its batches are made in one way; None: not decided."""
        run = self._run()
        return None if run is None else run["compiled"]

    @compiled.setter
    def compiled(self, decided: bool) -> None:
        self._write_run(decided)

    def read(self, judged_by: str | None = None) -> list[SeedRecords]:
        """All that is known, block by block, each seed once.

        Args:
            judged_by: Names the detector (see `write`) whose decisions count; those of others are left out.

        Raises:
            InputError: A block is damaged, or of another version (but see `temporary`).
        """
        with self._locked():
            found = [self._block(path, judged_by) for path in sorted(self.folder.glob("block-*.npz"))]
        parts: list[SeedRecords] = []
        known: set[int] = set()
        # Blocks overlap where two processes made the same, or one was killed while it joined blocks.
        for part in sorted((part for part in found if part is not None), key=lambda part: part.detection is None):
            if new := [seed for seed in part.seeds.tolist() if seed not in known]:
                parts.append(part if len(new) == len(part) else part.select(new))
                known.update(new)
        return parts

    def write(self, records: SeedRecords, judged_by: str | None = None) -> None:
        """Adds a block.

        Args:
            records: Records of seeds that are not known yet.
            judged_by: Names the detector that decided.
        """
        self._write_block(self.folder / f"block-{int(records.seeds[0]):010d}.npz", records, judged_by)

    def _write_block(self, path: Path, records: SeedRecords, judged_by: str | None) -> None:
        arrays = {each.name: getattr(records, each.name) for each in fields(SeedRecords)}
        detection = arrays.pop("detection")
        arrays = {name: values for name, values in arrays.items() if values is not None}
        if detection is not None:
            arrays |= {f"detection.{name}": values for name, values in detection.to_arrays().items()}
            arrays["judged_by"] = np.array(judged_by or "")
        with atomic_file(path, durable=not self.temporary) as partial, open(partial, "xb") as file:
            save_arrays(file, arrays, compress=not self.temporary)

    def compact(self, judged_by: str) -> None:
        """Joins the blocks, which are many after a long run, to one, if all were judged by this detector."""
        with self._locked():
            blocks = sorted(self.folder.glob("block-*.npz"))
            if len(blocks) < 2:
                return
            parts = self.read(judged_by)
            if any(part.detection is None for part in parts):
                return
            joined = SeedRecords.join(parts)
            # Under a name that no writer of single blocks takes, who may be at work meanwhile.
            target = self.folder / f"block-{int(joined.seeds[0]):010d}-{len(joined)}.npz"
            self._write_block(target, joined, judged_by)
            for path in blocks:
                if path != target:
                    path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes what was kept, and the folder with it unless there are other things in it."""
        for pattern in ("block-*.npz", ".*.partial", _RUN):
            for path in self.folder.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    @property
    def _advice(self) -> str:
        return _RESTART if self.temporary else f"delete {self.folder}, and its images are sampled again"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody joins the blocks meanwhile. The writer of a temporary store has it for itself."""
        if self.temporary or not self.folder.is_dir() or not os.access(self.folder.parent, os.W_OK):
            yield
            return
        with output_lock(self.folder, wait=60.0):
            yield

    def _block(self, path: Path, judged_by: str | None) -> SeedRecords | None:
        advice = "delete it, and its images are sampled again"
        try:
            arrays = load_arrays(path, advice)
            with parsing(path, "a block of images", advice):
                found = {name.removeprefix("detection."): arrays[name] for name in arrays if "." in name}
                ours = found and judged_by is not None and str(arrays["judged_by"]) == judged_by
                values: dict[str, Any] = {each.name: arrays.get(each.name) for each in fields(SeedRecords)}
                if any(values[name] is None for name in ("seeds", "digests", "constant", "images", "image_seeds")):
                    raise ValueError("an array is missing")
                return SeedRecords(**{**values, "detection": Detection.from_arrays(found) if ours else None})
        except InputError as error:
            if not self.temporary:
                raise
            _log.warning("%s: damaged, its images are sampled again (%s)", path, error)
            return None

    def _run(self) -> dict[str, Any] | None:
        path = self.folder / _RUN
        if not path.exists():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise InputError(f"{self.folder}: exists and is not part of a run; choose another output")
            return None
        run = read_sealed(path, self._advice)
        if "format" not in run and "identity" in run:
            raise InputError(f"{self.folder}: written by an older version of diffmem: {self._advice}")
        if run.get("format") != FORMAT or not isinstance(run.get("identity"), dict):
            raise InputError(f"{path}: damaged, or written by another version of diffmem: {self._advice}")
        return {"identity": run["identity"], "compiled": run.get("compiled")}

    def _write_run(self, compiled: bool | None) -> None:
        values = sealed({"format": FORMAT, "identity": self.identity, "compiled": compiled})
        atomic_write(self.folder / _RUN, json.dumps(values, indent=1) + "\n")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:21]}…"
