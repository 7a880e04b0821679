"""The second look: disguised copies are near, others are not, and holdout twins do not set the threshold."""

import numpy as np
import pytest

import diffmem
from diffmem.features.aligned import AlignedMatcher, align_candidates
from diffmem.features.aligned import second_look as aligned_second_look
from diffmem.features.aligned.second_look import COARSE_LIMIT
from diffmem.memorization import CopyDetector, second_look
from diffmem.memorization.calibration import images_needed
from diffmem.search import TrainingIndex


def textures(count, channels=3, side=32, seed=0):
    """Smooth random images, as unlike each other as photographs."""
    rng = np.random.default_rng(seed)
    values = np.zeros((count, channels, side, side))
    shared = rng.normal(size=(count, 1, side, side)) + 0.4 * rng.normal(size=values.shape)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    values = np.fft.ifft2(np.fft.fft2(shared) / (0.03 + frequency) ** 1.5).real
    values -= values.mean((2, 3), keepdims=True)
    return np.clip(128 + 45 * values / values.std((1, 2, 3), keepdims=True), 0, 255).astype(np.uint8)


TRAINING, UNSEEN = textures(300), textures(150, seed=1)
SOME = TRAINING[:20].astype(float)
DISGUISES = {
    "darker": np.clip(SOME * 0.7, 0, 255),
    "brighter": np.clip(SOME * 0.9 + 30, 0, 255),
    "colored": np.clip(SOME * np.array([1.1, 0.8, 1]).reshape(3, 1, 1) + 10, 0, 255),
    "shifted": np.pad(SOME, ((0, 0), (0, 0), (2, 0), (0, 1)), mode="edge")[:, :, :32, 1:33],
    "noisy": np.clip(SOME + np.random.default_rng(5).normal(0, 14, SOME.shape), 0, 255),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_disguised_copies_are_near(disguise):
    generated = np.concatenate([DISGUISES[disguise].astype(np.uint8), UNSEEN[:40]])
    result = diffmem.audit(generated, TRAINING)
    noticed = result.memorized | result.near
    assert noticed[:20].sum() >= 18
    assert noticed[20:].sum() <= 1
    near = result.near[:20]
    assert np.array_equal(result.look.indices[:20][near], np.arange(20)[near])
    assert result.verdicts.count("near") == result.near_count
    assert not (result.near & result.memorized).any()
    assert np.array_equal(np.isnan(result.look.scores), result.memorized)
    assert "worth a look" in result.verdict() or result.near_count == 0
    left_out = diffmem.audit(generated, TRAINING, second_look=False)
    assert left_out.look is None
    assert not left_out.near.any()
    assert np.array_equal(left_out.memorized, result.memorized)
    assert np.array_equal(left_out.neighbors.squared_distances, result.neighbors.squared_distances)
    assert "second look" in result.blind_spots[0]
    assert "second look" not in left_out.blind_spots[0]


def test_batches_make_no_difference():
    generated = np.concatenate([DISGUISES["shifted"].astype(np.uint8), UNSEEN[:11]])
    detector, whole = CopyDetector(TRAINING), diffmem.audit(generated, TRAINING)
    found = [detector.update(generated[start : start + 6]) for start in range(0, len(generated), 6)]
    parts = detector.compute()
    np.testing.assert_allclose(parts.look.scores, whole.look.scores, atol=1e-6)
    assert np.array_equal(parts.near, whole.near)
    assert np.array_equal(np.concatenate([each.near for each in found]), whole.near)
    again = type(found[0]).from_arrays(found[0].to_arrays())
    assert np.array_equal(again.look.residuals, found[0].look.residuals, equal_nan=True)
    assert np.array_equal(again.near, found[0].near)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_the_scores_are_those_of_the_aligned_search(kind):
    training = TRAINING[:16].astype(kind)
    images = np.concatenate([DISGUISES["brighter"].astype(kind)[:8], UNSEEN[:8].astype(kind)])
    everybody = np.tile(np.arange(16), (16, 1))
    scores, best, residuals = align_candidates(images, training, everybody)
    full = AlignedMatcher(training, candidates=16, neighbors=15).match(images)
    looked = scores <= COARSE_LIMIT
    assert looked[:8].all()
    np.testing.assert_allclose(scores[looked], full.scores[looked], atol=1e-4)
    np.testing.assert_allclose(residuals[looked], full.residuals[looked, 0], atol=1e-4)
    assert np.array_equal(best[looked], full.indices[looked, 0])
    assert (full.scores[~looked] > 0.5).all()


def test_twins_in_the_hold_out_set_are_named_and_do_not_calibrate():
    twins = np.concatenate([DISGUISES["brighter"][:6], DISGUISES["shifted"][6:12]]).astype(np.uint8)
    holdout = np.concatenate([UNSEEN[:110], twins, TRAINING[40:42]])
    for features in ("pixels", "aligned"):
        result = diffmem.audit(UNSEEN[110:], TRAINING, features=features, rule="calibrated", holdout=holdout)
        left_out = result.holdout.left_out
        assert {image.index for image in left_out} >= {116, 122, 123}
        assert {image.index for image in left_out} <= set(range(110, 124))
        assert len(left_out) >= 12
        for image in left_out:
            expected = image.index - 110 if image.index < 122 else image.index - 82
            assert image.training_index == expected
            assert image.identical == (image.index >= 122)
        assert result.calibration.total == 124 - len(left_out)
        named = result.to_dict()["holdout"]["left_out"][0]
        assert {"index", "name", "training_index", "training_name", "identical", "residual"} == set(named)
    plain = diffmem.audit(UNSEEN[110:], TRAINING, holdout=holdout)
    assert [image.index for image in plain.holdout.left_out] == [122, 123]  # the paper's rule judges the others


def test_a_hold_out_set_says_what_is_near():
    holdout = UNSEEN[: images_needed(0.02) + 30]
    result = diffmem.audit(TRAINING[:1], TRAINING, rule="calibrated", alarms=0.02, holdout=holdout)
    near = result.holdout.near.sum() + result.holdout.memorized.sum()
    assert near <= 0.04 * len(holdout)


def test_other_sizes_and_small_images():
    large = DISGUISES["darker"].astype(np.uint8).repeat(2, 2).repeat(2, 3)
    index = TrainingIndex(TRAINING).query(TRAINING[:20], 8).indices
    scores, best, _ = align_candidates(large, TRAINING, index)
    assert (scores < 0.3).all()
    assert (best == 0).all()
    tiny = np.random.default_rng(0).integers(0, 256, (30, 1, 2, 2), np.uint8)
    assert diffmem.audit(tiny[:3], tiny).look is None
    flat = np.full((3, 3, 32, 32), 7, np.uint8)
    result = diffmem.audit(np.concatenate([flat, UNSEEN[:60]]), TRAINING)
    assert not result.near[:3].any()
    assert not np.isnan(result.look.scores[:3]).any()


def test_read_only_sets_are_only_read():
    training = TRAINING.copy()
    training.flags.writeable = False
    generated = UNSEEN[:5].copy()
    generated.flags.writeable = False
    assert diffmem.audit(generated, training).look is not None


def test_many_twins_are_doubted():
    twins = DISGUISES["brighter"].astype(np.uint8)
    result = diffmem.audit(TRAINING[:2], TRAINING, rule="calibrated", holdout=np.concatenate([twins, UNSEEN[:100]]))
    assert any("of 120 holdout images resemble a training image" in warning for warning in result.holdout.warnings)
    few = diffmem.audit(TRAINING[:2], TRAINING, rule="calibrated", holdout=np.concatenate([twins[:5], UNSEEN[:100]]))
    assert not few.holdout.warnings


@pytest.mark.parametrize("threads", ["1", "3"])
def test_the_number_of_threads_makes_no_difference(monkeypatch, threads):
    """Blocks side by side, each by one thread, give what one after the other gives."""
    monkeypatch.setattr(second_look, "BLOCK", 16)
    monkeypatch.setattr(aligned_second_look, "core_threads", lambda: int(threads))
    images = np.concatenate([DISGUISES["shifted"].astype(np.uint8), UNSEEN[:40]])
    candidates = np.stack([np.arange(60) % 300, *np.random.default_rng(2).integers(0, 300, (5, 60))], axis=1)
    told = []
    wanted = np.arange(60) % 7 > 0
    look = second_look.look_again(images, TRAINING, candidates, wanted, lambda *each: told.append(each[1:]))
    scores, best, residuals = align_candidates(images[wanted], TRAINING, candidates[wanted])
    np.testing.assert_array_equal(look.scores[wanted], scores)
    np.testing.assert_array_equal(look.residuals[wanted], residuals)
    np.testing.assert_array_equal(look.indices[wanted], candidates[wanted, best])
    assert np.isnan(look.scores[~wanted]).all()
    assert told == [(0, 51), (16, 51), (32, 51), (48, 51), (51, 51)]


def test_an_interrupt_ends_the_second_look():
    """Blocks that wait are not done first."""

    def interrupted(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        second_look.look_again(UNSEEN, TRAINING, np.zeros((150, 2), np.int64), np.ones(150, bool), interrupted)
