"""Agreement of two models: against cosines by hand, and what identical, copying and unrelated models give."""

import numpy as np
import pytest

from diffmem.data import load_images
from diffmem.errors import InputError
from diffmem.evaluation import Agreement, agreement


def _cosine(one, other):
    one, other = one.astype(float).ravel(), other.astype(float).ravel()
    one, other = one - one.mean(), other - other.mean()
    return one @ other / np.sqrt((one @ one) * (other @ other))


def test_cosines_are_those_by_hand():
    random = np.random.default_rng(0)
    first, second = random.integers(0, 256, (2, 5, 3, 4, 4), dtype=np.uint8)
    sets = random.integers(0, 256, (7, 3, 4, 4), dtype=np.uint8), random.standard_normal((9, 3, 4, 4))
    found = agreement(first, second, *sets)
    assert found.between == pytest.approx(np.median([_cosine(a, b) for a, b in zip(first, second, strict=True)]))
    assert found.chance == pytest.approx(np.median([_cosine(first[i], second[i - 1]) for i in range(5)]))
    for images, training, value in zip((first, second), sets, found.nearest, strict=True):
        assert value == pytest.approx(np.median([max(_cosine(a, b) for b in training) for a in images]))
    assert found.margin == pytest.approx(found.between - sum(found.nearest) / 2)
    assert found.images == 5


def test_copying_models_are_near_their_images_and_agreeing_ones_near_each_other():
    digits = load_images("builtin:digits").images
    copying = agreement(digits[:100], digits[100:200], digits[:100], digits[100:200])
    assert copying.nearest == (pytest.approx(1), pytest.approx(1))
    assert copying.margin < -0.3
    agreeing = agreement(digits[200:300], digits[200:300] // 2 + 9, digits[:100], digits[100:200])
    assert agreeing.between > 0.99  # brightness and contrast do not count
    assert agreeing.margin > 0.05
    assert agreeing.chance < 0.6
    flat = np.zeros((2, 1, 8, 8))
    assert agreement(flat, flat, digits[:5], digits[:5]) == Agreement(0.0, 0.0, (0.0, 0.0), 2)


def test_what_does_not_fit_is_named():
    images = np.zeros((3, 1, 8, 8))
    with pytest.raises(InputError, match="first holds 3 images and second 2"):
        agreement(images, images[:2], images, images)
    with pytest.raises(InputError, match="second_training holds images of"):
        agreement(images, images, images, images[..., :4])
