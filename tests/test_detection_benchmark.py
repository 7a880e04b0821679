"""The benchmark of detectors counts right, and its disguises are what they are called."""

import numpy as np
import pytest

from benchmarks.bench_detection import near_duplicates, shares
from benchmarks.detection.detectors import Detector, detectors
from benchmarks.detection.disguises import PLANTED
from benchmarks.detection.sets import LOOKED_AT, Cifar

IMAGES = np.kron(np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8)), np.ones((4, 4))).astype(np.uint8)


@pytest.mark.parametrize("entry", PLANTED, ids=lambda entry: f"{entry[0]} {entry[1]}")
def test_disguises_are_images_of_the_same_size(entry):
    function = entry[3]
    found = function(IMAGES[:2])
    assert (found.dtype, found.shape) == (np.uint8, (2, 3, 32, 32))
    assert np.array_equal(found, function(IMAGES[:2].copy()))
    assert entry[0] == "none" or not np.array_equal(found, IMAGES[:2])


def test_strength_rises():
    y, x = np.mgrid[:32, :32]
    smooth = np.stack([5 * x + 2 * y, 3 * y + x + 60, 90 + 2 * x - 2 * y])[None].astype(np.uint8)
    distance = {}
    for name, _, _, function in PLANTED:
        apart = np.abs(function(smooth).astype(float) - smooth).mean()
        assert apart >= distance.get(name, 0), name
        distance[name] = apart


@pytest.mark.parametrize("detector", detectors(), ids=lambda detector: detector.name)
def test_detectors_put_copies_first(detector):
    if detector.missing:
        pytest.skip(f"{detector.name}: {detector.missing}")
    scores = detector.prepare(IMAGES[:30])
    copies, others = scores(IMAGES[:10]), scores(IMAGES[30:])
    assert copies.shape == (10,)
    assert copies.max() < others.min()


def test_shares_and_alarms():
    alarms = np.arange(1000) / 1000
    detector = Detector("one", lambda training: None, {"fixed": 0.5})
    rows = list(shares("set", detector, np.array([-1, 0.0005, 0.004, 0.2, 0.7]), alarms, disguise="listed"))
    assert [(row["threshold"], row["found"], row["alarms"]) for row in rows] == [
        ("0.1% alarms", "2", "1"), ("0.5% alarms", "3", "5"), ("1.0% alarms", "3", "10"), ("fixed", "4", "500"),
    ]  # fmt: skip
    assert all(float(row["low"]) <= float(row["recall"]) <= float(row["high"]) for row in rows)


def test_what_is_a_copy_raises_no_alarm():
    known = Cifar(IMAGES[:30], IMAGES, {0: 0, 4: 4, 7: 7}, {1: "copy", 2: "unclear", 3: "no"})
    assert known.others[:3].tolist() == [3, 5, 6]
    rows = list(near_duplicates(Detector("one", None), known, lambda images: images.mean((1, 2, 3)), np.ones(9), True))
    assert {row["disguise"]: row["copies"] for row in rows} == {
        "listed": "3", "listed, even": "2", "listed, odd": "1", "not listed": "1",
    }  # fmt: skip


def test_the_committed_judgments_are_pairs_of_image_numbers():
    import json

    looked_at = json.loads(LOOKED_AT.read_text())["looked_at"]
    assert len({each["test"] for each in looked_at}) == len(looked_at) > 600
    assert all(0 <= each["test"] < 10000 and 0 <= each["train"] < 50000 for each in looked_at)
    assert {each["judged"] for each in looked_at} == {"copy", "unclear", "no"}
