"""What each measure cannot see: the sentence of its `blind`, shown."""

import numpy as np
import pytest

import diffmem
from diffmem.memorization.criteria import CRITERIA


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return diffmem.load_images("builtin:digits").images


def value(name, *sets, **options):
    return diffmem.measure(*sets, measures=name, **options).values


def noisy(images: np.ndarray, deviation: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, deviation, images.shape)
    return (images + noise).clip(0, 255).round().astype(np.uint8)


def test_every_criterion_says_what_it_cannot_see_and_is_shown_here():
    shown = {name.removeprefix("test_blind_") for name in globals() if name.startswith("test_blind_")}
    assert shown == set(CRITERIA)
    assert all(criterion.blind for criterion in CRITERIA.values())


def test_blind_ratio(digits):
    training = digits[:500]
    assert value("ratio", training[:100], training)["ratio"] == 1
    assert value("ratio", training[:100, :, :, ::-1], training)["ratio"] < 0.05
    copies = noisy(training[:100], 18)  # the same copies, beside more training images
    few, many = (value("ratio", copies, digits[:n])["ratio"] for n in (100, 1797))
    assert few > many + 0.1


def test_blind_f_mem(digits):
    assert value("f_mem", digits[:100], digits[:500])["f_mem"] == 1
    assert value("f_mem", digits[:100, :, :, ::-1], digits[:500])["f_mem"] < 0.05


def test_blind_calibrated_l2(digits):
    training = digits[:500]
    versions = noisy(np.repeat(digits[600:601], 60, axis=0), 10)
    assert value("calibrated_l2", noisy(digits[600:601], 10, 1), np.concatenate([training, versions[:1]]))[
        "calibrated_l2"
    ]
    assert not value("calibrated_l2", noisy(digits[600:601], 10, 1), np.concatenate([training, versions]))[
        "calibrated_l2"
    ]


def test_blind_nearest_distance(digits):
    honest, training = digits[600:900], digits[:500]
    with_copy = np.concatenate([training[:1], honest[1:]])
    before, after = (value("nearest_distance", images, training) for images in (honest, with_copy))
    assert after["nearest_distance"] == pytest.approx(before["nearest_distance"], rel=0.01)
    assert after["nearest_distance_median"] == pytest.approx(before["nearest_distance_median"], rel=0.01)
    assert after["nearest_distance_min"] == 0 < before["nearest_distance_min"]


def test_blind_distance_ratio(digits):
    training, copies = digits[:500], noisy(digits[:100], 5)
    assert value("distance_ratio", copies, training)["distance_ratio"] < 0.3
    assert value("distance_ratio", copies, np.concatenate([training, training]))["distance_ratio"] == 1


def test_blind_tile_max(digits):
    copies = digits[:100].copy()
    assert value("tile_max", copies, digits[:500])["tile_max_below_10"] == 1
    copies[:, :, :4, :4] = 255 - copies[:, :, :4, :4]  # one of four tiles
    assert value("tile_max", copies, digits[:500])["tile_max_below_10"] == 0


def test_blind_top1_similarity(digits):
    darker = (digits[:100] * 0.3).astype(np.uint8)  # contrast is not seen
    assert value("top1_similarity", darker, digits[:500])["top1_similarity"] > 0.99
    mirrored = value("top1_similarity", digits[:100, :, :, ::-1], digits[:500])
    assert mirrored["top1_similarity"] < mirrored["top1_similarity_background"]
    assert mirrored["top1_similarity_above_0.75"] > 0.9  # and 0.75 means nothing on pixels


def test_blind_authenticity(digits):
    training, copies = digits[:500], noisy(digits[:100], 5)
    assert value("authenticity", copies, training)["authenticity"] == 0
    assert value("authenticity", copies, np.concatenate([training, training]))["authenticity"] == 1


def test_blind_m3(digits):
    training = digits[:500]
    twice = np.concatenate([training, training])
    assert value("m3", training[:100], training)["m3"] == 1
    assert value("m3", training[:100], twice) == {"m3": 0, "m3_median": 0}
    assert value("m3", digits[600:], training)["m3"] > 0.15  # honest images


def test_blind_c_t(digits):
    few = np.concatenate([digits[:15], 255 - digits[600:885]])  # 5 % copies among images that are far off
    assert value("c_t", few, digits[:500], digits[900:])["c_t"] > 3


def test_blind_c_t_global(digits):
    few = np.concatenate([digits[:15], 255 - digits[600:885]])
    assert value("c_t_global", few, digits[:500], digits[900:])["c_t_global"] > 3


def test_blind_dcr_protection(digits):
    training, copies = digits[:500], noisy(digits[:200], 5)
    assert value("dcr_protection", copies, training, digits[900:1400])["dcr_protection"] == 0
    both = np.concatenate([digits[:200], digits[900:1200]])  # the holdout set holds them too
    assert value("dcr_protection", digits[:200], training, both)["dcr_protection"] == 1


def test_blind_mifid_distance(digits):
    honest, training = digits[600:900], digits[:500]
    before, after = (
        value("mifid_distance", images, training)["mifid_distance_generated"]
        for images in (honest, np.concatenate([training[:3], honest[3:]]))
    )
    assert after == pytest.approx(before, rel=0.02)


def test_blind_mifid():
    """Half of the images are copies, the others far from all training images: M is above 0.1, and counts as 1."""
    random = np.random.default_rng(0)
    training = random.normal(size=(200, 64)).astype(np.float32)
    images = np.concatenate([training[:100], random.normal(size=(100, 64)).astype(np.float32)])
    found = value("mifid,mifid_distance", images, training)
    assert found["mifid_distance_generated"] > 0.1
    assert found["mifid"] == found["fid"]


def test_blind_three_phases(digits):
    rare = digits[600:700]
    once, repeated = (value("three_phases", images, digits[:500]) for images in (rare, np.repeat(rare, 2, axis=0)))
    assert once["three_phases_spurious"] < 0.1
    assert repeated["three_phases_spurious"] > 0.9


def test_blind_disjoint_halves(digits):
    shared = digits[:100]  # both halves hold them, and both models copy them
    found = value(
        "disjoint_halves", shared, np.concatenate([shared, digits[200:500]]), second=shared,
        second_training=np.concatenate([shared, digits[500:800]]),
    )  # fmt: skip
    assert found["disjoint_halves"] == pytest.approx(1)


def test_blind_precision_recall(digits):
    found = value("precision_recall", digits[:500], digits[:500])
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    honest = value("precision_recall", digits[600:1100], digits[:500])
    assert found["density"] > honest["density"]
