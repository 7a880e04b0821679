"""Vectors of images: by name, by function, kept beside their source, and refused where they cannot be compared."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import diffmem
from diffmem.errors import InputError
from diffmem.features import FeatureExtractor, FeatureSet, Function, check_comparable, extract, extractor
from diffmem.search import TrainingIndex


def images(count=12, channels=3, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, channels, side, side), np.uint8)


def vectors(count=6, d=5, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(count, d)).astype(dtype)


def test_pixels_are_the_bytes():
    some = images()
    made = extract(some)
    assert made.vectors.dtype == np.uint8
    assert made.metric == "euclidean"
    assert np.array_equal(made.vectors, some.reshape(12, -1))
    assert isinstance(extractor("pixels"), FeatureExtractor)


def test_cosine_rows_have_the_distances_of_the_cosine():
    some = FeatureSet(vectors(50, 16), "cosine")
    found = TrainingIndex(some.rows).query(some.rows[:5], 50)
    wide = some.vectors.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    cosine = np.take_along_axis(wide[:5] @ wide.T, found.indices, 1)
    np.testing.assert_allclose(1 - found.squared_distances / 2, cosine, atol=1e-6)
    assert (np.diff(cosine) <= 1e-6).all()


def test_half_precision_is_searched_in_single():
    some = FeatureSet(vectors(dtype=np.float16))
    assert some.rows.dtype == np.float32
    assert np.array_equal(some.rows, some.vectors.astype(np.float32))


@pytest.mark.parametrize(
    ("values", "metric", "words"),
    [
        (np.zeros((2, 3, 4), np.float32), "euclidean", r"vectors \[N, d\], got shape"),
        (np.zeros((0, 3), np.float32), "euclidean", "no vectors"),
        (np.zeros((2, 3), np.int32), "euclidean", "got int32"),
        (np.array([[1, np.nan], [1, 2]], np.float32), "euclidean", "1 vectors hold NaN.*number 0"),
        (np.array([[1, 2], [1, np.inf]], np.float16), "cosine", "1 vectors hold NaN.*number 1"),
        (np.array([[1, 2], [0, 0]], np.float32), "cosine", "0 in every value, the first is number 1"),
        (np.array([[1, 2]], np.uint8), "hamming", "0 and 1"),
        (np.array([[1, 2]], np.float32), "manhattan", "metric must be one of"),
    ],
)
def test_no_vectors(values, metric, words):
    with pytest.raises(InputError, match=words):
        FeatureSet(values, metric)


def test_what_cannot_be_compared_is_refused():
    some = FeatureSet(vectors(), fingerprint="sscd")
    check_comparable(some, FeatureSet(vectors(seed=1), fingerprint="sscd"), "generated")
    check_comparable(some, FeatureSet(vectors(seed=1)), "generated")  # unknown: not known to differ
    unit = vectors(seed=1) / np.linalg.norm(vectors(seed=1), axis=1, keepdims=True)
    for other, words in (
        (FeatureSet(vectors(), fingerprint="clip"), "different networks.*sscd; clip"),
        (FeatureSet(vectors(d=4)), "5 values each.* 4"),
        (FeatureSet(vectors(), "cosine"), "euclidean distance.*cosine"),
        (FeatureSet(images().reshape(12, -1)[:, :5]), "float32.*uint8"),
        (FeatureSet(unit), "training features .* have length 1, generated"),
    ):
        with pytest.raises(InputError, match=words):
            check_comparable(some, other, "generated")


def test_a_function_gets_tensors_and_gives_vectors():
    seen = []

    def mean(batch):
        seen.append((batch.dtype, tuple(batch.shape)))
        return batch.float().mean((2, 3))

    some = images()
    made = extract(some, mean, metric="euclidean", batch=5)
    assert seen == [(torch.uint8, (5, 3, 8, 8))] * 2 + [(torch.uint8, (2, 3, 8, 8))]
    np.testing.assert_allclose(made.vectors, some.mean((2, 3)), rtol=1e-5)
    assert (made.features, made.metric, made.fingerprint) == ("mean", "euclidean", None)


def test_identical_images_get_identical_vectors():
    calls = []

    def noisy(batch):
        calls.append(len(batch))
        return torch.randn(len(batch), 4)

    some = images(4)
    made = extract(some[[0, 1, 0, 2, 1, 3, 0]], noisy)
    assert sum(calls) == 4
    assert np.array_equal(made.vectors[[0, 1]], made.vectors[[2, 4]])
    assert np.array_equal(made.vectors[0], made.vectors[6])
    assert len(np.unique(made.vectors, axis=0)) == 4


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda batch: torch.zeros(1, 3), "for 12 images it returned Tensor of shape"),
        (lambda batch: "vectors", "not one vector of numbers"),
        (lambda batch: batch.float() @ torch.zeros(3, 3), "failed on a batch torch.uint8"),
        (lambda batch: torch.full((len(batch), 3), torch.nan), "12 vectors hold NaN"),
        (torch.nn.Conv2d(3, 4, 3), "preprocessing='imagenet'"),
    ],
)
def test_a_function_that_makes_no_vectors(function, words):
    with pytest.raises(InputError, match=words):
        extract(images(), function)


def test_vectors_of_changing_length_are_refused():
    lengths = iter((3, 4))
    with pytest.raises(InputError, match="vectors of 4 values after vectors of 3"):
        extract(images(), lambda batch: torch.ones(len(batch), next(lengths)), batch=6)


def test_floats_ask_for_their_range():
    with pytest.raises(
        InputError, match=r"float32, -1 to 1: give the values of black and white with value_range=\(-1, 1\)"
    ):
        extract(np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(1, 3, 8, 8), "hash")
    assert extract(np.ones((2, 3, 8, 8), np.float32)).vectors.dtype == np.float32  # pixels are what they are


@pytest.mark.parametrize("channels", [1, 3])
def test_hash_is_that_of_imagehash(channels):
    imagehash = pytest.importorskip("imagehash", reason="compared with the package imagehash")
    digits = diffmem.load_images("builtin:digits").images[:20]
    some = np.concatenate(
        [images(5, channels, 40), images(5, channels, 9, seed=1).repeat(5, 2).repeat(5, 3)[..., :40, :40]]
    )
    pictures = [Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0)) for image in some]
    theirs = np.stack([imagehash.phash(picture).hash.reshape(-1) for picture in pictures])
    assert np.array_equal(extract(some, "hash").vectors, theirs)
    assert np.array_equal(
        extract(digits, "hash").vectors,
        np.stack([imagehash.phash(Image.fromarray(image[0])).hash.reshape(-1) for image in digits]),
    )


def test_hash_is_searched_by_exact_hamming_distance():
    made = extract(diffmem.load_images("builtin:digits").images[:50], "hash")
    found = TrainingIndex(made.rows).query(made.rows, 3)
    differing = (made.vectors[:, None] != made.vectors[None]).sum(2)
    assert np.array_equal(found.squared_distances, np.sort(differing, axis=1)[:, :3])


def save_folder(folder, some):
    folder.mkdir()
    for row, image in enumerate(some):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{row:03}.png")


class Counting(Function):
    def __init__(self, fingerprint="net 1"):
        self.calls = 0
        super().__init__(lambda batch: batch.flatten(1)[:, :7], name="net", fingerprint=fingerprint)

    def __call__(self, batch):
        self.calls += 1
        return super().__call__(batch)


def test_vectors_are_kept_beside_their_source(tmp_path):
    folder = tmp_path / "images"
    save_folder(folder, images())
    net = Counting()
    first, again = extract(folder, net), extract(str(folder), net)
    assert net.calls == 1
    assert np.array_equal(first.vectors, again.vectors)
    assert list(again.names) == [f"{row:03}.png" for row in range(12)]
    assert again.fingerprint == "net 1"
    kept = list(tmp_path.glob("images.diffmem-features-*.safetensors"))
    assert len(kept) == 1
    other = Counting("net 2")
    extract(folder, other)
    assert other.calls == 1
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    # other images, or a damaged file: made again
    Image.fromarray(images(seed=9)[0].transpose(1, 2, 0)).save(folder / "003.png")
    changed = extract(folder, net)
    assert net.calls == 2
    assert not np.array_equal(changed.vectors[3], first.vectors[3])
    data = bytearray(kept[0].read_bytes())
    data[-1] ^= 1
    kept[0].write_bytes(data)
    assert np.array_equal(extract(folder, net).vectors, changed.vectors)
    assert net.calls == 3
    extract(folder, net, cache=False)
    assert net.calls == 4


def test_a_read_only_folder_is_no_failure(tmp_path):
    place = tmp_path / "shared"
    place.mkdir()
    save_folder(place / "images", images())
    os.chmod(place, 0o555)
    try:
        made = extract(place / "images", Counting())
    finally:
        os.chmod(place, 0o755)
    assert len(made.notes) == 1
    assert "features were not cached" in made.notes[0]
    assert [path.name for path in place.iterdir()] == ["images"]
    shutil.rmtree(place)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"features": "ssdc"}, "features='ssdc' is unknown: choose pixels"),
        ({"features": 3}, "got int"),
        ({"features": "pixels", "weights": "x.pt"}, "does not take"),
        ({"features": "hash", "preprocessing": "sscd"}, "does not take"),
        ({"features": "pixels", "metric": "cosinus"}, "metric must be one of"),
        ({"features": "pixels", "batch": 0}, "batch must be at least 1"),
    ],
)
def test_names_that_mean_nothing(given, words):
    with pytest.raises(InputError, match=words):
        extractor(**given)
