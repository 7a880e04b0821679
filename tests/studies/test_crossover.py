"""The crossover of mixtures on made-up runs whose answers are known, its report, and its study."""

import filecmp
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from diffmem.cli import main
from diffmem.errors import InputError
from diffmem.studies.findings import find_among
from diffmem.studies.laws.crossover import SMALL_STD_CROSSING, crossing, judge, over_repetitions
from diffmem.studies.measure import Result, SnapshotResult
from diffmem.studies.mixture import Mixture, MixtureResult
from diffmem.studies.presets import build
from diffmem.studies.report import again, write_studies

STUDY = build("crossover")


def made(at, losses_at, study=STUDY):
    """Runs whose R_mem is 50 % at M/N = `at`, a little different by repetition, and whose losses cross at another."""
    results = {}
    for variant in study.variants:
        for trial in study.trials():
            if trial.setting != variant.setting:
                continue
            mixture = Mixture.of(trial.setting.mixture)
            share = mixture.components(trial.size) / trial.size
            logit = 30 * (share - at - 0.004 * (trial.repetition - 1.5))
            count = round(500 / (1 + math.exp(-logit)))
            found = MixtureResult(mixture.components(trial.size), 0.3, share, 12.0, 20 + 10 * (losses_at - share), 20.0)
            results[trial.key] = Result(
                trial.key, trial.size, trial.repetition, count=count, total=500, decided=None, censored=False,
                images=1000, epochs=10.0, best_images=1000, parameters=9, training_seconds=1.0, sampling_seconds=0.0,
                training_set="", versions={}, looks=1, mixture=found,
                snapshots=(SnapshotResult(1000, 10.0, 12.0, count, 500, 1.0, 0.0),),
            )  # fmt: skip
    return results


@pytest.mark.parametrize(
    ("at", "verdict"), [(0.79, "holds"), (0.55, "contrary"), (0.9, "undecided"), (2.0, "contrary"), (0.1, "contrary")]
)
def test_the_verdict_is_about_where_r_mem_is_half(at, verdict):
    found = judge(list(made(at, 0.5).values()))
    assert [test.verdict for test in found.tests] == [verdict, "contrary"]
    assert ("outside of the M/N tried in 12 of 12" in found.notes[0]) == (not 0.4 < at < 1)
    if 0.4 < at < 1:
        first = found.estimates[0]
        assert first.value == pytest.approx(at, abs=0.01)
        spread = np.std([0.004 * (r - 1.5) for r in range(4)], ddof=1) / 2 * 3.182  # Student's t, 3 degrees of freedom
        assert (first.interval[1] - first.interval[0]) / 2 == pytest.approx(spread, rel=0.2)


def test_crossings_by_hand():
    assert crossing([0.4, 0.6, 0.8], [0, 0, 100], [100, 100, 100]) == pytest.approx(0.7)
    assert crossing([0.4, 0.6, 0.8], [0, 50, 100], [100] * 3) == pytest.approx(0.6)
    assert crossing([0.4, 0.6, 0.8], [10, 0, 5], [100] * 3) == math.inf
    assert crossing([0.4, 0.6], [90, 100], [100] * 2) == -math.inf
    assert crossing([0.2, 0.4, 0.6, 0.8], [0, 60, 40, 100], [100] * 4) == pytest.approx(0.4)  # monotone: 50 and 50
    assert over_repetitions([0.8]) is None
    assert over_repetitions([0.8, math.inf]) is None


def test_repetitions_without_all_sizes_do_not_count():
    results = list(made(0.8, 0.5).values())
    lacking = [each for each in results if (each.repetition, each.size) != (3, 200)]
    assert judge(lacking).estimates[0].basis == "3 repetitions"
    assert judge([replace(each, mixture=None) for each in results]).tests[0].verdict == "not measured"


def test_the_report_and_the_report_again(tmp_path):
    page = write_studies(find_among([STUDY], made(0.79, 0.5), {}), tmp_path, tmp_path / "report").read_text()
    assert "begin to copy them near M = 4N/5: <b>" in page
    again(tmp_path / "report", tmp_path / "again")
    for path in (tmp_path / "report").iterdir():
        assert filecmp.cmp(path, tmp_path / "again" / path.name, shallow=False), path.name
    assert pytest.approx(1, abs=1e-4) == SMALL_STD_CROSSING
    (law,) = [each["law"] for each in json.loads((tmp_path / "again" / "studies.json").read_text())]
    assert [test["verdict"] for test in law["tests"]] == ["holds", "contrary"]
    assert len(law["crossings"]) == len(law["loss_crossings"]) == 12


def test_the_study_is_shown_and_takes_no_images(capsys):
    with pytest.raises(SystemExit) as end:
        main(["study", "show", "crossover", "--plan", "1", "--sizes", "50", "--repetitions", "1"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "near M = 4N/5 (Buchanan et al. 2025" in shown
    assert "6 runs, 1 per cell" in shown
    assert "1 device" in shown
    with pytest.raises(InputError, match="leave out data, other and color"):
        build("crossover", source="builtin:digits")
    with pytest.raises(SystemExit) as end:
        main(["study", "show", "all", "--data", "builtin:digits"])
    assert end.value.code == 0
    assert "crossover" not in capsys.readouterr().out
