"""Snapshots of a run: the EMA weights at intervals, as checkpoint folders, and which of them are kept.

`snapshots.json` in the run's folder lists all that were made, also those no longer kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from diffmem.atomic_io import atomic_write
from diffmem.errors import InputError
from diffmem.inert.boundary import parsing
from diffmem.integrity import read_checked, sealed
from diffmem.models import Denoiser, WrappedDenoiser, save
from diffmem.training.run_folder.stats import read_stats

FOLDER, RECORDS = "snapshots", "snapshots.json"
_ADVICE = "delete it, and the list is rebuilt from snapshots/ and stats.jsonl"


@dataclass(frozen=True)
class SnapshotRecord:
    """One snapshot that a run has made.

    Attributes:
        images: Images seen.
        epochs: Epochs.
        loss: Mean loss per pixel since the one before.
        score: What a callback gave it, higher is better; None where none did.
        kept: Whether its folder is still there.
    """

    images: int
    epochs: float
    loss: float
    score: float | None = None
    kept: bool = True


class KeepRule(Protocol):
    """Which snapshots to keep: called with all records, oldest first; returns the images-seen of those to keep."""

    def __call__(self, records: Sequence[SnapshotRecord]) -> set[int]: ...


def keep_all(records: Sequence[SnapshotRecord]) -> set[int]:
    """Every snapshot: what a trajectory needs.

    Args:
        records: Records of the run.
    """
    return {record.images for record in records}


@dataclass(frozen=True)
class KeepLast:
    """The last `count` snapshots, and the best one: the highest score, or the lowest loss where there are no scores.

    Attributes:
        count: How many, at least 1.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"the number of snapshots to keep is {self.count}, but must be at least 1")

    def __call__(self, records: Sequence[SnapshotRecord]) -> set[int]:
        kept = {record.images for record in records[-self.count :]}
        candidates = [record for record in records if record.kept]
        scored = [record for record in candidates if record.score is not None]
        if scored:
            kept.add(max(scored, key=lambda record: record.score or 0.0).images)
        elif candidates:
            kept.add(min(candidates, key=lambda record: record.loss).images)
        return kept


class Snapshots:
    """The snapshots in a run's folder."""

    def __init__(self, out: Path, keep: KeepRule = keep_all) -> None:
        self.out, self.keep = out, keep
        self.records: list[SnapshotRecord] = read_records(out)

    def write(self, denoiser: Denoiser | WrappedDenoiser, images: int) -> Path:
        """Stores the denoiser and returns its folder; `add` then lists it."""
        return save(denoiser, snapshot_folder(self.out, images))

    def add(self, record: SnapshotRecord) -> None:
        """Lists a stored snapshot and removes those that the rule does not keep."""
        records = [*self.records, record]
        kept = self.keep(records)
        self.records = [SnapshotRecord(**{**asdict(r), "kept": r.kept and r.images in kept}) for r in records]
        self._write_records()
        for old in records:
            if old.images not in kept:
                shutil.rmtree(snapshot_folder(self.out, old.images), ignore_errors=True)

    def forget_after(self, images: int) -> None:
        """Removes what was made after `images`: a run that is continued there makes it again."""
        for record in self.records:
            if record.images > images:
                shutil.rmtree(snapshot_folder(self.out, record.images), ignore_errors=True)
        self.records = [record for record in self.records if record.images <= images]
        self._write_records()

    def _write_records(self) -> None:
        values = sealed({"snapshots": [asdict(record) for record in self.records]})
        atomic_write(self.out / RECORDS, json.dumps(values, indent=1) + "\n")


def snapshot_folder(out: Path, images: int) -> Path:
    """Where a snapshot lies: nine digits or more, so that names sort.

    Args:
        out: The run's folder.
        images: Images seen.
    """
    return out / FOLDER / f"{images:09d}"


def read_records(out: Path) -> list[SnapshotRecord]:
    """The snapshots that a run's folder lists, oldest first; none where there are none yet.

    Args:
        out: The run's folder.

    Raises:
        InputError: The list is damaged.
    """
    path = Path(out) / RECORDS
    if not path.exists():
        return _found_again(Path(out))
    values = read_checked(path, _ADVICE)
    values = values.get("snapshots") if isinstance(values, dict) else values  # without checksums it was a plain list
    with parsing(path, "a list of snapshots", _ADVICE):
        records = [SnapshotRecord(**each) for each in cast(Any, values)]  # a TypeError is one of what `parsing` tells
        if not all(type(record.images) is int and record.images >= 0 for record in records):
            raise ValueError("a snapshot without a number of images")
        return records


def _found_again(out: Path) -> list[SnapshotRecord]:
    """The snapshots in a run's folder that has no list of them, with epochs and losses from `stats.jsonl`."""
    ticks = [(each.images, each.epochs / each.images, each.loss) for each in read_stats(out) if each.images]
    numbers = [int(path.name) for path in (out / FOLDER).glob("*") if path.name.isascii() and path.name.isdigit()]
    records, before = [], 0
    for images in sorted(numbers) if ticks else ():
        since = [tick for tick in ticks if before < tick[0] <= images] or [min(ticks, key=lambda t: abs(t[0] - images))]
        loss = sum(tick[2] for tick in since) / len(since)
        records.append(SnapshotRecord(images, images * since[-1][1], loss))
        before = images
    return records
