"""The built-in sets: real images, the same everywhere."""

import hashlib

import numpy as np
import pytest

from diffmem.data import load_images
from diffmem.errors import InputError, MissingExtraError

datasets = pytest.importorskip("sklearn.datasets", reason="the extra `demo` (scikit-learn) is not installed")


def test_digits():
    digits = load_images("builtin:digits")
    bunch = datasets.load_digits()
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == np.uint8
    np.testing.assert_array_equal(digits.labels, bunch.target)
    levels = np.array([0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255])
    np.testing.assert_array_equal(digits.images[:, 0], levels[bunch.images.astype(int)])
    assert len(load_images("builtin:digits", limit=10, resize=4)) == 10


def test_patches_are_cut_where_their_names_say():
    patches = load_images("builtin:patches?n=500&seed=3")
    photographs = datasets.load_sample_images().images
    assert patches.images.shape == (500, 3, 32, 32)
    assert len(set(patches.names)) == 500
    for image, label, name in zip(patches.images, patches.labels, patches.names, strict=True):
        file, place = name.split("@")
        top, left = map(int, place.split(","))
        assert file == ["china.jpg", "flower.jpg"][label]
        np.testing.assert_array_equal(image, photographs[label][top : top + 32, left : left + 32].transpose(2, 0, 1))
    assert 200 < patches.labels.sum() < 300


def test_patches_depend_on_the_seed_only():
    few, many = load_images("builtin:patches?n=50"), load_images("builtin:patches", limit=80)
    assert few.names == many.names[:50]
    np.testing.assert_array_equal(few.images, many.images[:50])
    assert load_images("builtin:patches?n=50&seed=1").names != few.names
    # The places, not the pixels: those depend on Pillow's JPEG decoder.
    digest = hashlib.sha256("".join(few.names).encode()).hexdigest()
    assert digest == "fd708524928a62262a5ba783c93676256e55922da184054f2a5d5e08400bd059"


def test_places_are_used_up_before_any_is_used_again(monkeypatch):
    class SmallPhotographs:
        filenames = ("a/china.jpg", "a/flower.jpg")
        images = np.zeros((2, 33, 34, 3), np.uint8)

    monkeypatch.setattr(datasets, "load_sample_images", SmallPhotographs)
    names = load_images("builtin:patches?n=30").names
    assert len(set(names[:12])) == len(set(names[12:24])) == 12  # 2·2·3 places
    assert names[:12] != names[12:24]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("builtin:cats", "builtin:digits and builtin:patches"),
        ("builtin:patches?n=many", "whole numbers"),
        ("builtin:patches?n", "whole numbers"),
        ("builtin:patches?n=0", "at least 1"),
        ("builtin:patches?seed=-1", "seed"),
        ("builtin:digits?n=3", "no option n"),
    ],
)
def test_wrong_options(source, says):
    with pytest.raises(InputError, match=says):
        load_images(source)


def test_missing_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"diffmem\[demo\]"):
        load_images("builtin:digits")
