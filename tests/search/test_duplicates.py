"""Duplicate groups against their definition: connected components of the pairs within the radius."""

import numpy as np
import pytest
from examples_made import at_most
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmem.errors import InputError
from diffmem.search import TrainingIndex, duplicates, find_duplicates


def components(images: np.ndarray, limit: float, flip: bool) -> np.ndarray:
    """Lowest index of each image's component, by spreading labels over all pairs until nothing changes."""
    wide = images.reshape(len(images), -1).astype(np.int64)
    near = np.square(wide[:, None] - wide[None]).sum(-1) <= limit
    if flip:
        mirrored = images[..., ::-1].reshape(len(images), -1).astype(np.int64)
        near |= np.square(mirrored[:, None] - wide[None]).sum(-1) <= limit
    label = np.arange(len(images))
    while True:
        spread = np.where(near | near.T, label[None], len(images)).min(axis=1)
        if (spread == label).all():
            return label
        label = spread


@given(
    seed=st.integers(0, 2**32 - 1),
    radius=st.sampled_from([0, 0.5, 1, 2.5]),
    flip=st.booleans(),
    asked=st.sampled_from([(4, 64), (2, 5), (2,)]),
    block=st.sampled_from([7, 2048]),
    given_index=st.booleans(),
)
@settings(max_examples=at_most(40))
def test_equals_connected_components(seed, radius, flip, asked, block, given_index):
    random = np.random.default_rng(seed)
    centers = random.integers(0, 60, (8, 1, 2, 3))
    images = centers[random.integers(0, 8, 70)] + random.integers(0, 3, (70, 1, 2, 3)) * random.integers(
        0, 2, (70, 1, 1, 1)
    )
    images = np.where(random.integers(0, 3, (70, 1, 1, 1)) == 0, images[..., ::-1], images).astype(np.uint8)
    index = TrainingIndex(images) if given_index else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "NEIGHBORS_ASKED", asked)
        patch.setattr(duplicates, "BLOCK", block)
        groups = find_duplicates(images, radius, flip=flip, index=index)
    expected = components(images, radius**2 * images[0].size, flip)
    np.testing.assert_array_equal(groups.group_of, expected)
    assert groups.distinct == len(set(components(images, 0, flip)))
    assert groups.number_of_groups == len(set(expected))
    sizes = {first: int((expected == first).sum()) for first in set(expected.tolist())}
    assert [len(group) for group in groups.groups] == sorted(
        (size for size in sizes.values() if size > 1), reverse=True
    )


def test_a_long_chain_is_one_group():
    """Neighbors one gray level apart, the ends 199 apart."""
    images = np.arange(200, dtype=np.uint8).reshape(-1, 1, 1, 1)
    random = np.random.default_rng(0)
    groups = find_duplicates(images[random.permutation(200)], 1)
    assert groups.number_of_groups == 1
    assert len(groups.groups[0]) == 200
    assert find_duplicates(images, 0.999).number_of_groups == 200


def test_negative_zero_is_zero():
    images = np.zeros((2, 1, 1, 2), np.float32)
    images[1] = -0.0
    assert find_duplicates(images).distinct == 1


@pytest.mark.parametrize("radius", [-1, float("nan"), float("inf")])
def test_bad_radius(radius):
    with pytest.raises(InputError, match="radius"):
        find_duplicates(np.zeros((2, 1, 2, 2), np.uint8), radius)


@pytest.mark.parametrize("collide", [False, True])
def test_identical_images_by_keys(collide, monkeypatch):
    images = np.random.default_rng(7).integers(0, 256, (300, 1, 4, 6), dtype=np.uint8)
    images[[40, 41, 299]] = images[3]
    wanted = np.arange(300)
    wanted[[40, 41, 299]] = 3
    assert duplicates._keys(images) is not None
    assert duplicates._keys(images[:, :, :, :5]) is None
    if collide:  # the keys are no proof
        monkeypatch.setattr(duplicates, "_keys", lambda images: np.zeros(len(images), np.uint64))
    monkeypatch.setattr(duplicates, "BLOCK", 64)
    found = find_duplicates(images)
    assert found.group_of.tolist() == wanted.tolist()
    assert found.distinct == 297
