"""A report is made again from its own tables, runs.csv and studies.json, as it is made from the runs."""

import json
import re
import shutil
from pathlib import Path

import pytest

from diffmem.errors import InputError
from diffmem.studies import report_studies

# Of the studies of small digits: whose runs took hours.
FOLDER = Path(__file__).parents[2] / "benchmarks" / "results" / "studies"
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


def test_pages_show_pictures_and_say_on_what_runs_were_made(made):
    page = (made / "report.html").read_text()
    assert page.count("<svg") == len(NAMES)
    assert re.search(r"\d+ runs?: (versions and device not recorded|diffmem [\d.]+, torch)", page)
    assert "EMM would be about" in (made / "emm.html").read_text()


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("runs.csv", lambda text: text.replace("1ab14034e048780d", "1ab14034e048780e"), r"runs.csv.*1ab14034e048780e"),
        ("runs.csv", lambda text: text.replace(",500,", ",many,"), r"runs.csv: not the runs of studies"),
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
