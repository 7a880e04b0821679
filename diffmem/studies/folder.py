"""A folder in which studies are run: their trials, one ledger, and what each study is, so that a report needs no more.

`studies/<name>.json` holds a study, `trials/<key>/` a trial, `ledger.sqlite` the states. Studies that share a folder
share the trials that they have in common.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from diffmem.atomic_io import atomic_write, output_lock
from diffmem.errors import InputError
from diffmem.executors import Executor
from diffmem.inert.boundary import parsing
from diffmem.inert.documents import read_json
from diffmem.progress import Progress, silent
from diffmem.studies.findings import Findings, find_among
from diffmem.studies.ledger import FAILED, FILE, Ledger
from diffmem.studies.measure import Result, read_result
from diffmem.studies.run import Outcome, run_trials, trials_folder
from diffmem.studies.study import Study
from diffmem.studies.trial import Trial

STUDIES = "studies"


def run_studies(
    studies: Sequence[Study],
    root: str | Path,
    executor: Executor | None = None,
    *,
    retry: bool = False,
    on_trial: Callable[[Outcome], None] = lambda outcome: None,
    progress: Progress = silent,
) -> list[Outcome]:
    """Runs what is not done yet of some studies in a folder; see `run_trials`. The first repetition of every study
    comes before the second of any.

    Args:
        studies: What to run.
        root: Folder of the runs and the ledger.
        executor: See `diffmem.executors`; default: in this process.
        retry: Try again what failed for good.
        on_trial: Called with every run that ends here.
        progress: Called as `progress(stage, done, total)`.
    """
    root = Path(root)
    trials_folder(root)  # before anything is written
    (root / STUDIES).mkdir(parents=True, exist_ok=True)
    for study in studies:
        atomic_write(root / STUDIES / f"{study.name}.json", json.dumps(study.to_json(), indent=1) + "\n")
    trials = all_trials(studies)
    with output_lock(root, shared=True):
        if retry:
            Ledger(root).retry([trial.key for trial in trials])
        return run_trials(trials, root, executor, on_trial=on_trial, progress=progress)


def all_trials(studies: Sequence[Study]) -> list[Trial]:
    """The trials of some studies, each once, first repetitions first."""
    trials = {trial.key: trial for study in studies for trial in study.trials()}
    return sorted(trials.values(), key=lambda trial: trial.repetition)


def read_studies(root: str | Path, names: Sequence[str] = ()) -> list[Study]:
    """The studies that were run in `root`, those of some names, or all. Raises InputError where there are none."""
    root = Path(root)
    paths = [root / STUDIES / f"{name}.json" for name in names] or sorted((root / STUDIES).glob("*.json"))
    if not paths:
        raise InputError(f"{root}: no study was run there: run one with `diffmem study run NAME --out {root}`")
    found = []
    for path in paths:
        if not path.is_file():
            there = ", ".join(sorted(each.stem for each in (root / STUDIES).glob("*.json"))) or "none"
            raise InputError(f"{root}: study {path.stem} was not run there; those that were: {there}")
        with parsing(path, "the description of a study"):
            found.append(Study.from_json(read_json(path)))
    return found


def find_all(studies: Sequence[Study], root: str | Path) -> list[Findings]:
    """What the runs in `root` say of some studies: a cell has all of its runs that lie there, whichever study they were
    made for."""
    root = Path(root)
    results: dict[str, Result] = {}
    for folder in sorted(trials_folder(root).glob("*")):
        if (result := read_result(folder)) is not None:
            results[result.key] = result
    errors: dict[str, str] = {}
    if (root / FILE).exists():
        errors = {entry.key: entry.error or "" for entry in Ledger(root).entries().values() if entry.state == FAILED}
    return find_among(studies, results, errors)


def report_studies(root: str | Path, folder: str | Path | None = None, names: Sequence[str] = ()) -> Path:
    """Writes the report of studies and returns the page's path.

    Args:
        root: The folder that they were run in.
        folder: Folder of the report; default `root`/report.
        names: Names of the studies; all, where none are given.
    """
    from diffmem.studies.report import again, is_report, write_studies

    root = Path(root)
    if not (root / STUDIES).is_dir() and is_report(root):
        return again(root, root if folder is None else Path(folder), names)
    folder = root / "report" if folder is None else Path(folder)
    return write_studies(find_all(read_studies(root, names), root), root, folder)
