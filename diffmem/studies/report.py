"""Studies and searches for people and scripts: one self-contained page, and the same as CSV and JSON."""

from __future__ import annotations

import csv
import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmem.atomic_io import atomic_set, check_output_folder, output_lock
from diffmem.data.subsets import RANDOM_LABEL_SEED
from diffmem.errors import InputError
from diffmem.html_report import template, write_texts
from diffmem.inert.boundary import parsing
from diffmem.inert.documents import read_json
from diffmem.integrity import NoChecksumError, load_arrays
from diffmem.memorization.criterion_detector import DEFAULT
from diffmem.plotting import grid, picture_url
from diffmem.studies.analysis import POOLED, informative, logit_of
from diffmem.studies.checks import KINDS, OTHER_CRITERIA, Check
from diffmem.studies.figures import draw_emm, draw_lengths, draw_study, draw_verdicts
from diffmem.studies.findings import Answer, Findings, find_among
from diffmem.studies.laws.figures import draw_law
from diffmem.studies.laws.tables import watched_tables, with_watched
from diffmem.studies.leveling import SHORT
from diffmem.studies.measure import GALLERY, Result, SnapshotResult, store_result
from diffmem.studies.run import trial_folder, trials_folder
from diffmem.studies.study import Study
from diffmem.studies.trial import SECOND_SEED, Setting, Trial
from diffmem.text import counted, table
from diffmem.training import differences

if TYPE_CHECKING:
    from diffmem.studies.emm import EMM

Picture = tuple[str, str, int, int]  # caption, data URL, how many of the images are copies, how many there are
SHOWN = 8  # generated images per variant in a gallery
RUN_COLUMNS = (
    "study", "variant", "size", "repetition", "key", "r_mem", "low", "high", "count", "total", "images", "epochs",
    "best_images", "parameters", "training_seconds", "sampling_seconds", "device", "threads", "versions",
    "looks", "leveled_off", "snapshots", "checks", "training_set", "arithmetic", "code",
)  # fmt: skip
_NEEDED = {
    "study", "variant", "size", "repetition", "key", "count", "total", "images", "epochs", "best_images", "parameters",
    "training_seconds", "sampling_seconds",
}  # fmt: skip
HIGHEST = "highest R_mem"  # over a run's snapshots
STUDIES, RUNS, EMM_FILE, PAGE = "studies.json", "runs.csv", "emm.json", "report.html"
VERDICTS = "verdicts.svg"
RESULTS = "results.json"  # of a page over several reports: their names in order, and their verdicts
REPORT = "report"  # a report's folder in that of its runs


def published() -> dict[str, Any]:
    """The paper's numbers (`published.json`)."""
    return json.loads((resources.files("diffmem.studies") / "published.json").read_text(encoding="utf-8"))


def write_studies(
    found: Sequence[Findings],
    root: Path,
    folder: Path,
    galleries: Mapping[str, list[Picture]] | None = None,
    mixed: bool = False,
) -> Path:
    """Writes `report.html`, `runs.csv`, `studies.json` and `verdicts.svg` into `folder`, and for laws the tables of
    what was watched and each law's figure; returns the page's path.

    root: the studies' folder, in which galleries lie. galleries: by the study's name, instead of those. mixed: fit the
    mixed model of statsmodels too.
    """
    check_output_folder(folder)
    models = [_mixed(each) if mixed else None for each in found]
    if galleries is None:
        galleries = {each.study.name: _gallery(each, root) for each in found}
    numbers, by_criteria = published(), by_other_criteria(found)
    others = [{name: judged[place] for name, judged in by_criteria.items()} for place in range(len(found))]
    # What all studies note is said once.
    shared = [note for note in found[0].study.notes if all(note in each.study.notes for each in found)] if found else []
    sections = [
        {**_section(each, galleries.get(each.study.name, []), numbers, other), "mixed": model}
        for each, other, model in zip(found, others, models, strict=True)
    ]
    results = {result.key: result for each in found for result in each.runs}.values()
    verdicts = draw_verdicts(found)
    page = template("diffmem.studies", "studies.html.j2").render(
        studies=sections,
        shared=shared,
        source=numbers["source"],
        runs=len(results),
        seconds=sum(result.seconds for result in results),
        highest=HIGHEST,
        pooled=POOLED,
        verdicts=verdicts,
        spread=found[0].cells[0].spread if found and found[0].cells else None,
        made_with=made_with(results),
    )
    described = [_as_json(each, other) for each, other in zip(found, others, strict=True)]
    for each, model in zip(described, models, strict=True):
        each |= {} if model is None else {"mixed_model": model}
    summary = json.dumps(described, separators=(",", ":")) + "\n"
    runs = _table(RUN_COLUMNS, (row for each in found for row in _rows(each)))
    drawings = {f"{each['study'].name}.svg": each["plot"] for each in sections if each["found"].law and each["plot"]}
    drawings |= {VERDICTS: verdicts} if verdicts else {}
    tables = watched_tables(results)
    with atomic_set(folder) as stage:
        write_texts(stage, {STUDIES: summary, RUNS: runs, **tables, **drawings, PAGE: page})
    return folder / PAGE


def _mixed(found: Findings) -> dict[str, Any]:
    """What the mixed model says of a study: its spread, and each question's difference; or why it cannot be fitted."""
    from diffmem.studies.mixed import mixed_model

    cells = found.by_place
    try:
        model = mixed_model(cells)
    except InputError as error:
        return {"error": str(error)}
    questions: list[dict[str, Any] | None] = []
    for answer in found.answers:
        estimate = answer.estimate
        weights = found.study.contrast(answer.question, set(cells))
        if estimate is None or estimate.logit is None or not weights:
            questions.append(None)
            continue
        effect = model.effect(informative(answer.question, weights, cells)[0], estimate.logit.freedom)
        questions.append({"difference": effect.estimate, "error": effect.error, "interval": effect.interval()})
    return {**model.to_json(), "questions": questions, "error": None}


def write_emm(emm: EMM, folder: Path, running: bool = False) -> Path:
    """Writes `emm.json`, `runs.csv`, `emm.svg` and `report.html` into `folder` and returns the page's path. running:
    the search has not ended; the page says so and reloads itself."""
    check_output_folder(folder)
    drawing = draw_emm(emm)
    columns = (*(name for name in RUN_COLUMNS if name not in ("study", "variant")), "decided", "censored")
    rows = [{**_row(result), "decided": result.decided, "censored": result.censored} for result in emm.results]
    texts = {EMM_FILE: _as_text(emm), RUNS: _table(columns, rows), "emm.svg": drawing}
    with atomic_set(folder) as stage:
        write_texts(stage, texts | {PAGE: _emm_page(emm, drawing, running)})
    return folder / PAGE


def _emm_page(emm: EMM, drawing: str, running: bool = False) -> str:
    return template("diffmem.studies", "emm.html.j2").render(
        emm=emm, plot=drawing, running=running, made_with=made_with(emm.results)
    )


def _as_text(emm: EMM) -> str:
    return json.dumps(emm.to_dict(), indent=1) + "\n"


def is_results(folder: str | Path) -> bool:
    """Whether `folder` holds a page over several reports."""
    return (Path(folder) / RESULTS).is_file()


def report_names(folder: Path) -> list[str]:
    """The names of the reports that a page over several is about, in order."""
    with parsing(folder / RESULTS, "the list of reports"):
        return [str(each["name"]) for each in read_json(folder / RESULTS)]


def check_one_report(folder: Path) -> None:
    """Raises InputError where `folder` holds a page over several reports, naming one of them."""
    if is_results(folder):
        raise InputError(f"{folder} has several reports: name one of them, such as {folder / report_names(folder)[0]}")


def is_report(folder: Path) -> bool:
    """Whether `folder` holds a report from which `again` makes its pages."""
    return (folder / STUDIES).is_file() or (folder / EMM_FILE).is_file()


def again(source: Path, folder: Path, names: Sequence[str] = (), mixed: bool = False) -> Path:
    """Makes the report in `source` again, in `folder`, with what is computed and shown today, from its own files.

    The page of studies comes from `studies.json` and `runs.csv`, its pictures from the page that lies there; that of a
    search for EMM from `emm.json`: as `report.html`, or, beside studies, as `emm.html`. names: of studies, or all.
    mixed: as for `write_studies`. Returns the page's path. Raises InputError, naming the file, where one is missing or
    damaged.
    """
    from diffmem.studies.emm import EMM

    emm = None
    if (source / EMM_FILE).is_file():
        emm = EMM.from_dict(read_json(source / EMM_FILE), source / EMM_FILE)
    if not (source / STUDIES).is_file() and emm is not None:
        return write_emm(emm, folder)
    found, galleries = _read_report(source)
    if missing := set(names) - {each.study.name for each in found}:
        raise InputError(f"{source}: its report has no study {', '.join(sorted(missing))}")
    chosen = [each for each in found if not names or each.study.name in names]
    page = write_studies(chosen, source, folder, galleries, mixed)
    if emm is not None:
        with atomic_set(folder) as stage:
            write_texts(stage, {EMM_FILE: _as_text(emm), "emm.html": _emm_page(emm, draw_emm(emm))})
    return page


def import_report(source: Path, root: Path) -> tuple[int, int]:
    """Takes the runs of a report over into a folder of runs, so that they are not made again there: their numbers,
    without networks and images. What lies there already stays.

    Args:
        source: A report's folder, with `studies.json` and `runs.csv`.
        root: The folder of runs.

    Returns:
        (how many were taken over, how many the report has).

    Raises:
        InputError: A file is missing or damaged; it is named.
    """
    check_one_report(source)
    _, runs, _ = _read_runs(source)
    taken = 0
    with output_lock(root, shared=True):
        for trial, result in runs.values():
            folder = trial_folder(root, trial)
            if not folder.exists():
                store_result(trial, result, folder)
                taken += 1
    return taken, len(runs)


def recorded_runs(source: Path) -> dict[str, tuple[Trial, Result]]:
    """The runs of a report, by key. Raises InputError, naming the file, where one is missing or damaged."""
    check_one_report(source)
    if not (source / STUDIES).is_file():
        raise InputError(f"{source}: neither a folder of runs nor a report of studies (it has no {STUDIES})")
    return _read_runs(source)[1]


def read_report(source: Path) -> list[Findings]:
    """What a report's files say today of its studies. Raises InputError, naming the file, where one is damaged."""
    return _read_report(source)[0] if (source / STUDIES).is_file() else []


def _read_report(source: Path) -> tuple[list[Findings], dict[str, list[Picture]]]:
    """What a report's files say today of its studies, and the pictures on its page."""
    studies, runs, errors = _read_runs(source)
    galleries = _galleries((source / PAGE).read_text(encoding="utf-8")) if (source / PAGE).is_file() else {}
    return find_among(studies, {key: result for key, (_, result) in runs.items()}, errors), galleries


def _read_runs(source: Path) -> tuple[list[Study], dict[str, tuple[Trial, Result]], dict[str, str]]:
    """A report's studies, and by key its runs and the errors of those that failed."""
    with parsing(source / STUDIES, "the findings of studies"):
        described = read_json(source / STUDIES)
        studies = [Study.from_json(each["study"]) for each in described]
        trials = {
            (study.name, variant.name, trial.size): trial
            for study in studies
            for variant, trial in replace(study, repetitions=1).cells()
        }
        errors = {}
        for each in described:
            for failed in each["failures"]:
                trial = trials[each["study"]["name"], failed["variant"], failed["size"]]
                errors[replace(trial, repetition=failed["repetition"]).key] = failed["error"]
    runs = {}
    with parsing(source / RUNS, "the runs of studies"), open(source / RUNS, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if lacking := _NEEDED - set(reader.fieldnames or ()):
            raise InputError(f"it has no column {', '.join(sorted(lacking))}")
        for row in reader:
            if None in row.values():
                raise InputError(f"line {reader.line_num} is too short")
            trial = replace(trials[row["study"], row["variant"], int(row["size"])], repetition=int(row["repetition"]))
            runs[trial.key] = trial, _result(row, trial)
    listed = {key for each in described for cell in each["cells"] for key in cell.get("runs", ())}
    if lost := listed - set(runs):
        raise InputError(
            f"{source / RUNS}: {counted(len(lost), 'run')} of {len(listed):,} that {STUDIES} lists are not in it, such "
            f"as {min(lost)}: restore the table, or rebuild the report from the folder of runs"
        )
    watched = with_watched({key: result for key, (_, result) in runs.items()}, source)
    return studies, {key: (trial, watched[key]) for key, (trial, _) in runs.items()}, errors


def _result(row: Mapping[str, str], trial: Trial) -> Result:
    """The result of a line of `runs.csv`; those of earlier versions say nothing of the snapshots but how many there
    were."""
    if row["key"] != trial.key:
        raise InputError(f"run {row['key']} is not the one of {row['study']}, {row['variant']}: that is {trial.key}")
    versions = dict(each.rsplit(" ", 1) for each in (row.get("versions") or "").split("; ") if each)
    snapshots = []
    for each in (row.get("snapshots") or "").split():
        images, count, total = map(int, re.split("[:/]", each))
        snapshots.append(SnapshotResult(images, images / trial.size, math.nan, count, total, math.nan, math.nan))
    return Result(
        trial.key, trial.size, trial.repetition, count=int(row["count"]), total=int(row["total"]), decided=None,
        censored=False, images=int(row["images"]), epochs=float(row["epochs"]), best_images=int(row["best_images"]),
        parameters=int(row["parameters"]), training_seconds=float(row["training_seconds"]),
        sampling_seconds=float(row["sampling_seconds"]), training_set=row.get("training_set") or "",
        snapshots=tuple(snapshots), versions=versions, looks=int(row.get("looks") or trial.setting.snapshots),
        level_off=trial.setting.level_off, device=row.get("device") or None,
        threads=int(row.get("threads") or 0) or None,
        checks=tuple(map(Check.from_text, (row.get("checks") or "").split())),
        arithmetic=row.get("arithmetic") or None, code=row.get("code") or None,
        tabled=(float(row["low"]), float(row["high"])) if row.get("low") else None,
    )  # fmt: skip


def _galleries(page: str) -> dict[str, list[Picture]]:
    """The pictures of each study on a page of `write_studies`."""
    found = {}
    for section in page.split('<h2 id="')[1:]:
        figures = re.findall(
            r'<figure><img src="(data:[^"]*)".*?<figcaption>(.*?): (\d+) of these (\d+) are copies', section, re.DOTALL
        )
        name = html.unescape(section.partition('"')[0])
        found[name] = [(html.unescape(text), url, int(copies), int(images)) for url, text, copies, images in figures]
    return found


def made_with(results: Iterable[Result]) -> list[tuple[str, int]]:
    """On what runs were made, and how many on each: versions, device and threads, in words, the most frequent first."""

    def words(result: Result) -> str:
        parts = [", ".join(f"{name} {version}" for name, version in result.versions.items())]
        device = {"cpu": "on the CPU", "cuda": "on a GPU"}.get(result.device or "", result.device)
        parts += [device or "", "" if result.threads is None else counted(result.threads, "thread")]
        return ", ".join(part for part in parts if part) or "versions and device not recorded"

    return Counter(map(words, results)).most_common()


def by_other_criteria(found: Sequence[Findings]) -> dict[str, list[Findings]]:
    """What the same runs say of the same studies where R_mem is the highest over the snapshots, if it is read at one
    length, and by each other criterion: of the best snapshot's images (see `diffmem.studies.checks`), with verdicts
    that hold together as those by the rule do. None of criteria by which no run was judged."""
    results = {result.key: result for each in found for result in each.runs}
    others = {}
    if any(each.study.read_at is not None for each in found):
        others[HIGHEST] = find_among([replace(each.study, read_at=None) for each in found], results, {})
    for name in OTHER_CRITERIA:
        judged = {
            key: replace(result, count=check.generated[0], total=check.generated[1], snapshots=(), looks=1, tabled=None)
            for key, result in results.items()
            for check in result.checks
            if check.criterion == name
        }
        if judged:
            others[name] = find_among([replace(each.study, read_at=None) for each in found], judged, {})
    return others


def _checked(found: Findings) -> list[dict[str, Any]]:
    """What each criterion says in each cell, as shares: of generated, held-out and planted images."""
    rows = []
    for cell in found.cells:
        checks = [check for result in cell.results for check in result.checks]
        shares = {
            name: [_share([getattr(check, kind) for check in checks if check.criterion == name]) for kind in KINDS]
            for name in (DEFAULT, *OTHER_CRITERIA)
            if any(check.criterion == name for check in checks)
        }
        if shares:
            rows.append({"variant": cell.variant.name, "size": cell.size, "shares": shares})
    return rows


def _share(pairs: Sequence[tuple[int, int]]) -> float | None:
    total = sum(total for _, total in pairs)
    return sum(count for count, _ in pairs) / total if total else None


def _section(
    found: Findings, gallery: list[Picture], numbers: Mapping[str, Any], others: Mapping[str, Findings]
) -> dict[str, Any]:
    """What the page shows of one study."""
    return {
        "found": found,
        "study": found.study,
        "plot": _drawing(found, numbers) if found.cells else "",  # of a law also a file of its own
        "unplanned": bool(found.missing and found.runs and found.study.max_repetitions is None and found.answers),
        "unread": _unread(found),
        "lengths": "" if found.law else draw_lengths(found),
        "gallery": gallery,
        "checked": _checked(found),
        "others": {name: each for name, each in others.items() if each.cells},
        "evidence": [_evidence(found, answer) for answer in found.answers],
        "recipe": json.dumps(found.study.variants[0].setting.to_json(), indent=1),
        "seeds": {v.name: _seeds(v.setting) for v in found.study.variants},
        "differences": {v.name: _changes(found.study, v.setting.to_json()) for v in found.study.variants},
    }


def _unread(found: Findings) -> str:
    """What to do about runs that are done, but were not audited where the study reads R_mem."""
    audits = sorted({round(each.epochs) for result in found.unread for each in result.snapshots})
    if not audits:
        return ""
    return (
        f"{counted(len(found.unread), 'run')} of this study {'is' if len(found.unread) == 1 else 'are'} done, but none "
        f"was audited after {found.study.read_at:,g} epochs, where R_mem is to be read. Let the study read it at "
        f"one of {', '.join(f'{each:,}' for each in audits)} (read_at): nothing is trained again for that."
    )


def _evidence(found: Findings, answer: Answer) -> list[dict[str, Any]]:
    """The runs that a question's verdict rests on, a row per repetition: its value, in logit R_mem, and of each cell
    its weight and its run; empty where no repetition has all of its cells."""
    if answer.estimate is None:
        return []
    cells = found.by_place
    weights = informative(answer.question, found.study.contrast(answer.question, set(cells)), cells)[0]
    common = set.intersection(*(set(cells[place]) for place in weights)) if weights else set()
    rows = []
    for repetition in sorted(common)[: answer.estimate.repetitions]:
        runs = [(weight, name, size, cells[name, size][repetition]) for (name, size), weight in weights.items()]
        value = sum(weight * logit_of(result)[0] for weight, *_, result in runs)
        rows.append({"repetition": repetition, "value": value, "runs": runs})
    return rows


def _seeds(setting: Setting) -> str:
    """What of a run its repetition r decides, in words."""
    if setting.mixture is not None:
        return "seed r of everything"
    parts = ["weights, order and noise: seed r", "images: the first of each class for r = 0, else chosen by seed r"]
    if (setting.data.labels or "none").startswith("random"):
        parts.append(f"random labels: seed {RANDOM_LABEL_SEED} + r")
    if setting.halves == "both":
        parts.append(f"the second network's seed: {SECOND_SEED:,} + r")
    return "; ".join([*parts, f"generated images: seeds 0 to {setting.samples - 1:,}"])


def _drawing(found: Findings, numbers: Mapping[str, Any]) -> str:
    return draw_study(found, numbers) if found.law is None else draw_law(found.law, found.runs)


def _changes(study: Study, setting: Mapping[str, Any]) -> str:
    """In what a variant's setting is not that of the first one, as dotted names."""
    first = study.variants[0].setting.to_json()
    return ", ".join(f"{name} = {json.dumps(ours)}" for name, ours, _ in differences(setting, first))


def _gallery(found: Findings, root: Path) -> list[Picture]:
    """Per variant: generated images above the training images nearest to them."""
    pictures = []
    for variant in found.study.variants:
        cells = [cell for cell in found.cells if cell.variant.name == variant.name]
        if not cells:
            continue
        # Where some are copies and some are not, there is most to see.
        cell = min(cells, key=lambda cell: abs(cell.r_mem - 0.5))
        paths = [trials_folder(root) / result.key / GALLERY for result in cell.results]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            continue
        try:
            stored = load_arrays(path, "delete it, and the report is made without its images")
        except NoChecksumError:
            continue
        generated, nearest, memorized = (stored[name][:SHOWN] for name in ("generated", "nearest", "memorized"))
        # A frame of gray keeps neighbors apart.
        framed = np.pad(np.concatenate([generated, nearest]), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=190)
        picture = grid(framed, scale=1, columns=len(generated))
        url = picture_url(picture, lossless=max(picture.size) <= 256)
        pictures.append((f"{variant.name}, N = {cell.size:,}", url, int(memorized.sum()), len(memorized)))
    return pictures


def _rows(found: Findings) -> list[dict[str, Any]]:
    return [
        {"study": found.study.name, "variant": cell.variant.name, **_row(result)}
        for cell in found.cells
        for result in cell.runs
    ]


def _row(result: Result) -> dict[str, Any]:
    low, high = result.interval
    numbers = {name: f"{value:.6g}" for name, value in (("r_mem", result.r_mem), ("epochs", result.epochs))}
    ends = {"low": repr(float(low)), "high": repr(float(high))}  # read again, so in full
    seconds = {name: repr(float(getattr(result, name))) for name in ("training_seconds", "sampling_seconds")}
    versions = "; ".join(f"{name} {version}" for name, version in result.versions.items())
    return {
        **vars(result),
        **numbers,
        **ends,
        **seconds,
        "versions": versions,
        "leveled_off": "" if result.level.state == SHORT else str(result.level),
        "snapshots": " ".join(f"{each.images}:{each.count}/{each.total}" for each in result.snapshots),
        "checks": " ".join(check.to_text() for check in result.checks),
        "arithmetic": result.arithmetic or "",
        "code": result.code or "",
    }


def _answer_as_json(answer: Answer) -> dict[str, Any]:
    estimate = answer.estimate
    scales = {}
    for scale in ("logit", "points"):
        effect = None if estimate is None else getattr(estimate, scale)
        scales[scale] = effect and {
            "difference": answer.difference(scale),
            "error": effect.error,
            "freedom": effect.freedom,
            "interval": answer.interval(scale),
            "simultaneous": answer.simultaneous(scale),
        }
    return {
        "question": asdict(answer.question),
        "verdict": answer.verdict,
        "sizes": list(answer.sizes),
        "repetitions": 0 if estimate is None else estimate.repetitions,
        "method": None if estimate is None else estimate.method,
        "scale": None if estimate is None else estimate.scale,
        **scales,
        "p": answer.p,
        "p_adjusted": answer.adjusted,
        "family": answer.family,
        "looks": list(answer.looks),
    }


def _as_json(found: Findings, others: Mapping[str, Findings]) -> dict[str, Any]:
    return {
        "study": found.study.to_json(),
        "cells": [
            {
                "variant": cell.variant.name,
                "size": cell.size,
                "r_mem": cell.r_mem,
                "highest": cell.highest,
                "interval": list(cell.interval),
                "runs": [result.key for result in cell.results],
            }
            for cell in found.cells
        ],
        "emm": {name: {"emm": size, "interval": list(interval)} for name, (size, interval) in found.emm.items()},
        "questions": [_answer_as_json(answer) for answer in found.answers],
        "other_criteria": {name: [_answer_as_json(answer) for answer in each.answers] for name, each in others.items()},
        **({} if found.law is None else {"law": found.law.to_json()}),
        "failures": [
            dict(zip(("variant", "size", "repetition", "error"), each, strict=True)) for each in found.failures
        ],
        "missing": found.missing,
    }


def _table(columns: Sequence[str], rows: Any) -> str:
    return table(columns, ([row[name] for name in columns] for row in rows))
