"""What was watched in the runs of a report, as tables, from which the laws can be judged again.

`phases.csv`: a line per run and audit, with the three phases, and what is the run's own (false alarms, δ).
`loss-gaps.csv`: a line per run, audit and noise level. `mixtures.csv`: a line per run of a mixture.
`halves.csv`: a line per pair of networks.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

from diffmem.errors import InputError
from diffmem.evaluation import Agreement
from diffmem.inert.boundary import parsing
from diffmem.studies.measure import Result, SnapshotResult
from diffmem.studies.mixture import MixtureResult
from diffmem.studies.watch import Watched
from diffmem.text import table

PHASES, GAPS = "phases.csv", "loss-gaps.csv"
_RUN = ("key", "size", "repetition", "images")
PHASE_COLUMNS = (*_RUN, "memorized", "spurious", "generalized", "alarms", "unseen", "delta")
MIXTURES = "mixtures.csv"
MIXTURE_COLUMNS = ("key", *(field.name for field in fields(MixtureResult)))
HALVES = "halves.csv"
HALF_COLUMNS = ("key", "size", "repetition", "between", "chance", "nearest_first", "nearest_second", "seeds")
GAP_COLUMNS = (*_RUN, "sigma", "training", "unseen", "error", "p")


def watched_tables(results: Collection[Result]) -> dict[str, str]:
    """The texts of the tables by file name; none where no run was watched, and none was a mixture's.

    Args:
        results: The runs, each once.
    """
    phases: list[tuple[object, ...]] = []
    gaps: list[tuple[object, ...]] = []
    for result in results:
        alarms, unseen = result.alarms or (0, 0)
        for each in result.snapshots:
            if (watched := each.watched) is None:
                continue
            run = (result.key, result.size, result.repetition, each.images)
            counts = (watched.memorized, watched.spurious, watched.generalized)
            phases.append((*run, *counts, alarms, unseen, repr(float(result.delta or 0.0))))
            gaps += [(*run, *(repr(float(number)) for number in level)) for level in watched.gap]
    mixtures = [
        (result.key, *(repr(value) for value in asdict(result.mixture).values()))
        for result in results
        if result.mixture is not None
    ]
    found = {MIXTURES: table(MIXTURE_COLUMNS, mixtures)} if mixtures else {}
    halves = [
        (run.key, run.size, run.repetition, *map(repr, (pair.between, pair.chance, *pair.nearest)), pair.images)
        for run in results
        if (pair := run.agreement) is not None
    ]
    if halves:
        found[HALVES] = table(HALF_COLUMNS, halves)
    if not phases:
        return found
    return found | {PHASES: table(PHASE_COLUMNS, phases), GAPS: table(GAP_COLUMNS, gaps)}


def with_watched(results: Mapping[str, Result], folder: Path) -> dict[str, Result]:
    """Results by key with what the tables in a report's folder say of them; as they are where there are no tables.

    Args:
        results: The runs of `runs.csv`.
        folder: The report's.

    Raises:
        InputError: A table is damaged; it is named.
    """
    found = dict(results)
    if (folder / MIXTURES).is_file():
        for row in _rows(folder / MIXTURES):
            with parsing(folder / MIXTURES, "the runs of mixtures"):
                values = {name: float(row[name]) for name in MIXTURE_COLUMNS[2:]}
                if (key := row["key"]) in found:
                    found[key] = replace(found[key], mixture=MixtureResult(int(row["components"]), **values))
    if (folder / HALVES).is_file():
        for row in _rows(folder / HALVES):
            with parsing(folder / HALVES, "the pairs of networks"):
                nearest = float(row["nearest_first"]), float(row["nearest_second"])
                read = Agreement(float(row["between"]), float(row["chance"]), nearest, int(row["seeds"]))
                if (key := row["key"]) in found:
                    found[key] = replace(found[key], agreement=read)
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
