"""What was watched in the runs of a report, as two tables, from which the laws can be judged again.

`phases.csv`: a line per run and audit, with the three phases, and what is the run's own (false alarms, δ).
`loss-gaps.csv`: a line per run, audit and noise level.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from diffmem.errors import InputError
from diffmem.inert.boundary import parsing
from diffmem.studies.measure import Result, SnapshotResult
from diffmem.studies.watch import Watched
from diffmem.text import table

PHASES, GAPS = "phases.csv", "loss-gaps.csv"
_RUN = ("key", "size", "repetition", "images")
PHASE_COLUMNS = (*_RUN, "memorized", "spurious", "generalized", "alarms", "unseen", "delta")
GAP_COLUMNS = (*_RUN, "sigma", "training", "unseen", "error", "p")


def watched_tables(results: Iterable[Result]) -> dict[str, str]:
    """The texts of both tables by file name; none where no run was watched.

    Args:
        results: The runs.
    """
    phases: list[tuple[object, ...]] = []
    gaps: list[tuple[object, ...]] = []
    for result in {result.key: result for result in results}.values():
        alarms, unseen = result.alarms or (0, 0)
        for each in result.snapshots:
            if (watched := each.watched) is None:
                continue
            run = (result.key, result.size, result.repetition, each.images)
            counts = (watched.memorized, watched.spurious, watched.generalized)
            phases.append((*run, *counts, alarms, unseen, repr(float(result.delta or 0.0))))
            gaps += [(*run, *(repr(float(number)) for number in level)) for level in watched.gap]
    if not phases:
        return {}
    return {PHASES: table(PHASE_COLUMNS, phases), GAPS: table(GAP_COLUMNS, gaps)}


def with_watched(results: Mapping[str, Result], folder: Path) -> dict[str, Result]:
    """Results by key with what the tables in a report's folder say of them; as they are where there are no tables.

    Args:
        results: The runs of `runs.csv`.
        folder: The report's.

    Raises:
        InputError: A table is damaged; it is named.
    """
    found = dict(results)
    if not (folder / PHASES).is_file():
        return found
    gaps: dict[tuple[str, int], list[list[float]]] = {}
    for row in _rows(folder / GAPS):
        with parsing(folder / GAPS, "the loss gaps of runs"):
            place = row["key"], int(row["images"])
            gaps.setdefault(place, []).append([float(row[name]) for name in GAP_COLUMNS[len(_RUN) :]])
    watched: dict[str, dict[int, Watched]] = {}
    for row in _rows(folder / PHASES):
        with parsing(folder / PHASES, "the phases of runs"):
            key, images = row["key"], int(row["images"])
            counts = [int(row[name]) for name in ("memorized", "spurious", "generalized")]
            watched.setdefault(key, {})[images] = Watched(gaps.get((key, images), []), *counts)
            if key in found:
                alarms = int(row["alarms"]), int(row["unseen"])
                found[key] = replace(found[key], alarms=alarms, delta=float(row["delta"]))
    for key, own in watched.items():
        if key in found:
            snapshots = tuple(_with(each, own) for each in found[key].snapshots)
            found[key] = replace(found[key], snapshots=snapshots)
    return found


def _with(snapshot: SnapshotResult, watched: Mapping[int, Watched]) -> SnapshotResult:
    return replace(snapshot, watched=watched.get(snapshot.images))


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise InputError(f"{path}: missing, though {PHASES} is there: restore it, or remove {PHASES}")
    with parsing(path, "a table of runs"), path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
