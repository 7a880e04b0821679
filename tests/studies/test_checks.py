"""What criteria say by themselves in a trial, against the rule by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from studies.tiny import TINY

from diffmem.studies import Result, Trial, run_trial
from diffmem.studies.checks import AT_ALARMS, OTHER_CRITERIA, checks, held_out_images, planted_copies
from diffmem.studies.presets import build

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
