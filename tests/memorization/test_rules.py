"""Other features and rules than the paper's: similarity, calibration, aligned images, vectors from elsewhere."""

import html
import pickle

import numpy as np
import pytest
import torch

import diffmem
from diffmem.errors import InputError
from diffmem.features import FeatureSet, Function, extract
from diffmem.memorization import CopyDetector
from diffmem.memorization.calibration import Calibration

# Shuffled: as they lie, a writer's digits follow each other, and the last writers are not like the first.
DIGITS = diffmem.load_images("builtin:digits").select(np.random.default_rng(0).permutation(1797))
TRAINING, UNSEEN = DIGITS.images[:700], DIGITS.images[700:1200]


def unit(count, d=16, seed=0):
    some = np.random.default_rng(seed).normal(size=(count, d))
    return (some / np.linalg.norm(some, axis=1, keepdims=True)).astype(np.float32)


def means(batch):
    """A small stand-in for a network: means over 2 x 2 pixels."""
    return torch.nn.functional.avg_pool2d(batch.float(), 2).flatten(1)


def test_the_default_is_the_paper_s_rule():
    generated = np.concatenate([TRAINING[:5], UNSEEN[:15]])
    result = diffmem.audit(generated, TRAINING)
    assert result.settings["features"] == "pixels"
    assert result.settings["rule"] == "ratio"
    assert result.settings["threshold"] == "1/3"
    assert np.array_equal(result.scores, result.distance_ratios)
    assert result.scores.dtype == np.float64
    assert np.array_equal(result.memorized, result.scores < 1 / 3)
    assert result.p_values is None
    assert set(result.verdicts) <= {"copy", "near", "not a copy"}


def test_similarity_of_vectors_is_the_cosine():
    training, generated = unit(40), unit(10, seed=1)
    generated[0] = training[7] + 0.3 * generated[0]
    generated[0] /= np.linalg.norm(generated[0])
    result = diffmem.audit(generated, training, features="precomputed", rule="similarity", threshold=0.5)
    cosine = (generated / np.linalg.norm(generated, axis=1, keepdims=True)) @ training.T
    np.testing.assert_allclose(result.scores, 1 - cosine.max(1), atol=1e-6)
    assert np.array_equal(result.neighbors.indices[:, 0], cosine.argmax(1))
    assert np.array_equal(result.memorized, cosine.max(1) > 0.5)
    assert result.memorized[0]
    assert result.sources[0].index == 7
    assert result.settings["metric"] == "cosine"


@pytest.mark.parametrize("features", ["hash", "pixels", means])
def test_similarity_of_distances(features):
    generated = np.concatenate([TRAINING[:5], UNSEEN[:15]])
    result = diffmem.audit(generated, TRAINING, features=features, rule="similarity", threshold=0.5)
    assert result.memorized[:5].all()
    vectors, theirs = extract(generated, features), extract(TRAINING, features)
    differences = vectors.rows[:, None].astype(float) - theirs.rows[None].astype(float)
    squared = np.square(differences).sum(2).min(1)
    expected = {"hamming": squared, "cosine": squared / 2, "euclidean": np.sqrt(squared / vectors.dimension)}
    np.testing.assert_allclose(result.scores, expected[vectors.metric], atol=1e-5)


@pytest.mark.parametrize("features", ["pixels", "hash", "aligned", means])
def test_calibrated_alarms_are_those_asked_for(features):
    """500 unseen digits calibrate, 300 others are judged: the share of false alarms is the one asked for."""
    others = DIGITS.images[1200:1500]
    generated = np.concatenate([TRAINING[:10], others])
    options = {"features": features, "rule": "calibrated", "alarms": 0.05, "second_look": False}
    result = diffmem.audit(generated, TRAINING, holdout=UNSEEN, **options)
    assert result.memorized[:10].all()
    assert np.array_equal(result.memorized, result.p_values <= 0.05)
    assert np.array_equal(result.memorized, result.scores < result.score_threshold)
    low, high = result.calibration.alarm_interval
    alarms = result.memorized[10:].mean()
    assert low - 0.04 < alarms < high + 0.04  # the judged images are a sample too
    assert (result.q_values[:10] < 0.1).all()
    assert result.holdout.count == result.calibration.rank - 1 or features == "hash"  # bits have ties
    assert result.calibration.total == 500 - len(result.holdout.left_out)


def test_scores_do_not_depend_on_batches():
    generated = np.concatenate([TRAINING[:3], UNSEEN[300:330]])
    for features in ("hash", "aligned", means):
        detector = CopyDetector(TRAINING, features=features, rule="calibrated", holdout=UNSEEN[:200], alarms=0.02)
        for start in range(0, len(generated), 7):
            detector.update(generated[start : start + 7])
        whole = diffmem.audit(
            generated, TRAINING, features=features, rule="calibrated", holdout=UNSEEN[:200], alarms=0.02
        )
        parts = detector.compute()
        for name in ("scores", "memorized", "near", "p_values", "q_values"):
            np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-6)
        assert np.array_equal(parts.neighbors.indices, whole.neighbors.indices)


def test_vectors_beside_images():
    generated, made = UNSEEN[:20], [extract(each, means) for each in (UNSEEN[:20], TRAINING, UNSEEN[100:300])]
    given = dict(zip(("generated", "training", "holdout"), (each.vectors for each in made), strict=True))
    options = {"rule": "calibrated", "alarms": 0.02, "holdout": UNSEEN[100:300]}
    beside = diffmem.audit(generated, TRAINING, features=given, **options)
    direct = diffmem.audit(generated, TRAINING, features=means, **options)
    assert np.array_equal(beside.scores, direct.scores)
    assert beside.training.images.shape == TRAINING.shape
    with pytest.raises(InputError, match=r"19 vectors .* for 20 generated images"):
        diffmem.audit(generated, TRAINING, features={**given, "generated": given["generated"][:19]}, **options)
    with pytest.raises(InputError, match="vectors of the holdout images are missing"):
        diffmem.audit(generated, TRAINING, features={n: given[n] for n in ("generated", "training")}, **options)
    with pytest.raises(InputError, match="test is not one of the sets"):
        diffmem.audit(generated, TRAINING, features={**given, "test": given["training"]})
    detector = CopyDetector(TRAINING, features={"training": given["training"]})
    with pytest.raises(InputError, match="vectors of the generated images are missing"):
        detector.update(generated)
    assert np.array_equal(
        detector.update(generated, vectors=given["generated"]).neighbors.indices, beside.neighbors.indices
    )


def test_vectors_alone():
    generated, training, unseen = unit(30), unit(50, seed=1), unit(200, seed=2)
    generated[4] = training[11]
    result = diffmem.audit(generated, training, holdout=unseen, features="precomputed", rule="calibrated", alarms=0.01)
    assert result.memorized[4]
    assert result.sources[0].name == "#11"
    assert result.summary()["training_size"] == 50
    assert "30 images" in result.verdict()
    with pytest.raises(InputError, match="split_grid=… and value_range=…"):
        diffmem.audit(generated, training, features="precomputed", value_range=(0, 1))
    with pytest.raises(InputError, match="cannot be mirrored"):
        diffmem.audit(generated, training, features="precomputed", flip=True)


def test_what_does_not_fit_is_refused():
    training = FeatureSet(unit(50), "cosine", fingerprint="net 1")
    for generated, words in (
        (FeatureSet(unit(5), "cosine", fingerprint="net 2"), "different networks"),
        (unit(5, d=8), "generated features .* have 8 values"),
        (np.full((5, 16), np.nan, np.float32), "5 vectors hold NaN"),
        (np.zeros((5, 16), np.float32), "5 vectors are 0"),
    ):
        with pytest.raises(InputError, match=words):
            diffmem.audit(generated, training, features="precomputed")
    index = diffmem.TrainingIndex(unit(50, seed=3))
    with pytest.raises(InputError, match="index holds 50 images, but not those"):
        diffmem.audit(unit(5), training, features="precomputed", index=index)
    floats = TRAINING.astype(np.float32) / 127.5 - 1
    with pytest.raises(InputError, match=r"value_range"):
        diffmem.audit(UNSEEN[:50].astype(np.float32) / 255, floats, features="aligned")
    with pytest.raises(InputError, match=r"float32, -1 to 1: give the values of black and white with value_range"):
        diffmem.audit(floats[:50], floats, features=means)
    ranged = diffmem.audit(floats[:50], floats, features=means, value_range=(-1, 1))
    assert ranged.count == 50


def test_an_index_of_vectors_that_was_made_before():
    training = FeatureSet(unit(50), "cosine")
    index = diffmem.TrainingIndex(training.rows)
    some = diffmem.audit(unit(5, seed=4), training, features="precomputed", index=index)
    others = diffmem.audit(unit(5, seed=4), training, features="precomputed")
    assert np.array_equal(some.scores, others.scores)
    pytest.importorskip("faiss", reason="searches through FAISS")
    faiss = diffmem.audit(unit(5, seed=4), training, features="precomputed", index="flat")
    assert np.array_equal(faiss.neighbors.indices, others.neighbors.indices)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rule": "nearest"}, "rule must be one of ratio, similarity, calibrated"),
        ({"rule": "similarity"}, "rule='similarity' of pixels needs threshold"),
        ({"rule": "similarity", "features": means}, r"SSCD's authors use 0\.75"),
        ({"rule": "similarity", "features": means, "threshold": 1.5}, "a cosine between"),
        ({"rule": "similarity", "threshold": "far"}, "a distance above 0"),
        ({"rule": "calibrated"}, "pass holdout="),
        ({"rule": "calibrated", "holdout": UNSEEN, "threshold": 0.3}, "remove threshold"),
        ({"alarms": 0.01}, "alarms= is only for rule='calibrated'"),
        ({"rule": "calibrated", "holdout": UNSEEN, "alarms": 1.0}, "alarms must be a share"),
        ({"rule": "calibrated", "holdout": UNSEEN, "alarms": 0.001}, r"give 999 or more, or raise it to alarms=0\.002"),
        ({"features": "alinged"}, "features='alinged' is unknown"),
        ({"features": "aligned", "index": "flat"}, "remove index"),
        ({"features": "aligned", "threshold": 0}, "above 0"),
        ({"duplicates": "drop"}, "duplicates must be"),
    ],
)
def test_rules_that_cannot_be(given, words):
    with pytest.raises(InputError, match=words):
        diffmem.audit(UNSEEN[:5], TRAINING, **given)


def test_holdout_images_of_the_training_set_are_named():
    holdout = np.concatenate([TRAINING[30:33], UNSEEN[:200]])
    for features in ("pixels", "hash", means):
        result = diffmem.audit(
            UNSEEN[300:310], TRAINING, features=features, rule="calibrated", holdout=holdout, second_look=False
        )
        assert [(image.index, image.training_index) for image in result.holdout.left_out] == [(0, 30), (1, 31), (2, 32)]
        assert result.calibration.total == 200
    few = np.concatenate([TRAINING[:60], UNSEEN[:90]])
    with pytest.raises(InputError, match=r"90 unseen images are too few.*\(60 of 150 are training images"):
        diffmem.audit(UNSEEN[300:310], TRAINING, rule="calibrated", holdout=few, second_look=False)


def test_other_sizes_meet_where_features_resize():
    large = UNSEEN[:20].repeat(2, 2).repeat(2, 3)
    result = diffmem.audit(large, TRAINING, features="hash", rule="similarity", threshold=5)
    assert result.total == 20
    with pytest.raises(InputError, match="resize=8"):
        diffmem.audit(large, TRAINING)
    with pytest.raises(InputError, match="resize=8"):
        diffmem.audit(large, TRAINING, features=means)


def test_mirrored_copies_by_vectors():
    generated = TRAINING[:10, ..., ::-1]
    plain = diffmem.audit(generated, TRAINING, features=means, rule="similarity", threshold=0.999)
    flipped = diffmem.audit(generated, TRAINING, features=means, rule="similarity", threshold=0.999, flip=True)
    assert plain.count < 10
    assert flipped.count == 10
    assert np.array_equal(flipped.neighbors.indices[:, 0], np.arange(10))


def test_a_detector_of_features_can_be_pickled():
    maker = Function(means, metric="euclidean")
    detector = CopyDetector(TRAINING, features=maker, rule="calibrated", holdout=UNSEEN[:200])
    again = pickle.loads(pickle.dumps(detector))
    assert np.array_equal(again.judge(UNSEEN[300:320]).scores, detector.judge(UNSEEN[300:320]).scores)
    assert again.identity == detector.identity


def test_aligned_finds_disguised_digits():
    dark = (TRAINING[:20] * 0.5).astype(np.uint8)
    assert diffmem.audit(dark, TRAINING, features="aligned", rule="ratio").count == 20


def test_the_calibration_is_the_hold_out_s_own():
    result = diffmem.audit(UNSEEN[300:330], TRAINING, rule="calibrated", holdout=UNSEEN[:200], second_look=False)
    direct = diffmem.audit(UNSEEN[:200], TRAINING, second_look=False).scores
    assert np.array_equal(result.calibration.scores, Calibration(direct).scores)


def test_a_gate_that_honest_images_cannot_pass_says_so():
    result = diffmem.audit(
        UNSEEN[300:], TRAINING, rule="calibrated", alarms=0.05, holdout=UNSEEN[:300], second_look=False
    )
    assert "honest images would fail too: ask for alarms below 0.01" in str(result.gate(require_below=0.01))
    assert "honest" not in str(result.gate(require_below=0.06))
    assert result.gate(max_copies=result.total).passed


@pytest.mark.parametrize("features", ["hash", "aligned", means, "precomputed"])
def test_pages_of_other_features(features, tmp_path):
    generated, training = np.concatenate([TRAINING[:5], UNSEEN[:25]]), TRAINING
    options = {"rule": "calibrated", "alarms": 0.02, "holdout": UNSEEN[100:300]}
    if features == "precomputed":
        generated, training, options["holdout"] = unit(30), unit(90, seed=1), unit(200, seed=2)
    result = diffmem.audit(generated, training, features=features, **options)
    page = result.save(tmp_path / "report").read_text()
    assert "gray levels" not in page
    assert "Not covered: " in page
    assert page.count("<figure") == 0 if features == "precomputed" else page.count("<figure") >= 30
    assert "d1/d2 &lt;" not in page
    assert (tmp_path / "report" / "samples.csv").read_text().count("\n") == 31
    assert html.escape(result.rule.score_name, quote=False) in page.replace("&#39;", "'")
    assert "images are copies" in result._repr_html_()
