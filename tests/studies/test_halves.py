"""Pairs of networks on disjoint halves: their images, a run, and the law on made-up runs whose answers are known."""

import filecmp
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from studies.tiny import TINY

from diffmem.errors import InputError
from diffmem.evaluation import Agreement
from diffmem.studies import Trial, run_trial
from diffmem.studies.findings import find_among
from diffmem.studies.laws.halves import judge, overtaking
from diffmem.studies.measure import Result, SnapshotResult, pack, read_result, together
from diffmem.studies.presets import build, core_seconds
from diffmem.studies.report import again, write_studies

STUDY = build("halves")
PAIR = replace(TINY, halves="both")


def made(at, study=STUDY):
    """Pairs that agree more than they copy from a size on, with one run's share of copies."""
    results = {}
    for trial in study.trials():
        margin = 0.2 * math.log(trial.size / at) + 0.01 * (trial.repetition - 1.5)
        pair = Agreement(0.8 + margin, 0.1, (0.79, 0.81), 300)
        results[trial.key] = Result(
            trial.key, trial.size, trial.repetition, count=9, total=600, decided=None, censored=False, images=1000,
            epochs=10.0, best_images=1000, parameters=9, training_seconds=1.0, sampling_seconds=0.0, training_set="",
            versions={}, looks=1, agreement=pair, snapshots=(SnapshotResult(1000, 10.0, 1.0, 9, 600, 1.0, 0.0),),
        )  # fmt: skip
    return results


@pytest.mark.parametrize("repetition", [0, 3])
def test_halves_are_disjoint_and_the_first_one_is_that_of_a_run_without(repetition):
    first, second = (replace(TINY, halves=half).training_set(50, repetition) for half in ("first", "second"))
    assert first.fingerprint == TINY.training_set(50, repetition).fingerprint
    both = TINY.training_set(100, repetition)
    rows = sorted([image.tobytes() for image in first.images] + [image.tobytes() for image in second.images])
    assert rows == sorted(image.tobytes() for image in both.images)
    seeds = {replace(TINY, halves=half).config(first, repetition).seed for half in (None, "first", "second")}
    assert len(seeds) == 2
    with pytest.raises(InputError, match="choose a multiple of 10"):
        replace(TINY, halves="second").training_set(25, repetition)
    with pytest.raises(InputError, match="halves is 'third'"):
        replace(TINY, halves="third")
    with pytest.raises(InputError, match="goes with neither"):
        replace(PAIR, watch={})


def test_a_pair_is_a_trial(tmp_path):
    trial = Trial(PAIR, 20)
    result = run_trial(trial, tmp_path / "pair")
    assert read_result(tmp_path / "pair") == result
    parts = [read_result(tmp_path / "pair" / half) for half in ("first", "second")]
    assert result.total == 2 * 20
    assert result.count == max(a.count + b.count for a, b in zip(*(each.snapshots for each in parts), strict=True))
    assert result.agreement.images == 20
    assert result.agreement.between > result.agreement.chance - 1e-9
    assert parts[0].training_set != parts[1].training_set
    assert (tmp_path / "pair" / "gallery.npz").is_file()
    with pytest.raises(InputError, match="run the study halves instead"):
        run_trial(replace(trial, at_least=0.9), tmp_path / "test")


def test_copies_of_both_networks_count():
    one, other = (
        SnapshotResult(8, 1.0, 0.5, int(sum(each)), 3, 1.0, 2.0, copies=pack(np.array(each)))
        for each in ([True, False, True], [False, False, True])
    )
    found = together(one, other)
    assert (found.count, found.total, found.training_seconds, found.sampling_seconds) == (3, 6, 2.0, 4.0)
    assert found.memorized.tolist() == [True, False, True, False, False, True]
    assert together(one, replace(other, copies=None)).memorized is None


def test_the_law_and_its_report(tmp_path):
    found = find_among([STUDY], made(150), {})
    assert [test.verdict for test in found[0].law.tests] == ["holds", "holds"]
    star = found[0].law.estimates[0]
    assert star.value == pytest.approx(150, rel=0.03)
    assert star.interval[0] < 150 < star.interval[1]
    page = write_studies(found, tmp_path, tmp_path / "report").read_text()
    assert "two networks agree more with each other than with their images: <b>" in page
    again(tmp_path / "report", tmp_path / "again")
    for path in (tmp_path / "report").iterdir():
        assert filecmp.cmp(path, tmp_path / "again" / path.name, shallow=False), path.name
    (law,) = [each["law"] for each in json.loads((tmp_path / "again" / "studies.json").read_text())]
    assert len(law["pairs"]) == 6 * STUDY.repetitions


def test_pairs_that_never_agree_have_no_size():
    never = judge(list(made(5000).values()))
    assert [test.verdict for test in never.tests] == ["contrary", "holds"]
    assert not never.estimates[0].name.startswith("N*")
    assert judge([]).tests[0].verdict == "not measured"
    pair = Agreement(0.5, 0.0, (0.6, 0.6), 10)
    assert overtaking({10: pair, 20: replace(pair, between=0.7)}) == pytest.approx(math.log(10 * math.sqrt(2)))
    assert overtaking({10: replace(pair, between=0.7), 20: replace(pair, between=0.8)}) == -math.inf


def test_a_repetition_of_the_study_takes_minutes():
    assert core_seconds(replace(STUDY, repetitions=1), "digits") < 600
    assert STUDY.variants[0].setting.limits()[1] >= 1600
