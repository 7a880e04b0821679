"""`verify_index`: whether every file of an index is what it was when it was written, and repairing what is not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.atomic_io import output_lock
from diffmem.data.arrays import map_npy
from diffmem.errors import InputError
from diffmem.indexes.build import Settings, as_before, finish, make_all, plan_jobs, run_by_shard, sweep
from diffmem.indexes.duplicates import FILE as DUPLICATES
from diffmem.indexes.duplicates import find_identical, read_duplicates
from diffmem.indexes.folder import IndexFolder, read_index
from diffmem.indexes.quantizer import FILE as QUANTIZER_FILE
from diffmem.indexes.quantizer import Quantizer
from diffmem.indexes.shards import DESCRIPTION, FORMAT, SHARDS, content_digests
from diffmem.indexes.sources import Part
from diffmem.integrity import file_sha256, read_sealed
from diffmem.progress import Progress, silent
from diffmem.text import printable

_BLOCK = 4096
HASHED_ALONE = 2e9  # bytes that one process hashes sooner than others would have started


@dataclass(frozen=True)
class Verified:
    """What `verify_index` found.

    Attributes:
        shards: How many were looked at.
        rows: How many rows they hold.
        damaged: Address of each shard that is not what it was, with what is wrong and what it was made from.
        derived: What is wrong with what was derived from all shards: duplicates, codes.
        unused: Addresses of finished shards that the index does not use.
        rebuilt: Addresses of shards that were made again.
    """

    shards: int
    rows: int
    damaged: tuple[tuple[str, str, str], ...] = ()
    derived: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    rebuilt: tuple[str, ...] = ()

    @property
    def intact(self) -> bool:
        """Whether everything that the index uses is what it was."""
        return not self.damaged and not self.derived


def verify_index(
    path: str | os.PathLike[str],
    *,
    rebuild: bool = False,
    prune: bool = False,
    settings: Settings | None = None,
    progress: Progress = silent,
) -> Verified:
    """Whether every file of an index is what it was when it was written: hashes, numbers of rows, digests, duplicates.

    Args:
        path: The folder.
        rebuild: Make damaged shards again from their sources, and what was derived from them.
        prune: Remove finished shards that the index does not use.
        settings: Where to check and rebuild, and with how much memory.
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: There is no index, or its description is damaged; with `rebuild`: a source is not what it was.
    """
    folder = Path(path).expanduser()
    settings = settings or Settings(progress=progress, say=lambda line: None)
    with output_lock(folder):
        description = read_index(folder)
        entries: list[dict[str, Any]] = description["shards"]
        jobs = {entry["address"]: VerifyJob(str(folder.absolute()), entry) for entry in entries}
        size = sum(job.entry["bytes"] for job in jobs.values())
        problems = run_by_shard(check_shard, list(jobs.values()), size, settings, "verifying shards", HASHED_ALONE)
        problem_of = dict(zip(jobs, problems, strict=True))
        damaged = [
            (entry["address"], problem, Part.from_json(entry["part"]).where)
            for entry in entries
            if (problem := problem_of[entry["address"]]) is not None
        ]
        derived = [] if damaged else _derived_problems(folder, description, settings)
        used = {entry["address"] for entry in entries}
        found = os.listdir(folder / SHARDS)
        unused = sorted(name for name in found if name not in used and (folder / SHARDS / name / DESCRIPTION).is_file())
        rebuilt: list[str] = []
        if rebuild and (damaged or derived):
            rebuilt = [address for address, _, _ in damaged]
            _rebuild(folder, description, set(rebuilt), bool(derived), settings)
            damaged, derived = [], []
        if prune:
            for name in unused:
                shutil.rmtree(folder / SHARDS / name)
            sweep(folder)
            unused = []
        return Verified(
            len(entries), description["rows"], tuple(damaged), tuple(derived), tuple(unused), tuple(rebuilt)
        )


@dataclass(frozen=True)
class VerifyJob:
    """A shard to be checked.

    Attributes:
        folder: Of the index.
        entry: What the index says of the shard.
    """

    folder: str
    entry: dict[str, Any]

    @property
    def address(self) -> str:
        return str(self.entry["address"])

    @property
    def where(self) -> str:
        return f"shard {self.address}"


def check_shard(job: VerifyJob, device: str = "auto") -> str | None:
    """`shard_problem`, by a worker."""
    return shard_problem(Path(job.folder) / SHARDS / job.address, job.entry)


def shard_problem(folder: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a shard, in words; None where nothing is."""
    try:
        if not folder.is_dir():
            return "is missing"
        if file_sha256(folder / DESCRIPTION) != entry["description"]:
            return f"{DESCRIPTION} is damaged or another one"
        about = read_sealed(folder / DESCRIPTION, "rebuild it")
        if about.get("format") != FORMAT or about["rows"] != entry["rows"]:
            return f"{DESCRIPTION} says {about.get('rows')} rows, the index {entry['rows']}"
        for name, expected in about["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if file_sha256(folder / name) != expected:
                return f"{name} is damaged (its checksum differs)"
        if entry["rows"] == 0:
            return None
        arrays = {path.stem: map_npy(path) for path in sorted(folder.glob("*.npy"))}
        for name, values in arrays.items():
            if name != "names" and len(values) != entry["rows"]:
                return f"{name}.npy holds {len(values):,} rows instead of {entry['rows']:,}"
        vectors, digests = arrays["vectors"], arrays["digests"]
        for start in range(0, len(vectors), _BLOCK):
            if not np.array_equal(content_digests(vectors[start : start + _BLOCK]), digests[start : start + _BLOCK]):
                return f"digests.npy is not that of vectors.npy, from row {start:,} on"
    except (InputError, OSError, KeyError, ValueError, TypeError) as error:
        return printable(" ".join(str(error).split()))
    return None


def _derived_problems(folder: Path, description: dict[str, Any], settings: Settings) -> list[str]:
    """What is wrong with what was derived from all shards."""
    problems = []
    about = description["duplicates"]
    try:
        if file_sha256(folder / DUPLICATES) != about["sha256"]:
            problems.append(f"{DUPLICATES} is damaged (its checksum differs)")
        elif about["radius"] == 0:
            stored = read_duplicates(folder, about, description["rows"])
            shards = IndexFolder(folder, description).shards
            members, roots = find_identical(shards, int(settings.memory or 2e9))
            if not (np.array_equal(members, stored.members) and np.array_equal(roots, stored.roots)):
                problems.append(f"{DUPLICATES} does not name the rows that are identical")
    except (InputError, OSError, KeyError) as error:
        problems.append(f"{DUPLICATES}: {printable(str(error))}")
    if description["quantizer"] is not None:
        problems += [
            f"{path.relative_to(folder)} is missing or damaged (its checksum differs)"
            for path in Quantizer(IndexFolder(folder, description)).damaged()
        ]
    return problems


def _rebuild(folder: Path, description: dict[str, Any], damaged: set[str], derived: bool, settings: Settings) -> None:
    settings = as_before(description, settings)
    parts = [Part.from_json(entry["part"]) for entry in description["shards"] if entry["address"] in damaged]
    for address in damaged:
        if (folder / SHARDS / address).is_dir():
            shutil.rmtree(folder / SHARDS / address)
    if parts:
        jobs, plan = plan_jobs(parts, folder, settings)
        wanted = [entry["address"] for entry in description["shards"] if entry["address"] in damaged]
        for job, address in zip(jobs, wanted, strict=True):
            if job.address != address:
                raise InputError(
                    f"{job.part.where}: is not the file that shard {address} was made from: it changed since: build "
                    "the index again, which takes it as it is now"
                )
        made = {entry["address"]: entry for entry in make_all(jobs, settings, plan)}
        # What another version wrote may have had fewer files.
        description["shards"] = [made.get(entry["address"], entry) for entry in description["shards"]]
    if derived and description["quantizer"] is not None:
        for path in Quantizer(IndexFolder(folder, description)).damaged():
            path.unlink(missing_ok=True)
            if path.name == QUANTIZER_FILE:  # codes mean nothing without it
                shutil.rmtree(path.parent)
                break
    finish(folder, description["sources"], description["shards"], settings, description)


def report_of(found: Verified, path: Path) -> Sequence[str]:
    """Lines that say what was found, and the command that repairs it."""
    lines = [
        f"shard {address}, made from {printable(where)}: {problem}" for address, problem, where in found.damaged
    ] + list(found.derived)
    if lines:
        lines.append(f"repair it with `diffmem index verify {path} --rebuild`")
    return lines
