"""A finished run is run once more, from its folder or from a report, and every count is compared."""

import json
import shutil
from dataclasses import replace

import pytest
from click.testing import CliRunner
from studies.tiny import TINY

from diffmem.cli.study import study_command
from diffmem.integrity import sealed
from diffmem.studies import Question, Study, Variant, report_studies, run_studies
from diffmem.studies.measure import RESULT
from diffmem.studies.reproduction import recorded_trial, reproduce
from diffmem.studies.results import INDEX, RESULTS, results_again, write_results


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two variants, two repetitions, and their report."""
    root = tmp_path_factory.mktemp("runs") / "own"
    wide = replace(TINY, network={**TINY.network, "model_channels": 8})
    variants = Variant("narrow", TINY, 4), Variant("wide", wide, 8)
    asked = (Question("width raises R_mem", "wide", "narrow"),)
    run_studies([Study("own", "Width", "channels", variants, (20,), 2, axis="factor", questions=asked)], root)
    report_studies(root)
    return root


def key_of(runs, place=0):
    return sorted(folder.name for folder in (runs / "trials").iterdir())[place]


@pytest.mark.parametrize("of", ["runs", "report"])
def test_every_count_comes_out_again(of, runs):
    source = runs if of == "runs" else runs / "report"
    arguments = ["rerun", key_of(runs)[:8], "--runs", str(source), "--device", "cpu"]
    ended = CliRunner().invoke(study_command, arguments, standalone_mode=False)
    assert ended.return_value == 0, ended.output
    assert f"run {key_of(runs)}: all " in ended.stdout


def test_a_count_that_differs_is_told_with_what_may_be_the_cause(runs, tmp_path):
    """One more copy than there was, recorded by another version of PyTorch, without the instruction set."""
    changed = tmp_path / "changed"
    shutil.copytree(runs, changed)
    path = changed / "trials" / key_of(runs) / RESULT
    values = json.loads(path.read_text())
    snapshot = values["snapshots"][1]
    snapshot["count"], snapshot["copies"] = snapshot["count"] + 1, None
    values["versions"]["torch"], values["arithmetic"] = "2.0.1", None
    path.write_text(json.dumps(sealed({name: value for name, value in values.items() if name != "sha256"})))
    arguments = ["rerun", key_of(runs), "--runs", str(changed), "--out", str(tmp_path / "again"), "--device", "cpu"]
    ended = CliRunner().invoke(study_command, arguments, standalone_mode=False)
    assert ended.return_value == 1
    recorded, again = (f"{snapshot['count'] - step}/20" for step in (0, 1))
    assert f"copies after {snapshot['images']} images: recorded {recorded}, now {again}" in ended.stdout
    assert "recorded with torch 2.0.1, now" in ended.stdout
    assert "not recorded: arithmetic" in ended.stdout
    # What lies there is compared, not run once more.
    listed = json.loads(CliRunner().invoke(study_command, [*arguments, "--json"]).stdout)
    assert [(each["key"], each["same"]) for each in listed] == [(key_of(runs), False)]
    trial, known = recorded_trial(runs, key_of(runs))
    assert reproduce(trial, known, tmp_path / "again" / key_of(runs), "cpu").same


@pytest.mark.parametrize(
    ("key", "words"), [("abc", "at least 4 characters"), ("0000000000", "no finished run has a key that begins")]
)
def test_keys_that_name_no_run_are_one_line(key, words, runs):
    ended = CliRunner().invoke(study_command, ["rerun", key, "--runs", str(runs)])
    assert words in str(ended.exception)


def test_every_verdict_links_to_its_runs(runs, tmp_path):
    """On the report's page, and on that over several reports, which is made again from their tables as it was."""
    page = (runs / "report" / "report.html").read_text()
    assert '<a href="#own-1"' in page
    assert '<details id="own-1">' in page
    for place in range(4):
        assert f'<a href="#own-{key_of(runs, place)}">' in page
        assert f'<tr id="own-{key_of(runs, place)}">' in page
    other = tmp_path / "other"
    shutil.copytree(runs, other)
    index = write_results([runs, other / "report"], tmp_path / "results")
    assert index.name == INDEX
    text, listed = index.read_text(), json.loads((tmp_path / "results" / RESULTS).read_text())
    assert [(each["name"], each["runs"], each["verdicts"][0]["link"]) for each in listed] == [
        ("own", 4, "own-1"),
        ("other", 4, "own-1"),
    ]
    for name in ("own", "other"):
        assert f'href="{name}/report.html#own-1"' in text
        assert 'id="own-1"' in (tmp_path / "results" / name / "report.html").read_text()
    results_again(tmp_path / "results")
    assert (index.read_text(), json.loads(index.with_name(RESULTS).read_text())) == (text, listed)
    ended = CliRunner().invoke(study_command, ["show", str(tmp_path / "results" / "own" / "studies.json")])
    assert "own: Width; 4 runs, 2 per cell" in ended.output
    ended = CliRunner().invoke(study_command, ["report", "--runs", str(runs), "--runs", str(runs), "--out", "x"])
    assert "two folders of runs are named own" in str(ended.exception)
