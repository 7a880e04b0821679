"""What criteria say by themselves in a trial, against the rule by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from studies.tiny import TINY

from diffmem.studies import Question, Result, Study, Trial, Variant, report_studies, run_trial
from diffmem.studies.checks import AT_ALARMS, OTHER_CRITERIA, Check, checks, held_out_images, planted_copies
from diffmem.studies.findings import find_among
from diffmem.studies.measure import SnapshotResult, pack
from diffmem.studies.presets import build
from diffmem.studies.report import write_studies

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(images, training):
    """Squared distances to all training images, ascending, int64 [n, N]."""
    flat = [each.reshape(len(each), -1).astype(np.int64) for each in (images, training)]
    return np.sort(((flat[0][:, None] - flat[1][None]) ** 2).sum(axis=2), axis=1)


def test_kinds_of_images_and_what_the_rule_says_of_them():
    small, large = (Trial(TINY, size, repetition=1) for size in (20, 50))
    training = [trial.setting.training_set(trial.size, 1) for trial in (small, large)]
    assert (planted_copies(small, training[0]) == planted_copies(large, training[1])).all()
    held_out = held_out_images(large, training[1])
    assert held_out.shape == (1000, 1, 4, 4)
    assert not {image.tobytes() for image in held_out} & {image.tobytes() for image in training[1].images}
    found = {each.criterion: each for each in checks(large, training[1], training[1].images, torch.device("cpu"))}
    assert tuple(found) == ("ratio", *OTHER_CRITERIA)
    assert {each.generated[1] for each in found.values()} == {50}
    assert found["ratio"].generated[0] == 50  # exact copies of images that are there once
    first, second = by_hand(planted_copies(large, training[1]), training[1].images)[:, :2].T
    assert found["ratio"].planted == (int((9 * first < second).sum()), 300)
    assert 0 < found["ratio"].planted[0] < 300
    assert found["ratio"].held_out == (
        int((9 * (d := by_hand(held_out, training[1].images))[:, 0] < d[:, 1]).sum()),
        1000,
    )
    # By the same rule with another threshold, alarms are 1 % by construction.
    assert 8 <= found[AT_ALARMS].held_out[0] <= 10
    assert found[AT_ALARMS].planted[0] > found["ratio"].planted[0]


def test_a_trial_keeps_its_checks_and_one_with_a_test_has_none(tmp_path):
    result = run_trial(Trial(TINY, 20), tmp_path / "plain")
    assert [each.criterion for each in result.checks] == ["ratio", *OTHER_CRITERIA]
    best = max(result.snapshots, key=lambda each: each.ratio)
    assert result.checks[0].generated == (best.count, best.total)
    assert Result.from_json(result.to_json()) == result
    # A process of an earlier version that shares the folder goes on.
    assert Result.from_json({**result.to_json(), "of_a_later_version": 1}) == result
    assert run_trial(Trial(TINY, 20), tmp_path / "plain") == result  # as it was stored
    tested = Trial(replace(TINY, length={"images": 16}, snapshots=1), 20, at_least=0.9)
    assert run_trial(tested, tmp_path / "tested").checks == ()


@pytest.mark.parametrize("name", ["diversity", "classes"])
def test_checks_of_sets_of_some_classes(name):
    for variant in build(name).variants[-2:]:
        trial = Trial(variant.setting, 50)
        training = variant.setting.training_set(50)
        assert len(held_out_images(trial, training)) > 100
        assert planted_copies(trial, training).shape == (300, *training.image_shape)


def test_a_report_answers_questions_by_other_criteria_too(tmp_path):
    """By the rule `wide` copies more, by calibrated L2 `narrow` does; both verdicts are there, and again from the
    report's own tables."""
    variants = tuple(
        Variant(name, replace(TINY, network={**TINY.network, "model_channels": width}))
        for name, width in (("narrow", 4), ("wide", 8))
    )
    question = Question("a wider network memorizes more", "wide", "narrow")
    study = Study("width", "Width", "channels", variants, (20,), 4, questions=(question,))
    results = {}
    for variant, trial in study.cells():
        low, high = (count + trial.repetition for count in (50, 150))
        count, other = (low, high) if variant.name == "narrow" else (high, low)
        by = tuple(
            Check(name, (found, 200), (3, 1000), (250, 300))
            for name, found in (("ratio", count), ("calibrated_l2", other))
        )
        values = {"images": 9, "epochs": 1.0, "best_images": 9, "parameters": 5, "training_set": "", "versions": {}}
        snapshots = tuple(  # a table of runs has no verdicts by image, but the interval that comes of them
            SnapshotResult(at, at / 20, 0.5, int(some.sum()), 200, 1.0, 1.0, copies=pack(some))
            for at, some in ((5, np.arange(200) < count - 5), (9, np.arange(200) < count))
        )
        results[trial.key] = Result(
            trial.key, 20, trial.repetition, count, 200, None, False, training_seconds=1.0, sampling_seconds=1.0,
            snapshots=snapshots, looks=2, checks=by, **values,
        )  # fmt: skip
    page = write_studies(find_among([study], results, {}), tmp_path, tmp_path / "report")
    (found,) = json.loads((tmp_path / "report" / "studies.json").read_text())
    assert [each["verdict"] for each in found["questions"]] == ["holds"]
    assert {name: [each["verdict"] for each in by] for name, by in found["other_criteria"].items()} == {
        "calibrated_l2": ["contrary"]
    }
    again = report_studies(tmp_path / "report", tmp_path / "again")
    assert (tmp_path / "again" / "runs.csv").read_text() == (tmp_path / "report" / "runs.csv").read_text()
    assert again.read_text() == page.read_text()
    assert "83.3 %" in page.read_text()  # of the planted copies
    with pytest.raises(ValueError, match="shorter"):
        Check.from_text("ratio:1/2:3/4")


def test_a_criterion_is_known_by_its_former_name():
    """Its spaces would end it in a table of runs."""
    stored = {"criterion": "ratio at 1 % alarms", "generated": [1, 2], "held_out": [3, 4], "planted": [5, 6]}
    assert Check.from_json(stored) == Check(AT_ALARMS, (1, 2), (3, 4), (5, 6))
    assert not any(" " in name for name in OTHER_CRITERIA)
