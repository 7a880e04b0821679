"""Aligned search: what a disguised copy shows is found, and a score that disguises do not move."""

import numpy as np
import pytest
import torch

import diffmem
from diffmem.errors import InputError
from diffmem.features.aligned import AlignedMatcher, align_pairs, byte_images, reference, second_look_tensors
from diffmem.features.aligned.candidates import nearest_once
from diffmem.features.aligned.geometry import Geometry
from diffmem.ops.alignment import native


def blobs(count, channels=3, size=32, seed=0):
    """Smooth random images, as different from each other as photographs are."""
    noise = torch.randn(count, channels, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, size=(size, size), mode="bicubic")
    fine = torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed + 1))
    return (smooth * 45 + fine * 6 + 128).clamp(0, 255).byte().numpy()


TRAINING = blobs(150)


@pytest.fixture(scope="module")
def matcher():
    return AlignedMatcher(TRAINING)


def moved(images, down, right):
    """Shifted, the border continued."""
    padded = np.pad(images, ((0, 0), (0, 0), (4, 4), (4, 4)), mode="edge")
    height, width = images.shape[2:]
    return padded[:, :, 4 - down : 4 - down + height, 4 - right : 4 - right + width]


def zoomed(images, factor):
    size = round(images.shape[2] / factor)
    first = (images.shape[2] - size) // 2
    cut = torch.from_numpy(images[:, :, first : first + size, first : first + size]).float()
    return torch.nn.functional.interpolate(cut, size=images.shape[2:], mode="bilinear").byte().numpy()


DISGUISES = {
    "none": lambda x: x,
    "brighter": lambda x: (x * 0.6 + 90).astype(np.uint8),
    "darker": lambda x: x // 2,
    "colors": lambda x: (x * np.array([0.9, 0.7, 0.8])[:, None, None] + np.array([20, 60, 0])[:, None, None]).astype(
        np.uint8
    ),
    "mirrored": lambda x: x[..., ::-1],
    "shifted": lambda x: moved(x, 2, -1),
    "zoomed": lambda x: zoomed(x, 1.15),
    "all": lambda x: moved(zoomed(x, 1.15), -2, 2)[..., ::-1] // 2 + 40,
}


@pytest.mark.parametrize("name", DISGUISES)
def test_disguised_copies_are_found(matcher, name):
    found = matcher.match(DISGUISES[name](TRAINING[:12]))
    assert (found.scores.dtype, found.residuals.dtype) == (np.float64, np.float32)
    assert found.indices[:, 0].tolist() == list(range(12))
    assert found.scores.max() < 0.5
    assert (np.diff(found.residuals) >= 0).all()
    assert bool((found.mirrored == (name in ("mirrored", "all"))).all())


def test_others_are_not(matcher):
    found = matcher.match(blobs(30, seed=50))
    assert found.scores.min() > 0.7
    assert found.scores.max() < 1.2


def test_brightness_and_mirror_leave_the_score_alone(matcher):
    queries = blobs(20, seed=50)
    scores = matcher.match(queries).scores
    np.testing.assert_allclose(matcher.match(queries[..., ::-1]).scores, scores, atol=1e-5)
    np.testing.assert_allclose(matcher.match(queries * 0.5 + 300.0).scores, scores, atol=1e-5)
    np.testing.assert_allclose(matcher.match(queries / 127.5 - 1).scores, scores, atol=1e-5)
    each = queries * np.array([1.0, 1.0, 1.0])[:, None, None] + np.array([-50.0, 0, 80])[:, None, None]
    np.testing.assert_allclose(matcher.match(each).scores, scores, atol=1e-5)


def test_the_training_set_against_itself(matcher):
    own = np.arange(30)
    found = matcher.match(TRAINING[:30], exclude=own)
    assert not (found.indices == own[:, None]).any()
    assert found.scores.min() > 0.6
    assert matcher.match(TRAINING[:30]).scores.max() < 0.01


def test_batches_do_not_matter(matcher):
    queries = DISGUISES["all"](TRAINING[:9])
    together = matcher.match(queries)
    one = [matcher.match(queries[i : i + 1]) for i in range(9)]
    np.testing.assert_allclose(together.scores, [each.scores[0] for each in one], rtol=1e-4)
    assert together.indices[:, 0].tolist() == [each.indices[0, 0] for each in one]


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 16), (1, 28), (3, 64), (4, 32)])
def test_sizes_and_channels(channels, size):
    training = blobs(60, channels, size)
    step = max(1, size // 16)
    found = AlignedMatcher(training).match(moved(training[:10], step, 0) // 2)
    assert found.indices[:, 0].tolist() == list(range(10))
    assert found.scores.max() < 0.5


def test_other_shapes_than_squares():
    training = blobs(60, 3, 48)[:, :, :, 6:42]
    found = AlignedMatcher(training).match(training[:10, :, :, ::-1])
    assert found.indices[:, 0].tolist() == list(range(10))
    assert found.scores.max() < 0.05
    assert found.mirrored.all()


def test_small_sets_and_images_without_variance():
    one = AlignedMatcher(TRAINING[:1])
    assert one.match(TRAINING[:2]).residuals.shape == (2, 1)
    assert one.match(TRAINING[:1]).scores[0] < 0.01
    assert one.match(TRAINING[:1], exclude=np.zeros(1, np.int64)).scores.tolist() == [1.0]
    gray = np.full((3, 3, 32, 32), 90, np.uint8)
    for training, queries in ((TRAINING[:30], gray), (gray, TRAINING[:3]), (gray, gray)):
        found = AlignedMatcher(training).match(queries)
        assert found.scores.tolist() == [1.0] * 3
        assert (found.residuals == 1).all()


@pytest.mark.parametrize("times", [1, 3, 12])
def test_copies_of_what_the_training_set_holds_several_times(times):
    copies = [moved(TRAINING[:3], i % 3 - 1, i % 2) // (1 + i % 2) + i for i in range(times)]
    found = AlignedMatcher(np.concatenate([TRAINING, *copies])).match(moved(TRAINING[:3], 1, 1) // 2)
    assert found.scores.max() < 0.5
    for own, indices in enumerate(found.indices):
        versions = [own, *(len(TRAINING) + 3 * i + own for i in range(times))]
        assert set(indices[: times + 1]) == set(versions)


def test_views_and_files_that_cannot_be_written_to(tmp_path, matcher):
    np.save(tmp_path / "images.npy", TRAINING[:9])
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    for images in (
        mapped,
        mapped[:1][::-1],
        mapped[..., ::-1],
        mapped.transpose(0, 1, 3, 2).copy().transpose(0, 1, 3, 2),
    ):
        assert matcher.match(images).indices[0, 0] == 0
        assert AlignedMatcher(images).match(images[:1]).scores[0] < 0.01
    assert align_pairs(mapped, mapped).residuals.max() < 0.01


def test_bad_arguments(matcher):
    with pytest.raises(InputError, match="16x16 with 3 channels, the training images 32x32 with 3 channels"):
        matcher.match(blobs(2, size=16))
    with pytest.raises(InputError, match="NaN"):
        matcher.match(np.full((1, 3, 32, 32), np.nan, np.float32))
    with pytest.raises(InputError, match="exclude must hold one index per image"):
        matcher.match(TRAINING[:3], exclude=np.arange(2))
    with pytest.raises(InputError, match="too small to align"):
        AlignedMatcher(np.zeros((5, 1, 3, 3), np.uint8))
    with pytest.raises(InputError, match="candidates must be at least 1"):
        AlignedMatcher(TRAINING, candidates=0)


def test_each_candidate_once():
    indices = np.array([[4, 2, 4, 7, 2, 9], [1, 1, 1, 1, 1, 1]])
    distances = np.array([[3.0, 1.0, 2.0, 2.0, 5.0, 0.5], [6.0, 5, 4, 3, 2, 1]])
    assert nearest_once(indices, distances, 3, None).tolist() == [[9, 2, 4], [1, -1, -1]]
    assert nearest_once(indices, distances, 3, np.array([9, 1])).tolist() == [[2, 4, 7], [-1, -1, -1]]


@pytest.mark.parametrize("name", DISGUISES)
def test_pairs_are_brought_together(name):
    training = blobs(12, size=64)
    generated = DISGUISES[name](training)
    pairs = align_pairs(generated, training)
    assert pairs.aligned_training.dtype == pairs.difference.dtype == np.uint8
    before = np.abs(generated.astype(int) - training).mean(axis=(1, 2, 3))
    after = pairs.difference[:, :, 8:-8, 8:-8].mean(axis=(1, 2, 3))
    assert (after < 10).all()
    assert name == "none" or (after < before / 3).all()
    assert (pairs.residuals < 0.3).all()


def test_the_transform_of_a_pair():
    training = blobs(4, size=32)
    generated = (moved(training, 2, -3)[..., ::-1] * 0.5 + 20).astype(np.uint8)
    pairs = align_pairs(generated, training)
    assert pairs.mirrored.all()
    assert np.allclose(pairs.scale, 1, atol=0.01)
    assert np.allclose(pairs.shift, [2, -3], atol=0.05)
    assert np.allclose(pairs.maps, [[1, 0, -3], [0, 1, 2]], atol=0.05)
    assert np.allclose(pairs.gain, 0.5, atol=0.02)
    assert np.allclose(pairs.offset, 20, atol=2)


def test_pairs_that_cannot_be_compared():
    with pytest.raises(InputError, match="of one shape"):
        align_pairs(TRAINING[:3], TRAINING[:2])
    assert len(align_pairs(TRAINING[:0], TRAINING[:0])) == 0
    assert align_pairs(TRAINING[:1][::-1], TRAINING[:1]).residuals[0] < 0.01
    gray = np.full((2, 3, 32, 32), 90, np.uint8)
    flat = align_pairs(gray, TRAINING[:2])
    assert (flat.residuals == 1).all()
    assert (flat.difference == 0).all()


def test_digits_of_the_package():
    digits = diffmem.load_images("builtin:digits").images
    found = AlignedMatcher(digits[:1000]).match(moved(digits[:30], 1, 0) // 2)
    assert (found.indices[:, 0] == np.arange(30)).mean() > 0.8


@pytest.mark.parametrize(("channels", "size", "count"), [(3, 32, 60), (1, 8, 40), (3, (13, 20), 5)])
def test_equals_the_plain_recipe(channels, size, count):
    height, width = size if isinstance(size, tuple) else (size, size)
    training = blobs(count, channels, 32)[:, :, :height, :width]
    queries = np.concatenate(
        [blobs(4, channels, 32, seed=50)[:, :, :height, :width], moved(training[:2], 1, 0)[..., ::-1], training[2:3]]
    )
    matcher = AlignedMatcher(training)
    found = matcher.match(queries)
    stage = matcher._index
    for number, image in enumerate(torch.from_numpy(np.ascontiguousarray(queries))):
        arguments = torch.from_numpy(np.ascontiguousarray(training)), image, stage.mean, stage.components
        score, indices, residuals = reference.match(*arguments)
        assert found.scores[number] == pytest.approx(score, abs=2e-3)
        assert sorted(found.indices[number]) == sorted(indices)
        np.testing.assert_allclose(found.residuals[number], residuals, atol=2e-3)


def test_a_part_of_the_training_set_stays_where_it_is_when_more_is_asked():
    few, many = (AlignedMatcher(TRAINING, candidates=count).match(TRAINING[:4] // 2) for count in (5, 30))
    assert few.indices.shape == (4, 5)
    assert many.indices.shape == (4, 30)
    assert (few.indices[:, 0] == many.indices[:, 0]).all()


@pytest.mark.skipif(native.unavailable("cpu") is not None, reason=f"no compiled alignment: {native.unavailable('cpu')}")
@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (1, 1, 4, 7), (2, 5, 17, 16), (0, 3, 8, 8)])
def test_variants_of_the_core_are_those_of_the_plain_products(shape):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 255
    geometry = Geometry(*shape[2:])
    ours, plain = geometry.variants(images), geometry.variants(images.double())
    torch.testing.assert_close(ours.double(), plain, rtol=0, atol=255 * 2**-22)


@pytest.mark.parametrize(
    ("kind", "size", "factor"), [(np.uint8, 32, 2), (np.float32, 32, 2), (np.uint8, 27, 3), (np.uint8, 30, 4)]
)
def test_pooling_is_pytorchs(kind, size, factor):
    images = (np.random.default_rng(4).random((5, 3, size, size)) * 255).astype(kind)
    rows = np.array([4, 0, 0, 2])
    wanted = torch.nn.functional.avg_pool2d(torch.from_numpy(images).float()[rows], factor)
    assert torch.equal(second_look_tensors._pooled(images, rows, Geometry(size, size), factor), wanted)
    mirrored = images[..., ::-1]  # not contiguous
    wanted = torch.nn.functional.avg_pool2d(torch.from_numpy(mirrored.copy()).float()[rows], factor)
    assert torch.equal(second_look_tensors._pooled(mirrored, rows, Geometry(size, size), factor), wanted)


@pytest.mark.skipif(native.unavailable("cpu") is not None, reason=f"no compiled alignment: {native.unavailable('cpu')}")
@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (1, (28, 28)), (2, (13, 20)), (1, (4, 9))])
def test_small_images_of_bytes_are_aligned_as_tensors_are(channels, size):
    height, width = size
    training = np.ascontiguousarray(blobs(40, channels)[:, :, :height, :width])
    gray = np.full((1, channels, height, width), 90, np.uint8)
    images = np.concatenate([training[:12, :, :, ::-1] // 2, moved(training[:9], 1, 0), training[:1], gray])
    candidates = np.random.default_rng(1).integers(0, 40, (len(images), 8))
    candidates[:, 0] = [*range(12), *range(9), 0, 0]
    geometry = Geometry(height, width)
    assert byte_images.fit(images, geometry)
    assert not byte_images.fit(images.astype(np.float32), geometry)
    assert not byte_images.fit(images[..., ::-1], geometry)
    arguments = images, training, candidates, geometry
    results = [(byte_images.aligned(*arguments, 7), second_look_tensors.aligned(*arguments, 7))]
    if size == (32, 32):
        results.append((byte_images.coarse(*arguments, 2, 7), second_look_tensors.coarse(*arguments, 2, 7)))
    for ours, theirs in results:
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-12)
        np.testing.assert_array_equal(ours[1], theirs[1])
        np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-12)
    beside = training[candidates[:, 0]]
    ours, theirs = align_pairs(images, beside), align_pairs(torch.from_numpy(images), torch.from_numpy(beside))
    for name, tolerance in {"residuals": 0, "mirrored": 0, "maps": 0, "scale": 1e-6, "shift": 0, "gain": 1e-4}.items():
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(ours.offset, theirs.offset, atol=1e-2)
    apart = np.abs(ours.aligned_training.astype(int) - theirs.aligned_training)
    assert apart.max() <= 1  # sums are rounded in another order
    assert (apart > 0).mean() < 1e-3
    assert np.abs(ours.difference.astype(int) - theirs.difference).max() <= 1
