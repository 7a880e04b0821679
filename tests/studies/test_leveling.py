"""When R_mem has leveled off, and that a run ends then."""

from dataclasses import replace

import numpy as np
import pytest
from studies.tiny import TINY

from diffmem.errors import InputError
from diffmem.studies import Setting, Trial, measure, run_trial
from diffmem.studies.leveling import LEVELED_OFF, NO_ONSET, RISING, SHORT, Level, audit_steps, level_of


def curve(share, count=9, total=10**6) -> list[tuple[float, int, int]]:
    """Audits of a run whose R_mem is a function of its length."""
    return [(step, round(total * share(step)), total) for step in audit_steps(count)]


def test_the_state_follows_the_curve():
    saturating = curve(lambda t: 0.8 * min(1.0, t / 8))
    assert [level_of(saturating[:n]).state for n in range(1, 10)] == [
        SHORT,
        SHORT,
        SHORT,
        *[RISING] * 4,
        *[LEVELED_OFF] * 2,
    ]
    assert level_of(saturating) == Level(LEVELED_OFF, 8)
    assert str(level_of(saturating)) == "leveled off at 8 epochs"
    assert level_of(curve(lambda t: t / 64)).state == RISING
    assert level_of(curve(lambda t: 0.0)).state == NO_ONSET  # it may set in later
    assert level_of(curve(lambda t: 0.9 * (t >= 23))).state == RISING
    assert level_of(curve(lambda t: t / 4, 3)) == Level(LEVELED_OFF, 4)  # more than all copies there cannot be
    assert level_of([]).state == SHORT
    # Three audits at even distances, as runs without the rule have them.
    assert level_of([(1, 50, 100), (2, 90, 100), (3, 91, 100)]).state == RISING
    assert level_of([(1, 90, 100), (2, 90, 100), (3, 91, 100)]) == Level(LEVELED_OFF, 1)


@pytest.mark.parametrize(("rise", "low", "high"), [(0.0, 0.6, 1.0), (0.1, 0.0, 0.1)])
def test_noise_seldom_decides(rise, low, high):
    """500 images per audit: runs that rise by 10 points per doubling are told from those that do not."""
    random, steps = np.random.default_rng(0), np.array(audit_steps(5))
    shares = 0.6 - rise * np.log2(steps[-1] / steps)
    found = [
        level_of([(step, int(n), 500) for step, n in zip(steps, random.binomial(500, shares), strict=True)]).state
        for _ in range(200)
    ]
    assert low <= np.mean([state == LEVELED_OFF for state in found]) <= high


def test_a_run_ends_when_it_has_leveled_off_and_once_it_has(tmp_path, monkeypatch):
    setting = replace(TINY, length={"images": 128}, snapshots=5, level_off=1.0)
    assert Setting.from_json(setting.to_json()) == setting
    trial = Trial(setting, 20)
    assert trial.key not in (
        Trial(replace(setting, level_off=None), 20).key,
        Trial(replace(setting, level_off=2), 20).key,
    )
    full = run_trial(trial, tmp_path / "full")
    assert [audited.images for audited in full.snapshots] == [32, 48, 64, 96, 128]  # ×√2, of 16 images each
    assert (full.level.state, full.looks, full.censored) == (NO_ONSET, 5, False)

    monkeypatch.setattr(
        measure, "level_of", lambda audits, noise: Level(LEVELED_OFF, 2.4) if len(audits) == 3 else Level(RISING)
    )
    ended = run_trial(trial, tmp_path / "ended")
    assert (ended.images, ended.epochs, len(ended.snapshots), ended.looks, ended.censored) == (64, 3.2, 3, 5, False)
    assert [(e.count, e.loss) for e in ended.snapshots] == [(e.count, e.loss) for e in full.snapshots[:3]]
    # How many audits there are depended on what they showed: the interval allows for all that there could have been.
    assert ended.interval[1] > replace(ended, looks=3).interval[1]
    # Killed after its last audit: it does not train on.
    (tmp_path / "ended" / "result.json").unlink()
    monkeypatch.setattr(measure, "train", None)
    assert replace(run_trial(trial, tmp_path / "ended"), versions=ended.versions) == ended
    with pytest.raises(InputError, match="with 3 snapshots"):
        replace(setting, snapshots=3)


def test_a_run_of_copies_alone_leveled_off_where_it_nearly_had():
    assert level_of([(1, 240, 300), (2, 299, 300), (4, 299, 300), (5, 300, 300)]) == Level(LEVELED_OFF, 2)
