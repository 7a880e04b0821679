"""A report is made again from its own tables, runs.csv and studies.json, as it is made from the runs."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffmem.cli.study import study_command
from diffmem.errors import InputError
from diffmem.studies import report_studies, run_studies
from diffmem.studies.folder import find_all
from diffmem.studies.presets import build
from diffmem.studies.report import read_report

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "studies"
FOLDER = RESULTS / "digits-fast"  # whose runs took hours
NAMES = ["size", "ema"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A report of two studies and of a search, which holds their runs only."""
    chosen = report_studies(FOLDER, tmp_path_factory.mktemp("chosen"), NAMES).parent
    return report_studies(chosen, tmp_path_factory.mktemp("made")).parent


@pytest.fixture(scope="module")
def again(made, tmp_path_factory) -> Path:
    """The same, made of that one."""
    return report_studies(made, tmp_path_factory.mktemp("again")).parent


def test_one_trial_is_one_cell_in_every_study(made):
    """At N = 30 of the reference there is one R_mem, of three runs, whichever study shows it."""
    studies = {study["study"]["name"]: study for study in json.loads((made / "studies.json").read_text())}
    assert studies.keys() == set(NAMES)
    cells = [
        next(cell for cell in studies[name]["cells"] if (cell["variant"], cell["size"]) == (variant, 30))
        for name, variant in (("size", "reference"), ("ema", "0.99"))
    ]
    assert len(cells[0]["runs"]) == 3
    assert cells[0]["runs"] == cells[1]["runs"]
    assert (cells[0]["r_mem"], cells[0]["interval"]) == (cells[1]["r_mem"], cells[1]["interval"])


def test_imported_runs_are_not_made_again(made, tmp_path):
    """The published runs of digits count as done under today's presets of the same settings."""
    with open(made / "runs.csv", newline="") as file:
        counts = {row["key"]: int(row["count"]) for row in csv.DictReader(file)}
    runner, all_of = CliRunner(), f"of {len(counts)} runs were imported"
    for words in (f"{len(counts)} {all_of}", f"0 {all_of}; the others lie there already"):
        ended = runner.invoke(study_command, ["import", str(made), "--out", str(tmp_path)])
        assert (ended.exit_code, ended.output.strip()) == (0, words)
    study = replace(build("size", "digits-fast"), repetitions=2)
    outcomes = run_studies([study], tmp_path, on_trial=lambda outcome: pytest.fail("a run was made again"))
    assert {each.trial.key: each.result.count for each in outcomes} == {
        trial.key: counts[trial.key] for trial in study.trials()
    }
    (found,) = find_all([study], tmp_path)
    assert found.missing == 0
    assert found.cell("reference", 30).r_mem == pytest.approx((0.812 + 0.916 + 0.946) / 3)


@pytest.mark.parametrize("name", ["report.html", "emm.html", "studies.json", "runs.csv", "emm.json"])
def test_what_is_made_again_is_the_same(name, made, again):
    first, second = ((folder / name).read_text() for folder in (made, again))
    if name.endswith(".json"):
        close(json.loads(second), json.loads(first))
    else:
        assert second == first


def close(made, committed):
    """Asserts that two JSON values are equal, numbers but for rounding."""
    if isinstance(made, dict):
        assert made.keys() == committed.keys()
        for key in made:
            close(made[key], committed[key])
    elif isinstance(made, list):
        assert len(made) == len(committed)
        for ours, theirs in zip(made, committed, strict=True):
            close(ours, theirs)
    else:
        assert made == (pytest.approx(committed, rel=1e-6) if isinstance(made, float) else committed)


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in RESULTS.rglob("studies.json")), ids=lambda path: path.name
)
def test_every_published_report_can_be_read(folder):
    with open(folder / "runs.csv", newline="") as file:
        keys = {row["key"] for row in csv.DictReader(file)}
    assert {result.key for found in read_report(folder) for result in found.runs} == keys


def test_pages_show_pictures_and_say_on_what_runs_were_made(made):
    page = (made / "report.html").read_text()
    assert page.count("<svg") == len(NAMES) + 1  # and the verdicts of all
    assert re.search(r"\d+ runs?: (versions and device not recorded|diffmem [\d.]+, torch)", page)
    assert "is the highest of 3 estimates" in (made / "emm.html").read_text()


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("runs.csv", lambda text: text.replace("1ab14034e048780d", "1ab14034e048780e"), r"runs.csv.*1ab14034e048780e"),
        ("runs.csv", lambda text: text.replace(",500,", ",many,"), r"runs.csv: not the runs of studies"),
        ("runs.csv", lambda text: text.replace(",size,", ",sizes,", 1), r"runs.csv: it has no column size"),
        ("runs.csv", lambda text: text[: text.rindex(",", 0, -99)], r"runs.csv: line \d+ is too short"),
        (
            "runs.csv",
            lambda text: "".join(text.splitlines(keepends=True)[:9]),
            r"73 runs of 81 that studies.json lists are not in it",
        ),
        ("studies.json", lambda text: text[:-9], r"studies.json: not JSON"),
        ("emm.json", lambda text: text.replace('"search"', '"sought"'), r"emm.json: not the result of a search"),
    ],
)
def test_a_damaged_report_is_one_line(file, change, words, tmp_path):
    for name in ("runs.csv", "studies.json", "emm.json"):
        shutil.copy(FOLDER / name, tmp_path)
    (tmp_path / file).write_text(change((tmp_path / file).read_text()))
    with pytest.raises(InputError, match=words):
        report_studies(tmp_path)


def test_a_page_over_several_reports_is_not_one_report(tmp_path):
    """Its plan and its import name one of them; its verdicts say how they were decided."""
    for arguments in (
        ["import", str(RESULTS), "--out", str(tmp_path / "o")],
        ["plan", "width", "--runs", str(RESULTS)],
    ):
        with pytest.raises(InputError, match=r"has several reports: name one of them, such as .*digits"):
            CliRunner().invoke(study_command, arguments, standalone_mode=False, catch_exceptions=False)
    found = {report["name"]: report["verdicts"] for report in json.loads((RESULTS / "results.json").read_text())}
    decided = [each for each in found["digits"] if each["verdict"] in ("holds", "contrary")]
    assert decided
    for each in decided:
        assert each["p"] <= 0.05
        assert each["method"] in ("pairs", "pooled spread")
        assert each[each["decided_by"]]["freedom"] >= 1
        assert each["repetitions"] <= each["planned"]
    assert all("asked: " in each["basis"] for each in found["laws"])
