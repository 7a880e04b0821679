"""A recorded trial is run once more, and every count is compared with what was recorded.

A trial's result is decided by its setting, size and repetition, but for how sums are rounded: by the version of PyTorch
and of this code, by the processor's instruction set and by the number of threads, which is the trial's own. So on the
machine that a result was recorded on, every count must come out the same; elsewhere networks of the same recipe differ
by rounding, and R_mem by what runs of other seeds differ by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffmem.errors import InputError
from diffmem.inert.boundary import parsing
from diffmem.integrity import read_checked
from diffmem.studies.measure import RESULT, TRIAL, Result, read_result, run_trial
from diffmem.studies.trial import Trial
from diffmem.studies.watch import Watched

LEAST_KEY = 4  # characters by which a trial may be named


@dataclass(frozen=True)
class Count:
    """One number, as it was recorded and as it came out again."""

    name: str
    recorded: str
    again: str

    @property
    def same(self) -> bool:
        return self.recorded == self.again


@dataclass(frozen=True)
class Reproduction:
    """A trial that was run once more.

    Attributes:
        trial: The trial, as it was recorded.
        recorded: Its recorded result.
        again: The result of the run once more.
        counts: Every number that must be the same.
        circumstances: Versions, instruction set, device and threads that differ, or were not recorded.
    """

    trial: Trial
    recorded: Result
    again: Result
    counts: tuple[Count, ...]
    circumstances: tuple[Count, ...]

    @property
    def same(self) -> bool:
        """Whether every count is the same."""
        return all(count.same for count in self.counts)

    def to_json(self) -> dict[str, Any]:
        """Everything in plain JSON types."""
        return {
            "key": self.recorded.key,
            "same": self.same,
            "counts": [{**vars(count), "same": count.same} for count in self.counts],
            "circumstances": [vars(each) for each in self.circumstances],
            "trial": self.trial.to_json(),
        }


def recorded_trial(source: str | Path, key: str) -> tuple[Trial, Result]:
    """A trial that was recorded, and its result.

    Args:
        source: A folder of runs (of studies, or of a search for EMM), or a report.
        key: The trial's key, or the first characters of it.

    Raises:
        InputError: No trial, or several, have a key that begins so; the message lists some.
    """
    if len(key) < LEAST_KEY:
        raise InputError(f"run {key}: give at least {LEAST_KEY} characters of its key")
    known = dict(_recorded(Path(source), key))
    if not known:
        raise InputError(f"{source}: no finished run has a key that begins with {key}: runs.csv lists them")
    if len(known) > 1:
        raise InputError(f"{source}: several runs have a key that begins with {key}: {', '.join(sorted(known)[:5])}")
    return next(iter(known.values()))


def _recorded(source: Path, key: str) -> Iterator[tuple[str, tuple[Trial, Result]]]:
    """The finished trials whose key begins with `key`."""
    from diffmem.studies.folder import is_run_folder
    from diffmem.studies.report import recorded_runs
    from diffmem.studies.run import trials_folder

    if not is_run_folder(source):
        for name, (trial, result) in recorded_runs(source).items():
            if name.startswith(key):
                yield name, (trial, result)
        return
    for folder in sorted(trials_folder(source).glob(f"{key}*")):
        if not (folder / RESULT).is_file():
            continue
        found = read_result(folder)
        advice = "delete its folder to run it again"
        values = read_checked(folder / TRIAL, advice)
        with parsing(folder / TRIAL, "the description of a trial", advice):
            trial = Trial.from_json(values)
        if found is not None:
            yield found.key, (trial, found)


def reproduce(
    trial: Trial, recorded: Result, folder: str | Path, device: str = "auto", source: str | None = None
) -> Reproduction:
    """Runs a recorded trial once more, and compares.

    Args:
        trial: The trial.
        recorded: Its recorded result.
        folder: For the run; where it was interrupted there it continues, and where it lies there finished it is
            compared as it is.
        device: "cpu", "cuda", or "auto".
        source: Where the images lie here, if not where they lay; their fingerprint is compared.

    Raises:
        InputError: The images are not to be had; as `run_trial`.

    Example:
        >>> trial, recorded = recorded_trial("runs", "3f2a")  # doctest: +SKIP
        >>> reproduce(trial, recorded, "again").same  # doctest: +SKIP
        True
    """
    here = trial
    if source is not None:
        here = replace(trial, setting=replace(trial.setting, data=replace(trial.setting.data, source=source)))
    again = run_trial(here, folder, device)
    return Reproduction(trial, recorded, again, tuple(_counts(recorded, again)), tuple(_circumstances(recorded, again)))


def _counts(recorded: Result, again: Result) -> Iterator[Count]:
    """The numbers that must be the same, as far as they were recorded."""
    if recorded.training_set:
        yield Count("training images", recorded.training_set[:16], again.training_set[:16])
    if not recorded.snapshots:
        yield Count("copies", f"{recorded.count}/{recorded.total}", f"{again.count}/{again.total}")
    there = {each.images: each for each in again.snapshots}
    for each in recorded.snapshots:
        other, name = there.get(each.images), f"copies after {each.images:,} images"
        yield Count(name, f"{each.count}/{each.total}", "-" if other is None else f"{other.count}/{other.total}")
        if other is not None and each.copies is not None and other.copies is not None and each.count == other.count:
            marks = (hashlib.sha256(one.copies.encode()).hexdigest()[:8] for one in (each, other) if one.copies)
            yield Count(f"which of them, after {each.images:,} images", *marks)
    for images in sorted(there.keys() - {each.images for each in recorded.snapshots}) if recorded.snapshots else ():
        yield Count(f"copies after {images:,} images", "-", f"{there[images].count}/{there[images].total}")
    checked = {check.criterion: check for check in again.checks}
    for check in recorded.checks:
        found = checked.get(check.criterion)
        yield Count(
            f"by {check.criterion.replace('_', ' ')}, of sampled, held-out and planted images",
            _pairs(check.to_text()),
            "-" if found is None else _pairs(found.to_text()),
        )
    for each in recorded.snapshots:
        other = there.get(each.images)
        if each.watched is not None and other is not None and other.watched is not None:
            name = f"copies, spurious and generalizing images after {each.images:,} images"
            yield Count(name, _phases(each.watched), _phases(other.watched))
    if recorded.agreement is not None and again.agreement is not None:
        pairs = (recorded.agreement, again.agreement)
        yield Count("agreement of the halves", *(f"{pair.between:.6f}" for pair in pairs))
    if recorded.alarms is not None and again.alarms is not None:
        yield Count(
            "unseen images called copies", *("/".join(map(str, each.alarms or ())) for each in (recorded, again))
        )


def _phases(watched: Watched) -> str:
    return f"{watched.memorized}, {watched.spurious}, {watched.generalized}"


def _pairs(text: str) -> str:
    return text.partition(":")[2].replace(":", ", ")


def _circumstances(recorded: Result, again: Result) -> Iterator[Count]:
    """In what the machine and its software differ; a dash where it was not recorded."""
    for name in sorted(recorded.versions.keys() | again.versions.keys()):
        yield Count(name, recorded.versions.get(name, "-"), again.versions.get(name, "-"))
    for name in ("device", "threads", "arithmetic", "code"):
        yield Count(name, *(str(getattr(each, name) or "-") for each in (recorded, again)))
