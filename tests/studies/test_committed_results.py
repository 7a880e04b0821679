"""The committed studies: the numbers that their README quotes are those of the data beside it, and so are the pages."""

import json
import re
import shutil
from pathlib import Path

import pytest

from diffmem.errors import InputError
from diffmem.studies import report_studies

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results" / "studies"
TEXT = (FOLDER / "README.md").read_text()
STUDIES = {study["study"]["name"]: study for study in json.loads((FOLDER / "studies.json").read_text())}
CELLS = {(name, cell["variant"], cell["size"]): cell for name in STUDIES for cell in STUDIES[name]["cells"]}


@pytest.fixture(scope="module")
def again(tmp_path_factory) -> Path:
    """The report, made again."""
    return report_studies(FOLDER, tmp_path_factory.mktemp("again")).parent


def points(share: float) -> str:
    return f"{100 * share:+.0f}".replace("-", "−")


def row(start: str) -> str:
    return next(line for line in TEXT.splitlines() if line.startswith(f"| {start}"))


@pytest.mark.parametrize(
    ("start", "study", "higher", "lower"),
    [
        ("a wider network", "width", "32 channels", "8 channels"),
        ("true labels", "conditioning", "true labels", "no labels"),
        ("uninformative labels", "conditioning", "random labels, C = 10", "no labels"),
        ("random labels do", "conditioning", "random labels, C = 10", "true labels"),
        ("more random labels", "random-labels", "C = 10", "C = 1"),
        ("more random labels", "random-labels", "C = 50", "C = 10"),
        ("unique labels", "unique-labels", "unique labels", "no labels"),
        ("skips at high", "skips", "8×8 only", "4×4 only"),
        ("a large weight decay", "weight-decay", "0", "0.1"),
        ("a small one", "weight-decay", "0", "0.0001"),
        ("a lower resolution", "resolution", "4×4", "8×8"),
        ("skips at full", "skips", "all", "8×8 only"),
    ],
)
def test_differences_and_verdicts_are_those_of_the_data(start, study, higher, lower):
    claims = STUDIES[study]["claims"]
    found = next(each for each in claims if (each["claim"]["higher"], each["claim"]["lower"]) == (higher, lower))
    interval = "({} to {})".format(*map(points, found["interval"]))
    assert interval in row(start)
    assert points(found["difference"]).lstrip("+") in row(start)
    assert found["verdict"] in row(start) or start == "more random labels"


def test_shares_and_emm_are_those_of_the_data():
    of_size = [CELLS["size", "reference", size]["r_mem"] for size in (20, 30, 50, 100)]
    said = "{:.0f} % at N = 20, {:.0f} % at 30, {:.0f} % at 50, {:.1f} % at 100".format(*(100 * r for r in of_size))
    assert said in row("R_mem falls")
    runs = sum(len(cell["runs"]) for cell in STUDIES["size"]["cells"])
    grid, search = STUDIES["size"]["emm"]["reference"], json.loads((FOLDER / "emm.json").read_text())
    for found, whence in (
        (grid, f"from this grid of {runs} runs"),
        (search, f"by the search, {len(search['runs'])} runs"),
    ):
        size, (low, high) = found["emm"], found["interval"]
        assert f"{size:.0f} ({low:.0f} to {high:.0f}) {whence}" in row("R_mem falls")
    widths = [STUDIES["width"]["emm"][f"{channels} channels"]["emm"] for channels in (8, 16, 32)]
    assert "EMM {:.0f}, {:.0f}, {:.0f}".format(*widths) in row("a wider")
    low, high = (STUDIES["resolution"]["emm"][name] for name in ("4×4", "8×8"))
    said = f"EMM {low['emm']:.0f} ({low['interval'][0]:.0f} to {low['interval'][1]:.0f}) against {high['emm']:.0f}"
    assert said in row("a lower")
    decay = [100 * CELLS["ema", level, 30]["r_mem"] for level in ("0.99", "0", "0.999")]
    assert f"({decay[0]:.0f} % to {decay[1]:.0f} % at N = 30)" in row("EMA")
    assert f"1000 steps: {decay[2]:.0f} %" in row("EMA")
    assert f"{100 * CELLS['unique-labels', 'unique labels', 100]['r_mem']:.0f} % at N = 100" in row("unique")
    spread = re.search(r"standard deviation of ([0-9.]+) in logit R_mem", (FOLDER / "report.html").read_text())[1]
    assert f"({spread} in logit R_mem)" in TEXT


def test_one_trial_is_one_cell_in_every_study():
    """At N = 30 without labels there is one R_mem, of three runs, whichever study shows it."""
    same = [("size", "reference"), ("conditioning", "no labels"), ("ema", "0.99"), ("width", "16 channels")]
    same += [("skips", "all"), ("resolution", "8×8"), ("weight-decay", "0")]
    cells = [CELLS[name, variant, 30] for name, variant in same]
    assert len(cells[0]["runs"]) == 3
    assert all(cell["runs"] == cells[0]["runs"] for cell in cells)
    assert len({(cell["r_mem"], *cell["interval"]) for cell in cells}) == 1


@pytest.mark.parametrize("name", ["report.html", "emm.html", "studies.json", "runs.csv", "emm.json"])
def test_the_files_are_what_one_command_makes_of_them(name, again):
    made, committed = ((folder / name).read_text() for folder in (again, FOLDER))
    if name.endswith(".html"):  # but for the drawings, whose numbers matplotlib may round in another way
        made, committed = (re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL) for text in (made, committed))
    elif name.endswith(".json"):
        made, committed = json.loads(made), json.loads(committed, parse_float=float)
        close(made, committed)
        return
    assert made == committed


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


def test_pages_keep_their_pictures_and_say_on_what_runs_were_made(again):
    page = (again / "report.html").read_text()
    assert page.count("<figure>") == (FOLDER / "report.html").read_text().count("<figure>") == 29
    assert "1 run: diffmem 0.1.0, torch 2.13.0+cpu" in page
    assert "77 runs: versions and device not recorded" in page
    assert "EMM would be about" in (again / "emm.html").read_text()


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
