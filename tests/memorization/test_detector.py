"""A stream of images against the audit of all of them at once."""

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffmem
from diffmem.data import ImageSet
from diffmem.errors import InputError
from diffmem.memorization import CopyDetector, Detection
from diffmem.memorization.plausibility import SAMPLE, SetFigures
from diffmem.search import TrainingIndex


def some_sets(seed, dtype=np.uint8):
    """Training, generated and unseen images: duplicates, versions, copies, mirrored copies and others."""
    random = np.random.default_rng(seed)
    originals = random.integers(0, 256, (5, 1, 3, 4))
    everyone = originals[random.integers(0, 5, 60)] + random.integers(-4, 5, (60, 1, 1, 1)) * random.integers(
        0, 2, (60, 1, 3, 4)
    )
    everyone = np.where(random.integers(0, 2, (60, 1, 1, 1)), everyone, everyone[..., ::-1])
    images = np.clip(everyone, 0, 255).astype(np.uint8).astype(dtype)
    return images[:25], images[25:50], np.concatenate([images[50:], (255 - images[50:]).astype(dtype)])


def outcome(function, *arguments, **options):
    """What a function returns, or what its InputError says."""
    try:
        return function(*arguments, **options)
    except InputError as error:
        return str(error)


def split(images, cuts):
    return [part for part in np.split(images, sorted(cuts)) if len(part)]


def assert_same(streamed, whole, *, kept=True):
    ours, theirs = streamed.to_dict(), whole.to_dict()
    if not kept:
        assert ours["settings"]["generated"].pop("fingerprint") is None
        theirs = json.loads(json.dumps(theirs))
        del theirs["settings"]["generated"]["fingerprint"]
    assert json.dumps(ours) == json.dumps(theirs)
    for name in ("indices", "squared_distances"):
        for which in ("neighbors", "raw_neighbors"):
            ours, theirs = (getattr(getattr(each, which), name) for each in (streamed, whole))
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 25), max_size=6),
    options=st.fixed_dictionaries(
        {
            "threshold": st.sampled_from(["1/3", "1/2", 0.9]),
            "duplicates": st.sampled_from(["collapse", "keep"]),
            "duplicate_radius": st.sampled_from([0, 1.5, 4]),
            "flip": st.booleans(),
        }
    ),
    holdout=st.booleans(),
    kept=st.booleans(),
    dtype=st.sampled_from([np.uint8, np.float32, np.float64]),
)
@settings(max_examples=25)
def test_any_division_into_batches_gives_the_audit_of_all(seed, cuts, options, holdout, kept, dtype):
    training, generated, unseen = some_sets(seed, dtype)
    options = {**options, "holdout": unseen if holdout else None}
    whole = outcome(diffmem.audit, generated, training, **options)
    if isinstance(whole, str):
        assert outcome(lambda: CopyDetector(training, **options).update(generated)) == whole
        return
    detector = CopyDetector(training, **options, keep_images=kept)
    found = [detector.update(batch) for batch in split(generated, cuts)]
    assert_same(detector.compute(), whole, kept=kept)
    assert (detector.count, detector.total) == (whole.count, whole.total)
    np.testing.assert_array_equal(np.concatenate([each.memorized for each in found]), whole.memorized)
    assert_same(detector.compute(), whole, kept=kept)  # asked again
    again = pickle.loads(pickle.dumps(detector))
    again.reset()
    assert again.total == 0
    for batch in split(generated, [25 - cut for cut in cuts]):
        again.update(torch.from_numpy(batch))
    ours = again.compute()
    assert ours.settings["generated"]["source"] == "tensor"
    ours.settings["generated"]["source"] = "array"
    assert_same(ours, whole, kept=kept)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_what_speaks_against_a_verdict_is_seen_in_a_stream(dtype):
    """More images than the sample that is looked at; identical, dark, of a single color, on another scale."""
    random = np.random.default_rng(0)
    training = random.integers(0, 256, (300, 1, 6, 6)).astype(dtype)
    generated = random.integers(0, 256, (2 * SAMPLE, 1, 6, 6)) // 4
    generated[random.permutation(len(generated))[: len(generated) // 5]] = 7
    if dtype == np.float32:
        generated = generated / 255 * 2 - 1
    for images in (generated.astype(dtype), np.repeat(generated[:1], 1500, axis=0).astype(dtype)):
        detector = CopyDetector(training)
        for batch in np.array_split(images, 37):
            detector.update(batch)
        whole = outcome(diffmem.audit, images, training)
        streamed = outcome(detector.compute)
        if isinstance(whole, str):
            assert "different scales" in whole
            assert streamed == whole
        else:
            assert whole.warnings
            assert streamed.warnings == whole.warnings


@given(cuts=st.lists(st.integers(0, 3000), max_size=12), total=st.sampled_from([5, SAMPLE, SAMPLE + 1, 3000]))
@settings(max_examples=30)
def test_the_sample_is_spread_evenly_whatever_the_batches_are(cuts, total):
    images = np.arange(total, dtype=np.float32).reshape(-1, 1, 1, 1)
    figures = SetFigures()
    for batch in split(images, [cut for cut in cuts if cut < total]):
        figures.add(batch)
    rows = figures.sample[:, 0, 0, 0]
    np.testing.assert_array_equal(rows, SetFigures.of(images).sample[:, 0, 0, 0])
    assert len(rows) == min(total, SAMPLE)
    assert figures.extremes == (0, total - 1)
    assert np.diff(rows).max() <= 2 + 2 * total // len(rows)  # no gap in it


def test_each_image_is_searched_once(monkeypatch):
    training, generated = (np.random.default_rng(i).integers(0, 256, (50, 3, 4, 4), np.uint8) for i in (0, 1))
    searched, query = [], TrainingIndex.query

    def counted(self, images, k=2, **options):
        searched.append(len(images))
        return query(self, images, k, **options)

    monkeypatch.setattr(TrainingIndex, "query", counted)
    diffmem.audit(generated, training, holdout=generated[:20])
    assert sum(searched) == 70
    detector = CopyDetector(training)
    searched.clear()
    found = detector.judge(generated[:20])
    assert detector.total == 0  # judge only looks
    detector.update(generated[:20], found)
    detector.update(generated[20:])
    detector.compute()
    assert sum(searched) == 50
    with pytest.raises(InputError, match="20 images, but 10 are given"):
        detector.update(generated[:10], found)


def test_joined_decisions_and_named_sets():
    training, generated, _ = some_sets(3)
    sets = [ImageSet(generated[:9], [f"a{i}" for i in range(9)], source="a"), ImageSet(generated[9:], source="b")]
    detector = CopyDetector(training, flip=True)
    joined = Detection.join([detector.judge(each) for each in sets])
    whole = diffmem.audit(generated, training, flip=True)
    np.testing.assert_array_equal(joined.memorized, whole.memorized)
    np.testing.assert_array_equal(joined.neighbors.mirrored, whole.neighbors.mirrored)
    for each in sets:
        detector.update(each)
    result = detector.compute()
    assert [result.generated.name(row) for row in (0, 8, 9, 24)] == ["a0", "a8", "#9", "#24"]
    assert result.settings["generated"]["source"] == "a and 1 more"


def test_a_batch_may_be_overwritten_once_it_is_added():
    training, generated, _ = some_sets(4)
    detector, batch = CopyDetector(training, keep_images=True), np.empty_like(generated[:5])
    for start in range(0, 25, 5):
        batch[:] = generated[start : start + 5]
        detector.update(batch)
    np.testing.assert_array_equal(detector.compute().generated.images, generated)


def test_without_kept_images_there_is_a_page_that_says_so(tmp_path):
    training, generated, unseen = some_sets(5)
    detector = CopyDetector(training, holdout=unseen)
    detector.update(generated)
    result = detector.compute()
    page = result.save(tmp_path).read_text()
    assert "The generated images were not kept" in page
    assert result.verdict() in result._repr_html_()
    assert len((tmp_path / "samples.csv").read_text().splitlines()) == 26


def test_bad_streams_are_refused():
    training, generated, _ = some_sets(6)
    detector = CopyDetector(training)
    with pytest.raises(InputError, match=r"call update\(\) before compute"):
        detector.compute()
    with pytest.raises(InputError, match="4x3"):
        detector.update(generated.swapaxes(2, 3))
    with pytest.raises(InputError, match="to uint8 with"):
        detector.update(generated.astype(np.float32))
    detector.update(generated)
    assert detector.total == 25  # what was refused left no trace
    floats = CopyDetector(training.astype(np.float32))
    floats.update(generated.astype(np.float32))
    with pytest.raises(InputError, match="use one dtype for all"):
        floats.update(generated.astype(np.float64))
    indexed = CopyDetector(training.astype(np.float32), index=TrainingIndex(training.astype(np.float32)))
    with pytest.raises(InputError, match="rebuild the index"):
        indexed.update(generated.astype(np.float64))
    indexed.update(generated.astype(np.float32))
    assert indexed.compute().count == floats.compute().count
    floats.reset()
    floats.update(generated.astype(np.float64))
    floats.update(generated.astype(np.float32))  # each is a float64
    assert floats.compute().count == 2 * diffmem.audit(generated, training).count
