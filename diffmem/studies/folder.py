"""A folder in which studies are run: their trials, one ledger, and what each study is, so that a report needs no more.

`studies/<name>.json` holds a study, `trials/<key>/` a trial, `ledger.sqlite` the states. Studies that share a folder
share the trials that they have in common.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from diffmem.atomic_io import atomic_write, output_lock
from diffmem.errors import InputError
from diffmem.executors import Executor
from diffmem.inert.boundary import parsing
from diffmem.inert.documents import read_json
from diffmem.progress import Progress, silent
from diffmem.studies.analysis import informative
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
    on_look: Callable[[list[Findings]], None] = lambda found: None,
    progress: Progress = silent,
) -> list[Outcome]:
    """Runs what is not done yet of some studies in a folder; see `run_trials`. The first repetition of every study
    comes before the second of any. Then, of studies with `max_repetitions`, the cells of questions that are still open
    get one more repetition at a time, until all are decided, or have so many.

    Args:
        studies: What to run.
        root: Folder of the runs and the ledger.
        executor: See `diffmem.executors`; default: in this process.
        retry: Try again what failed for good.
        on_trial: Called with every run that ends here.
        on_look: Called with what was found, before further repetitions are run.
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: The folder holds a study of the same name with another `max_repetitions`.
    """
    root = Path(root)
    trials_folder(root)  # before anything is written
    studies = [_as_planned(study, root) for study in studies]
    (root / STUDIES).mkdir(parents=True, exist_ok=True)
    for study in studies:
        atomic_write(root / STUDIES / f"{study.name}.json", json.dumps(study.to_json(), indent=1) + "\n")
    trials = all_trials(studies)
    with output_lock(root, shared=True):
        if retry:
            Ledger(root).retry([trial.key for trial in trials])
        outcomes = {o.trial.key: o for o in run_trials(trials, root, executor, on_trial=on_trial, progress=progress)}
        if any(study.max_repetitions for study in studies):
            names = {study.name for study in studies}
            while True:
                found = find_all(read_studies(root), root)  # verdicts hold for all questions of the folder together
                own = [each for each in found if each.study.name in names]
                on_look(own)
                further = {trial.key: trial for each in own for trial in further_trials(each)}
                more = [trial for key, trial in further.items() if key not in outcomes]
                if not more:
                    break
                made = run_trials(more, root, executor, on_trial=on_trial, progress=progress)
                outcomes |= {outcome.trial.key: outcome for outcome in made}
        return list(outcomes.values())


def _as_planned(study: Study, root: Path) -> Study:
    """The study, with the repetitions and `max_repetitions` under which it was begun in this folder: each look spends
    its share of the error by that plan."""
    path = root / STUDIES / f"{study.name}.json"
    if not path.is_file():
        return study
    (begun,) = read_studies(root, [study.name])
    if begun.max_repetitions is None:
        return study
    if study.max_repetitions in (None, begun.max_repetitions):
        return replace(study, repetitions=begun.repetitions, max_repetitions=begun.max_repetitions)
    raise InputError(
        f"study {study.name}: max_repetitions is {study.max_repetitions}, but it was begun in {root} with "
        f"{begun.max_repetitions}, by which its error is spent: keep that number, or use another folder"
    )


def further_trials(found: Findings) -> list[Trial]:
    """The trials of the next repetition of a study's open questions; none where all are decided, or have as many as the
    study may make. A repetition of which a run failed for good is left out."""
    study, trials = found.study, {}
    if study.max_repetitions is None:
        return []
    done = found.by_place
    failed = {(name, size, repetition) for name, size, repetition, _ in found.failures}
    by_name = {variant.name: variant for variant in study.variants}
    for answer in found.answers:
        weights = study.contrast(answer.question, set(done))
        if answer.decided or not weights:
            continue
        places = informative(answer.question, weights, done)[0]
        for repetition in range(study.max_repetitions):
            lacking = [place for place in places if repetition not in done[place]]
            if lacking and not any((*place, repetition) in failed for place in places):
                for name, size in lacking:
                    trials[name, size, repetition] = Trial(by_name[name].setting, size, repetition)
                break
    return list(trials.values())


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


def is_run_folder(root: str | Path) -> bool:
    """Whether runs lie in `root`, of studies or of a search for EMM, not a report alone."""
    return (Path(root) / STUDIES).is_dir() or trials_folder(root).is_dir()


def find_in(studies: Sequence[Study], root: str | Path) -> list[Findings]:
    """What the runs in `root`, a folder of runs or a report, say of some studies."""
    from diffmem.studies.report import check_one_report, is_report, read_report

    root = Path(root)
    check_one_report(root)
    if is_run_folder(root) or not is_report(root):
        return find_all(studies, root)
    results = {result.key: result for found in read_report(root) for result in found.runs}
    return find_among(studies, results, {})


def report_studies(
    root: str | Path, folder: str | Path | None = None, names: Sequence[str] = (), mixed: bool = False
) -> Path:
    """Writes the report of studies and returns the page's path.

    Args:
        root: The folder that they were run in.
        folder: Folder of the report; default `root`/report.
        names: Names of the studies; all, where none are given.
        mixed: Fit the mixed model of statsmodels too (`diffmem.studies.mixed`).
    """
    from diffmem.studies.report import REPORT, again, is_report, write_studies

    root = Path(root)
    if not is_run_folder(root) and is_report(root):
        return again(root, root if folder is None else Path(folder), names, mixed)
    folder = root / REPORT if folder is None else Path(folder)
    return write_studies(find_all(read_studies(root, names), root), root, folder, mixed=mixed)
