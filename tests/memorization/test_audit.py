"""The audit against a few lines of plain Python, and against cases whose answer is known."""

import json
from fractions import Fraction

import numpy as np
import pytest
from examples_made import at_most
from hypothesis import given, settings
from hypothesis import strategies as st

import diffmem
from diffmem.data import ImageSet
from diffmem.errors import InputError
from diffmem.search import FaissIndex, TrainingIndex, distinct, find_duplicates


def plain_audit(generated, training, threshold, duplicates, radius, flip):
    """The definition, word by word: (memorized, first, second, d1², d2²) for each image; sets are small."""
    wide = training.astype(np.int64)

    def distance(x, y):
        return min(int(np.square(x.astype(np.int64) - view).sum()) for view in ((y, y[..., ::-1]) if flip else (y,)))

    limit = Fraction(radius) ** 2 * wide[0].size
    results = []
    for x in generated:
        ranked = sorted((distance(x, y), i) for i, y in enumerate(wide))
        first = ranked[0]
        rest = [pair for pair in ranked[1:] if duplicates == "keep" or distance(wide[first[1]], wide[pair[1]]) > limit]
        if not rest:
            return None
        second = rest[0]
        memorized = first[0] == 0 or first[0] < Fraction(threshold) ** 2 * second[0]
        results.append((memorized, first[1], second[1], first[0], second[0]))
    return results


@given(
    seed=st.integers(0, 2**32 - 1),
    threshold=st.sampled_from(["1/3", "1/2", "9/10"]),
    duplicates=st.sampled_from(["collapse", "keep"]),
    radius=st.sampled_from([0, 1.5, 4]),
    flip=st.booleans(),
    widest=st.sampled_from([3, 64]),
)
@settings(max_examples=at_most(40))
def test_equals_the_definition(seed, threshold, duplicates, radius, flip, widest):
    random = np.random.default_rng(seed)
    originals = random.integers(0, 256, (4, 1, 3, 4))
    everyone = originals[random.integers(0, 4, 24)] + random.integers(-4, 5, (24, 1, 1, 1)) * random.integers(
        0, 2, (24, 1, 3, 4)
    )
    everyone = np.where(random.integers(0, 2, (24, 1, 1, 1)), everyone, everyone[..., ::-1])
    images = np.clip(everyone, 0, 255).astype(np.uint8)
    training, generated = images[:16], images[16:]
    options = {"threshold": threshold, "duplicates": duplicates, "duplicate_radius": radius, "flip": flip}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distinct, "WIDEST_QUERY", widest)  # so that large groups are left out as a whole, too
        try:
            result = diffmem.audit(generated, training, **options)
        except InputError as error:
            if "distinct" not in str(error):
                assert plain_audit(generated, training, threshold, duplicates, radius, flip) is None
            return
    expected = plain_audit(generated, training, threshold, duplicates, radius, flip)
    memorized, first, second, d1, d2 = (np.array(values) for values in zip(*expected, strict=True))
    np.testing.assert_array_equal(result.memorized, memorized)
    np.testing.assert_array_equal(result.neighbors.indices, np.stack([first, second], 1))
    np.testing.assert_array_equal(result.neighbors.squared_distances, np.stack([d1, d2], 1))
    raw = plain_audit(generated, training, threshold, "keep", radius, flip)
    np.testing.assert_array_equal(result.raw_memorized, [row[0] for row in raw])
    published = [(d1 > 0 and row[0]) or d1 == 0 < d2 for row in raw for d1, d2 in [row[3:]]]  # 0/0 is not a number
    np.testing.assert_array_equal(result.published_memorized, published)
    assert result.to_dict()["published_count"] == sum(published) <= result.raw_count
    assert result.count == sum(memorized)
    assert sum(source.count for source in result.sources) == result.count


@pytest.fixture
def digits() -> diffmem.ImageSet:
    return diffmem.load_images("builtin:digits")


def test_a_duplicated_training_image_hides_its_copies_from_the_raw_rule(digits):
    """The hole in the rule that collapsing closes."""
    training = np.concatenate([digits.images[:500], digits.images[:1]])
    near_copy = digits.images[:1].copy()
    near_copy[0, 0, 4, 4] ^= 16
    result = diffmem.audit(near_copy, training)
    assert (result.count, result.raw_count) == (1, 0)
    assert [group.tolist() for group in result.duplicates] == [[0, 500]]
    assert result.neighbors.indices[0, 0] == 0
    assert result.raw_neighbors.indices[0].tolist() == [0, 500]
    assert diffmem.audit(near_copy, training, duplicates="keep").count == 0


def test_a_chain_of_duplicates_does_not_invent_copies():
    """Images 2 gray levels apart from one to the next, within a radius of 2: the second neighbor of an image in the
    middle of the chain is 4 away from the first one, not beyond the chain's end."""
    chain = np.arange(0, 200, 2, dtype=np.uint8).reshape(-1, 1, 1, 1)
    result = diffmem.audit(np.full((1, 1, 1, 1), 101, np.uint8), chain, duplicate_radius=2)
    assert len(result.duplicates) == 1  # all in one group
    assert result.neighbors.indices.tolist() == [[50, 52]]
    assert result.count == 0


def test_holdout_images_of_the_training_set_are_named_and_left_out(digits):
    training, unseen = digits.select(slice(0, 1000)), digits.select(slice(1000, 1797))
    mixed = ImageSet(np.concatenate([unseen.images[:100], digits.images[7:27]]), source="mixed")
    clean = diffmem.audit(training.select(slice(0, 50)), training, holdout=unseen.select(slice(0, 100)))
    result = diffmem.audit(training.select(slice(0, 50)), training, holdout=mixed)
    assert (result.holdout.count, result.holdout.total) == (clean.holdout.count, 100)
    assert [(image.index, image.training_index) for image in result.holdout.left_out] == [
        (100 + i, 7 + i) for i in range(20)
    ]
    assert result.to_dict()["holdout"]["left_out"][0]["training_name"] == training.name(7)
    with pytest.raises(InputError, match=r"holdout: all 20 images .* are in the training set"):
        diffmem.audit(training.select(slice(0, 50)), training, holdout=digits.images[7:27])
    mirrored = {"holdout": np.ascontiguousarray(digits.images[7:30, ..., ::-1])}
    assert len(diffmem.audit(digits.images[:5], training, **mirrored).holdout.left_out) < 3
    with pytest.raises(InputError, match="are in the training set"):
        diffmem.audit(digits.images[:5], training, flip=True, **mirrored)


def test_mirrored_copies_are_found_only_when_asked_for(digits):
    mirrored = digits.images[100:110, ..., ::-1]
    training = digits.images[:500]
    assert diffmem.audit(mirrored, training, flip=True).count == 10
    assert diffmem.audit(mirrored, training).count < 10
    result = diffmem.audit(np.concatenate([mirrored, digits.images[100:101]]), training, flip=True)
    assert result.neighbors.mirrored[:, 0].tolist() == [True] * 10 + [False]


def test_holdout_gives_the_false_alarm_rate(digits):
    training, unseen = digits.select(slice(0, 1000)), digits.select(slice(1000, 1797))
    result = diffmem.audit(training.select(slice(0, 50)), training, holdout=unseen)
    assert (result.ratio, result.count, result.total) == (1.0, 50, 50)
    assert result.holdout.total == 797
    assert result.holdout.ratio < 0.05
    assert result.holdout.to_dict()["ratio"] == result.holdout.ratio


def test_to_dict_is_plain_json_under_the_same_names(digits):
    result = diffmem.audit(
        digits.images[:20], digits.select(slice(10, 300)), holdout=digits.images[1000:1010], flip=True
    )
    plain = json.loads(json.dumps(result.to_dict()))
    for name in ("ratio", "count", "total", "raw_ratio", "training_size", "mean_rms"):
        assert plain[name] == getattr(result, name)
    assert plain["interval"] == list(result.interval)
    assert plain["memorized"] == result.memorized.tolist()
    assert plain["neighbors"]["squared_distances"] == result.neighbors.squared_distances.tolist()
    assert plain["settings"]["threshold"] == "1/3"
    assert plain["sources"][0]["name"] == result.sources[0].name
    assert "torch" in plain["versions"]
    assert f"{result.count} of 20" in repr(result)


def test_floats_are_audited_too(digits):
    floats = digits.images.astype(np.float32) / 127.5 - 1
    as_floats = diffmem.audit(floats[:300], floats[200:])
    as_bytes = diffmem.audit(digits.images[:300], digits.images[200:])
    np.testing.assert_array_equal(as_floats.memorized, as_bytes.memorized)
    assert as_floats.neighbors.squared_distances.dtype == np.float64
    np.testing.assert_allclose(as_floats.neighbors.rms * 127.5, as_bytes.neighbors.rms, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["memory", "mapped", "stored", "float", "FAISS", "stored FAISS"])
def test_an_index_of_other_images_is_refused(digits, tmp_path, kind):
    """Same count, size and dtype: order and content decide, wherever the images lie."""
    images = digits.images[:300].copy()
    options = {}
    if "FAISS" in kind:
        pytest.importorskip("faiss", reason="FAISS is optional: pip install 'diffmem[faiss]'")
        options = {"method": "faiss"}
    if kind == "float":
        images = images.astype(np.float32)
    if kind == "mapped":
        np.save(tmp_path / "images.npy", images)
        index = TrainingIndex(np.load(tmp_path / "images.npy", mmap_mode="r"))
    else:
        index = TrainingIndex(images, **options)
    if "stored" in kind:
        index.save(tmp_path / "index")
        index = TrainingIndex.load(tmp_path / "index")
    generated = images[5:25].copy()
    result = diffmem.audit(generated, images, index=index)
    assert (result.count, result.neighbors.indices[:, 0].tolist()) == (20, list(range(5, 25)))
    altered = images.copy()
    altered[299, 0, 7, 7] += 1
    for other in (altered, images[::-1]):
        with pytest.raises(InputError, match="index holds 300 images, but not those of the training set"):
            diffmem.audit(other[:20], other, index=index)
    with pytest.raises(InputError, match="index holds 300 images, the training set 299"):
        diffmem.audit(generated, images[:299], index=index)
    with pytest.raises(InputError, match="not those of the training set"):
        find_duplicates(altered, 2, index=index)
    if kind == "memory":  # the array that the index shares memory with
        images[0] = images[1]
        with pytest.raises(InputError, match="not those of the training set"):
            diffmem.audit(generated, images, index=index)


small = np.arange(4 * 3 * 2 * 2, dtype=np.uint8).reshape(4, 3, 2, 2)


@pytest.mark.parametrize(
    ("generated", "training", "options", "words"),
    [
        (small, small[:1], {}, "two distinct training images"),
        (small, np.repeat(small[:1], 5, 0), {}, "5 image.s., 1 distinct"),
        (small, small, {"duplicate_radius": 300}, "smaller duplicate radius"),
        (small[:, :1], small, {}, "color='gray'"),
        (small[..., :1], small, {}, "resize=1"),
        (np.repeat(small, 3, 3), np.repeat(small, 2, 3), {}, "resize=2"),
        (small.astype(np.float32), small, {}, r"float32.*uint8.*value_range=\(0, 255\)"),
        (small / 255, small, {}, r"value_range=\(0, 1\)"),
        (small, small / 127.5 - 1, {}, r"value_range=\(-1, 1\)"),
        (small, small / 127.5 - 1, {"value_range": (0, 1)}, r"do not lie within value_range=\(0, 1\)"),
        (small, small, {"value_range": (1, 0)}, "value_range must be"),
        (small, small, {"value_range": {"test": (0, 1)}}, "test is not one of"),
        (small[:0], small, {}, "no images"),
        (small, small[:0], {}, "no images"),
        (np.full((1, 3, 2, 2), np.nan, np.float32), small.astype(np.float32), {}, "NaN"),
        (small, small, {"duplicates": "ignore"}, "collapse"),
        (small, small, {"duplicate_radius": -1}, "radius"),
        (small, small, {"threshold": 0}, "threshold"),
        (small, small, {"holdout": small[:, :1]}, "holdout"),
    ],
)
def test_bad_input_is_a_value_error_that_says_what_to_do(generated, training, options, words):
    with pytest.raises(ValueError, match=words):
        diffmem.audit(generated, training, **options)


def test_faiss_by_name_reports_its_recall(tmp_path):
    pytest.importorskip("faiss", reason="FAISS is optional: pip install 'diffmem[faiss]'")
    training = diffmem.load_images("builtin:patches?n=1500", resize=8)
    copies = training.images[:80]
    exact = diffmem.audit(copies, training, index="exact")
    assert exact.settings["search"] == {"method": "exact"}
    flat = diffmem.audit(copies, training, index="flat", flip=True)
    assert flat.count == exact.count == 80
    assert not flat.warnings
    search = flat.settings["search"]
    assert (search["index"], search["recall_nearest"], search["recall_second"]) == ("Flat", 1.0, 1.0)
    assert "It found 100 % of the nearest" in flat.save(tmp_path).read_text()
    poor = FaissIndex(training, "PCA1,IVF64,PQ1x1", nprobe=1, candidates=2)
    poor = diffmem.audit(copies, training, index=poor)
    assert poor.settings["search"]["recall_second"] < 0.95
    assert any("of the second nearest training images" in warning for warning in poor.warnings)
    assert not poor.reliable
    with pytest.raises(InputError, match="FAISS cannot build"):
        diffmem.audit(copies, training, index="IVF1000000,Flat")
