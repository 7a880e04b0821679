"""Audits through an index folder: exactly those of the training set itself, or within what is said of them."""

import json
import pickle

import numpy as np
import pytest
from command_line import run

import diffmem
from diffmem.errors import InputError
from diffmem.features import load_features
from diffmem.indexes import build_index, open_index
from diffmem.memorization import CopyDetector, CriterionDetector

NOT_COMPARED = ("settings", "versions", "holdout")


@pytest.fixture(scope="module")
def patches():
    """Training images with duplicates that lie far apart, images that are copies or not, and unseen ones."""
    images = diffmem.load_images("builtin:patches?n=1100", resize=8).images
    training = images[:800].copy()
    training[700:712], training[790] = training[3], training[5]
    noise = np.random.default_rng(0).normal(0, 10, training[:60].shape).round().astype(np.int64)
    noisy = np.clip(training[:60] + noise, 0, 255).astype(np.uint8)
    mirrored = training[100:110, :, :, ::-1]
    return training, np.concatenate([images[800:950], training[:20], noisy, mirrored]), images[950:]


@pytest.fixture(scope="module")
def folders(patches, tmp_path_factory):
    """The same training set in three shards: searched exactly, and, where FAISS is there, with codes."""
    home = tmp_path_factory.mktemp("indexes")
    for part in range(3):
        np.save(home / f"part{part}.npy", patches[0][part * 300 : (part + 1) * 300])
    sources = [str(home / f"part{part}.npy") for part in range(3)]
    made = {"flat": build_index(sources, home / "flat", workers=1)}
    try:
        import faiss  # noqa: F401
    except ImportError:
        return made
    return made | {"codes": build_index(sources, home / "codes", index="IVF16,SQ8", workers=1)}


def assert_same(ours, theirs):
    found, expected = ours.to_dict(), theirs.to_dict()
    # The groups that an index lists are those it was built with: identical images.
    listed = ours.settings["duplicate_radius"] == ours.settings["listed_radius"]
    for name, value in expected.items():
        if name not in NOT_COMPARED and (listed or name != "duplicates"):
            assert found[name] == value, name
    if theirs.holdout is not None:
        assert_same(ours.holdout, theirs.holdout)


@pytest.mark.parametrize(
    "options",
    [
        {"holdout": True}, {"flip": True, "second_look": False}, {"duplicate_radius": 25, "second_look": False},
        {"holdout": True, "rule": "calibrated", "alarms": 0.05, "second_look": False},
    ],
    ids=str,
)  # fmt: skip
def test_a_flat_index_gives_what_the_training_set_gives(patches, folders, options):
    training, images, unseen = patches
    options = {**options, **({"holdout": unseen} if "holdout" in options else {})}
    exact = diffmem.audit(images, training, **options)
    assert_same(diffmem.audit(images, index=folders["flat"].path, **options), exact)
    if "codes" not in folders:
        return
    options["second_look"] = False
    some = diffmem.audit(images, index=folders["codes"], verify=60, **options)
    low, high = some.verification.count_interval
    assert low <= exact.count <= high
    assert some.interval[0] <= exact.interval[0] + 1e-9
    assert exact.interval[1] <= some.interval[1] + 1e-9
    assert diffmem.audit(images, index=folders["codes"], exact=True, **options).count == exact.count


def test_batches_pickles_and_pages(patches, folders, tmp_path):
    training, images, _ = patches
    images = images[100:200]
    for index in folders:
        detector = CopyDetector(index=folders[index], keep_images=True, verify=50)
        for start in range(0, len(images), 60):
            detector.update(images[start : start + 60])
        again = pickle.loads(pickle.dumps(detector)).compute()
        result = detector.compute()
        assert again.count == result.count
        page = result.save(tmp_path / index).read_text()
        assert page.count("<img") > 20  # from the stored pixels
        assert json.loads((tmp_path / index / "report.json").read_text())["count"] == result.count
    assert diffmem.audit(images, folders["flat"].path).count == diffmem.audit(images, training).count


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_indexes_of_vectors(metric, tmp_path):
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(500, 24)).astype(np.float32)
    images = np.concatenate([vectors[:30] + rng.normal(0, 0.1, (30, 24)), rng.normal(size=(100, 24))]).astype(
        np.float32
    )
    for part in range(2):
        np.save(tmp_path / f"{part}.npy", vectors[part * 250 : (part + 1) * 250])
    sources = [str(tmp_path / f"{part}.npy") for part in range(2)]
    given = load_features(images, metric=metric)
    exact = diffmem.audit(given, load_features(vectors, metric=metric), features="precomputed")
    index = build_index(sources, tmp_path / "flat", features="precomputed", metric=metric, workers=1)
    flat = diffmem.audit(given, index=index)
    assert (flat.memorized == exact.memorized).all()
    np.testing.assert_array_equal(flat.neighbors.indices, exact.neighbors.indices)
    np.testing.assert_allclose(flat.neighbors.distances, exact.neighbors.distances, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="24"):
        diffmem.audit(load_features(images[:, :20].copy(), metric=metric), index=index)
    pytest.importorskip("faiss", reason="FAISS is optional: pip install 'diffmem[faiss]'")
    build_index(sources, tmp_path / "codes", features="precomputed", metric=metric, index="IVF8,SQ8", workers=1)
    some = diffmem.audit(given, index=tmp_path / "codes", verify=60)
    low, high = some.verification.count_interval
    assert low <= exact.count <= high


def test_indexes_of_features(patches, tmp_path):
    training, images, unseen = patches
    np.save(tmp_path / "images.npy", training)
    index = build_index([str(tmp_path / "images.npy")], tmp_path / "hash", features="hash", workers=1)
    options = {"rule": "similarity", "threshold": 5, "second_look": False}
    holdout = np.concatenate([unseen, training[40:44]])
    exact = diffmem.audit(images, training, features="hash", holdout=holdout, **options)
    ours = diffmem.audit(images, index=index, holdout=holdout, **options)
    assert (ours.memorized == exact.memorized).all()
    assert [image.training_index for image in ours.holdout.left_out] == [40, 41, 42, 43]
    assert ours.holdout.count == exact.holdout.count


def test_pictures_of_an_index_of_hashes(tmp_path):
    digits = diffmem.load_images("builtin:digits", resize=16)
    training, others = digits.images[:200], digits.images[1000:1020]
    disguised = np.roll(training[:8], 1, axis=3) // 2 + 40
    np.save(tmp_path / "generated.npy", np.concatenate([training[20:24], disguised, others]))
    np.save(tmp_path / "training.npy", training)
    build_index(tmp_path / "training.npy", tmp_path / "index", features="hash", workers=1)
    command = ["audit", tmp_path / "generated.npy", "--index", tmp_path / "index", "--out"]
    pages, reports = [], []
    for name in ("there", "gone"):
        assert run(*command, tmp_path / name).returncode == 0
        pages.append((tmp_path / name / "report.html").read_text())
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
        (tmp_path / "training.npy").unlink(missing_ok=True)
    assert pages[0].count("<img") >= 3 * 24
    assert "could not be read from the sources of the index" not in pages[0]
    assert "<img" not in pages[1]
    assert pages[1].count("could not be read from the sources of the index") == 1
    there, gone = reports
    assert gone["memorized"] == there["memorized"]
    assert there["count"] >= 4
    in_memory = diffmem.audit(np.load(tmp_path / "generated.npy"), training, features="hash")
    assert there["verdicts"] == in_memory.verdicts
    assert there["near_count"] >= 4
    assert gone["near_count"] == 0
    scores = [np.nan if each is None else each for each in there["second_look"]["scores"]]
    np.testing.assert_allclose(scores, in_memory.look.scores)
    assert "of the " not in " ".join(gone["blind_spots"])
    assert gone["second_look"] is None


def test_what_an_index_cannot_do_is_said_in_a_line(patches, folders, tmp_path):
    training, images, _ = patches
    flat = folders["flat"]
    for words, call in {
        "give the training images, or index=": lambda: diffmem.audit(images),
        "no such folder": lambda: diffmem.audit(images, index=tmp_path / "nothing"),
        "holds the training set already": lambda: diffmem.audit(images, training, index=flat),
        "must be those of the index": lambda: diffmem.audit(images, index=flat, features="hash"),
        "aligned images are searched in": lambda: diffmem.audit(images, index=flat, features="aligned"),
        "not its index": lambda: CriterionDetector(flat, "m3"),
        "measures compare all images in memory": lambda: diffmem.measure(images, flat.path),
        "8x8": lambda: diffmem.audit(np.zeros((3, 3, 16, 16), np.uint8), index=flat),
    }.items():
        with pytest.raises(InputError, match=words):
            call()
    copy = tmp_path / "copy"
    build_index(list(flat.sources), copy, workers=1)
    shard = open_index(copy).shards[1].folder / "vectors.npy"
    shard.unlink()
    with pytest.raises(InputError, match=r"vectors\.npy.*diffmem index verify"):
        diffmem.audit(images, index=copy)
