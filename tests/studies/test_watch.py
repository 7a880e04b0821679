"""Watched runs: audits √2 apart, loss gaps and phases at each, an end past the onset, the same after a kill."""

import dataclasses

import numpy as np
import pytest
from studies.tiny import TINY

from diffmem.errors import InputError
from diffmem.evaluation import Evaluation
from diffmem.memorization import CopyDetector
from diffmem.models import as_denoiser
from diffmem.studies import Setting, Trial, measure, run_trial
from diffmem.studies.measure import Result
from diffmem.studies.watch import Watcher

WATCHED = dataclasses.replace(TINY, snapshots=5, watch={"holdout": 40, "stop_at": 0.5})

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    pass


def test_a_watched_run_with_and_without_a_kill(tmp_path, monkeypatch):
    trial = Trial(WATCHED, 20)
    result = run_trial(trial, tmp_path / "a")
    assert [each.images for each in result.snapshots] == [16, 24, 32, 48]
    for each in result.snapshots:
        assert each.watched.memorized + each.watched.spurious + each.watched.generalized == each.total == 20
        assert len(each.watched.gap) == 8
    assert result.alarms[1] == 40
    assert result.delta > 0
    assert Result.from_json(result.to_json()) == result
    counts = iter([0.1, 0.4, 0.5])  # of copies: the third audit ends the run
    monkeypatch.setattr(measure.SnapshotResult, "ratio", property(lambda self: self.count / self.total))
    judge = CopyDetector.judge

    def judged(self, images):
        found = judge(self, images)
        if len(images) == 10:  # a batch
            share = shares[-1]
            found.memorized[:] = np.arange(10) < 10 * share
        return found

    shares = [0.0]
    monkeypatch.setattr(CopyDetector, "judge", judged)
    on_snapshot = measure._Audits.on_snapshot

    def counted(self, snapshot):
        if snapshot.images // self.interval in self.steps or snapshot.images >= self.planned:
            shares.append(next(counts))
        return on_snapshot(self, snapshot)

    monkeypatch.setattr(measure._Audits, "on_snapshot", counted)
    monkeypatch.setattr(measure, "_write_gallery", lambda *arguments: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run_trial(trial, tmp_path / "b")
    monkeypatch.setattr(measure, "_write_gallery", lambda *arguments: None)
    ended = run_trial(trial, tmp_path / "b")  # continues with nothing but its result to write
    assert [each.images for each in ended.snapshots] == [16, 24, 32]
    assert ended.censored
    assert ended.interval[1] > ended.r_mem == 0.5
    assert [each.watched for each in ended.snapshots] == [each.watched for each in result.snapshots[:3]]
    assert ended.alarms == result.alarms


def test_unseen_images_are_those_of_no_size():
    digits = dataclasses.replace(WATCHED, watch={"holdout": 400})
    for repetition in (0, 3):
        unseen = {each.tobytes() for each in digits.unseen(10, repetition).images}
        assert unseen == {each.tobytes() for each in digits.unseen(1300, repetition).images}
        assert not unseen & {each.tobytes() for each in digits.training_set(1300, repetition).images}
        assert 390 <= len(digits.unseen(10, repetition).images) <= 400
    with pytest.raises(InputError, match="the largest size is 1,340"):
        digits.unseen(1350)
    assert TINY.unseen(20) is None


def test_phases_of_known_images():
    """δ lies between the images' own distances and those of pairs one gray level apart."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (200, 1, 4, 4), dtype=np.uint8)
    training, unseen = (TINY.training_set(100) for _ in range(2))
    training = dataclasses.replace(training, images=images[:100], labels=None)
    unseen = dataclasses.replace(unseen, images=images[100:], labels=None)
    watcher = Watcher(training, unseen, CopyDetector(training))
    assert 10 < watcher.delta < 60
    pairs = random.integers(20, 200, (3, 1, 4, 4), dtype=np.uint8)
    lone = random.integers(0, 256, (4, 1, 4, 4), dtype=np.uint8)
    generated = np.concatenate([images[:5], pairs, pairs + 1, lone])

    class Found(Evaluation):
        images = generated

    found = watcher.measure(as_denoiser(lambda x, sigma: x * 0, channels=1, resolution=4), Found(None))
    assert (found.memorized, found.spurious, found.generalized) == (5, 6, 4)
    assert found.shares == (5 / 15, 6 / 15, 4 / 15)


def test_what_is_wrong_with_a_watch_is_named():
    for watch, words in (({"holdout": 40, "until": 3}, "not until$"), ({"stop_at": "half"}, "of the wrong type")):
        with pytest.raises(InputError, match=words):
            dataclasses.replace(WATCHED, watch=watch)


@pytest.mark.parametrize("watch", [{"holdout": 3}, {"stop_at": 0}, {"stop_after": -1}, {"until": 3}])
def test_a_watch_that_is_none_is_refused(watch):
    with pytest.raises(InputError, match="watch"):
        Setting.from_json({**TINY.to_json(), "watch": watch})
    with pytest.raises(InputError, match="neither level_off"):
        dataclasses.replace(WATCHED, level_off=1.0)
