"""Duplicates across all shards: identical rows by their digests, near ones by their distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmem.atomic_io import atomic_file
from diffmem.integrity import file_sha256, load_arrays, save_arrays
from diffmem.progress import Progress, silent
from diffmem.search import DuplicateGroups, TrainingIndex
from diffmem.search.duplicates import pairs_within_radius
from diffmem.search.rows import as_rows

if TYPE_CHECKING:
    from diffmem.indexes.folder import Shard

FILE = "duplicates.npz"
_BLOCK = 2048
_ENTRY = 48  # bytes of a digest while it is sorted, with its row
_ADVICE = "run `diffmem index verify`, which says how to repair it"


@dataclass(frozen=True, eq=False)
class StoredDuplicates:
    """Groups of duplicates, of which only rows that have any are kept.

    Attributes:
        radius: Root mean square difference per value within which rows are duplicates; 0: identical ones.
        members: int64 [m], rows that are duplicates of others, ascending.
        roots: int64 [m], the lowest row of each one's group.
        rows: N, of the index.
        distinct: Rows that are left when identical ones count once.
    """

    radius: float
    members: np.ndarray
    roots: np.ndarray
    rows: int
    distinct: int

    @property
    def number_of_groups(self) -> int:
        """Groups of two or more."""
        return len(np.unique(self.roots))

    @cached_property
    def groups(self) -> list[np.ndarray]:
        """The groups of two or more, each a sorted array of rows, largest first, then by first row."""
        order = np.argsort(self.roots, kind="stable")
        starts = np.flatnonzero(np.diff(self.roots[order], prepend=-1))
        found = np.split(self.members[order], starts[1:]) if len(order) else []
        return sorted(found, key=lambda group: (-len(group), group[0]))

    def group_of(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n]: for each row the lowest row of its group (its own, where it has no duplicate)."""
        rows = np.asarray(rows, np.int64)
        found = rows.copy()
        if len(self.members):
            place = np.minimum(np.searchsorted(self.members, rows), len(self.members) - 1)
            hit = self.members[place] == rows
            found[hit] = self.roots[place[hit]]
        return found

    def as_groups(self) -> DuplicateGroups:
        """The same as the audit of one set has them: an entry for every row."""
        group_of = np.arange(self.rows)
        group_of[self.members] = self.roots
        return DuplicateGroups(group_of, self.distinct)


def find_identical(shards: Sequence[Shard], memory: int, progress: Progress = silent) -> tuple[np.ndarray, np.ndarray]:
    """(members, roots) of rows that are identical, or whose images are, across shards.

    Args:
        shards: With their digests.
        memory: Bytes to sort in: where the digests of all rows take more, they are sorted part by part.
        progress: Called as `progress(stage, done, total)`.
    """
    links = [_equal(shards, "digests", memory, progress)]
    if any(shard.image_digests is not None for shard in shards):
        links.append(_equal(shards, "image_digests", memory, progress))
    return united([link for link in links if len(link)])


@dataclass(frozen=True)
class NearJob:
    """One shard to be searched for the rows of those behind it, and of itself.

    Attributes:
        shard: The one that is searched.
        others: Those whose rows are looked for in it.
        radius: Root mean square difference per value.
    """

    shard: Shard
    others: tuple[Shard, ...]
    radius: float

    @property
    def address(self) -> str:
        return f"{self.shard.address}@{self.shard.start}"  # the same shard may be there twice

    @property
    def where(self) -> str:
        return f"shard {self.shard.address}"


def near_jobs(shards: Sequence[Shard], radius: float, known: StoredDuplicates | None) -> list[NearJob]:
    """What finds all pairs of rows within a radius of each other, exactly.

    Args:
        shards: All of them.
        radius: Root mean square difference per value.
        known: What was found with this radius when the index had the first `known.rows` rows; pairs among these are
            not looked for again.
    """
    before = 0 if known is None else known.rows
    found = []
    for number, shard in enumerate(shards):
        others = tuple(other for other in shards[number:] if other.start >= before)
        if others:
            found.append(NearJob(shard, others, radius))
    return found


def near_pairs(job: NearJob, device: str = "auto") -> np.ndarray:
    """int64 [m, 2]: pairs of rows within the radius of each other, of which the second lies in the job's shard."""
    shard = job.shard
    found = [np.empty((0, 2), np.int64)]
    rows = shard.take(slice(None))
    index, tensor = TrainingIndex(rows, device=device), as_rows(rows)
    for other in job.others:
        for start in range(0, other.rows, _BLOCK):
            queries = other.take(slice(start, min(start + _BLOCK, other.rows)))
            some, theirs = pairs_within_radius(queries, tensor, job.radius, index)
            pairs = np.stack([some + other.start + start, theirs + shard.start], axis=1)
            found.append(pairs[pairs[:, 0] != pairs[:, 1]])
    return np.concatenate(found)


def _equal(shards: Sequence[Shard], which: str, memory: int, progress: Progress) -> np.ndarray:
    """int64 [m, 2]: rows with the same digest, each beside the lowest one that has it; the latter not included."""
    total = sum(shard.rows for shard in shards)
    passes = max(1, -(-total * _ENTRY // max(_ENTRY, memory)))
    edges = np.linspace(0, 2**16, passes + 1).astype(np.int64)
    found: list[np.ndarray] = []
    for number, (low, high) in enumerate(pairwise(edges.tolist())):
        keys, rows = [], []
        for shard in shards:
            digests = getattr(shard, which)
            if digests is None:
                continue
            prefix = digests[:, 0].astype(np.int64) * 256 + digests[:, 1]
            mine = np.flatnonzero((prefix >= low) & (prefix < high))
            keys.append(np.ascontiguousarray(digests[mine]).view("<u8").reshape(-1, 2))
            rows.append(mine + shard.start)
        if keys:
            found.append(_runs(np.concatenate(keys), np.concatenate(rows)))
        progress("finding identical training images", number + 1, passes)
    return np.concatenate(found) if found else np.empty((0, 2), np.int64)


def _runs(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    order = np.lexsort((rows, keys[:, 1], keys[:, 0]))
    keys, rows = keys[order], rows[order]
    same = np.zeros(len(rows), bool)
    same[1:] = (keys[1:] == keys[:-1]).all(axis=1)
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(rows))))
    return np.stack([rows[same], rows[first[same]]], axis=1)


def united(links: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(members, roots) of the connected components of links, int64 [m, 2] each."""
    if not links:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    pairs = np.concatenate(links)
    members = np.unique(pairs)
    parent = np.arange(len(members))
    ends = np.searchsorted(members, pairs)

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = int(parent[node])
        return node

    for one, other in ends.tolist():
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return members, members[[root(node) for node in range(len(members))]]


def write_duplicates(folder: Path, found: StoredDuplicates) -> dict[str, Any]:
    """Writes the file and returns what the index's description says of it."""
    with atomic_file(folder / FILE) as partial, open(partial, "xb") as stream:
        save_arrays(stream, {"members": found.members, "roots": found.roots})
    return {
        "radius": found.radius,
        "groups": found.number_of_groups,
        "rows": len(found.members),
        "distinct": found.distinct,
        "largest": max((len(group) for group in found.groups), default=0),
        "sha256": file_sha256(folder / FILE),
    }


def read_duplicates(folder: Path, about: Mapping[str, Any], rows: int) -> StoredDuplicates:
    """What `write_duplicates` wrote; raises InputError where it is damaged."""
    arrays = load_arrays(folder / FILE, _ADVICE)
    return StoredDuplicates(about["radius"], arrays["members"], arrays["roots"], rows, about["distinct"])
