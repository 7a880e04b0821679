"""One page over several reports of studies: every verdict, with a link to the runs behind it.

A folder of results holds a folder per report, `index.html`, and `results.json`: the names of the reports in order, and
their verdicts. Each report is one family of questions: its verdicts hold together at 5 %, those of several reports by
themselves.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffmem.atomic_io import atomic_set
from diffmem.errors import InputError
from diffmem.html_report import template, write_texts
from diffmem.inert.boundary import parsing
from diffmem.inert.documents import read_json
from diffmem.studies.analysis import POOLED
from diffmem.studies.folder import is_run_folder, report_studies
from diffmem.studies.report import PAGE, REPORT, RESULTS, STUDIES, report_names

INDEX = "index.html"


def write_results(roots: Sequence[str | Path], folder: str | Path, mixed: bool = False) -> Path:
    """Writes the report of every folder of runs into a folder of its own, and the page over them.

    Args:
        roots: Folders of runs, or reports. Their names are those of the reports.
        folder: Of the results.
        mixed: As for `report_studies`.

    Returns:
        The page's path.

    Raises:
        InputError: Two folders have one name, or there are no studies in one; it is named.
    """
    folder, found = Path(folder), [Path(root) for root in roots]
    names = [_name(root) for root in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two folders of runs are named {twice[0]}: reports have their names, so rename one")
    for root, name in zip(found, names, strict=True):
        report_studies(root, folder / name, mixed=mixed)
    return _write_index(folder, names)


def results_again(source: str | Path, folder: str | Path | None = None, mixed: bool = False) -> Path:
    """Makes the reports and the page over them again from their own tables; arguments as for `write_results`."""
    source = Path(source)
    names = report_names(source)
    if missing := [name for name in names if not (source / name / STUDIES).is_file()]:
        raise InputError(f"{source / missing[0]}: {RESULTS} lists this report, but it has no {STUDIES}")
    return write_results([source / name for name in names], source if folder is None else folder, mixed)


def _name(root: Path) -> str:
    """What a report is called: as its folder of runs."""
    root = root.resolve()
    return root.parent.name if root.name == REPORT and is_run_folder(root.parent) else root.name


def _write_index(folder: Path, names: Sequence[str]) -> Path:
    reports = [_report(folder, name) for name in names]
    command = shlex.join(["diffmem", "study", "report", *(part for name in names for part in ("--runs", name))])
    runs = sum(report["runs"] for report in reports)
    tally = Counter(each["verdict"] for report in reports for each in report["verdicts"]).most_common()
    page = template("diffmem.studies", "results.html.j2").render(
        reports=reports, tally=tally, pooled=POOLED, page=PAGE, studies=STUDIES, command=command, runs=runs
    )
    summary = json.dumps(reports, indent=1, ensure_ascii=False) + "\n"
    with atomic_set(folder) as stage:
        write_texts(stage, {RESULTS: summary, INDEX: page})
    return folder / INDEX


def verdicts_at(page: Path) -> dict[str, list[dict[str, Any]]]:
    """The verdicts of a report's page, under "", or of a page over several, by the reports' names; of a page of a
    search for EMM none."""
    if page.name == INDEX:
        return {report["name"]: report["verdicts"] for report in read_json(page.with_name(RESULTS))}
    path = page.with_name(STUDIES)
    return {"": _verdicts(path)} if path.is_file() else {}


def _report(folder: Path, name: str) -> dict[str, Any]:
    """What the page says of a report."""
    path = folder / name / STUDIES
    with parsing(path, "the findings of studies"):
        runs = {run for each in read_json(path) for cell in each["cells"] for run in cell["runs"]}
    return {"name": name, "runs": len(runs), "verdicts": _verdicts(path)}


def _verdicts(path: Path) -> list[dict[str, Any]]:
    """The verdicts in a report's `studies.json`, on questions and laws."""
    verdicts = []
    with parsing(path, "the findings of studies"):
        for each in read_json(path):
            study = each["study"]["name"]
            for place, answer in enumerate(each["questions"], 1):
                planned = each["study"]["repetitions"], each["study"].get("max_repetitions")
                verdicts.append(
                    {
                        "study": study,
                        "text": answer["question"]["text"],
                        "verdict": answer["verdict"],
                        "p": answer["p_adjusted"],
                        **{scale: _scale(answer[scale]) for scale in ("logit", "points")},
                        "decided_by": answer["scale"],
                        "method": answer["method"],
                        "repetitions": answer["repetitions"],
                        "planned": planned[1] or planned[0],
                        "sizes": answer["sizes"],
                        "link": f"{study}-{place}" if answer["repetitions"] else study,
                    }
                )
            verdicts += [
                {
                    "study": study,
                    "text": test["text"],
                    "verdict": test["verdict"],
                    "p": test["adjusted"],
                    "basis": test.get("basis", ""),
                    "link": f"{study}-runs",
                }
                for test in each.get("law", {}).get("tests", ())
            ]
    return verdicts


def _scale(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of an effect on one scale what the page shows."""
    names = ("difference", "interval", "simultaneous", "freedom")
    return None if found is None else {name: found[name] for name in names}
