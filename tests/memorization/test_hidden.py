"""Copies of images that the training set holds in several versions: found, and counted with the radius named."""

import io
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import diffmem
from diffmem.memorization.hidden import hidden_radii
from diffmem.search import DistinctNeighbors, TrainingIndex, find_duplicates

random = np.random.default_rng(0)


def stored(images: np.ndarray, quality: int) -> np.ndarray:
    """The images [N, 3, H, W] after JPEG compression."""
    out = np.empty_like(images)
    for row, image in enumerate(images):
        stream = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(stream, "JPEG", quality=quality)
        out[row] = np.asarray(Image.open(stream)).transpose(2, 0, 1)
    return out


@pytest.mark.parametrize("flip", [False, True])
def test_images_stored_twice_at_different_quality(flip):
    originals = diffmem.load_images("builtin:patches?n=300&seed=3").images
    training = np.concatenate([stored(originals, 90), stored(originals, 60)])
    generated = stored(originals[:100], 75)
    if flip:
        training[300:] = training[300:, ..., ::-1]
    first = diffmem.audit(generated, training, flip=flip)
    assert first.count < 10
    assert not first.reliable
    hidden, counted, radius = _said(first)
    assert hidden >= 75
    second = diffmem.audit(generated, training, flip=flip, duplicate_radius=radius)
    assert second.count >= first.count + counted >= 40


def test_photographs_stored_twice(cifar10):
    originals = diffmem.load_images(cifar10 / "cifar10-train.zip", limit=500).images
    originals, unseen = originals[:400], originals[400:]
    training = np.concatenate([stored(originals, 90), stored(originals, 60)])
    generated = stored(originals[:100], 75)
    first = diffmem.audit(generated, training)
    hidden, counted, radius = _said(first)
    assert (first.count + hidden, counted) == (100, hidden)
    second = diffmem.audit(generated, training, duplicate_radius=radius)
    assert (second.count, second.warnings) == (100, ())
    assert diffmem.audit(unseen, training).warnings == ()
    assert diffmem.audit(unseen, training, duplicate_radius=radius).count <= 1


def _said(audit: diffmem.Audit) -> tuple[int, int, float]:
    """Of the warning: how many are hidden, how many of them the radius counts, the radius."""
    pattern = r"(\d+) more images are copies .* Count (them|\d+ of them) with duplicate_radius=([\d.]+);"
    hidden, counted, radius = re.search(pattern, audit.warnings[-1]).groups()
    return int(hidden), int(hidden if counted == "them" else counted.split()[0]), float(radius)


def plain(generated: np.ndarray, training: np.ndarray, threshold: Fraction) -> list[float | None]:
    """The definition, word by word: the least radius² · d, or None, for images that the rule does not call copies."""
    found = []
    wide = training.astype(np.int64)
    for x in generated.astype(np.int64):
        ranked = sorted((int(np.square(x - y).sum()), i) for i, y in enumerate(wide))
        d = [pair[0] for pair in ranked]
        first = wide[ranked[0][1]]
        apart = [int(np.square(first - wide[i]).sum()) for _, i in ranked]
        second = next((d[i] for i in range(1, len(d)) if apart[i] > 0), None)
        least = None
        if second is not None and not (d[0] == 0 or d[0] < threshold**2 * second):
            for j in range(2, min(8, len(d))):
                if d[0] < threshold**2 * d[j] and 4 * max(apart[1:j]) < d[j]:
                    least = max(apart[1:j])
                    break
        found.append(least)
    return found


@given(st.integers(0, 2**32 - 1), st.sampled_from([Fraction(1, 3), Fraction(1, 2)]))
def test_equals_the_definition_and_the_radius_counts_them(seed, threshold):
    rng = np.random.default_rng(seed)
    originals = rng.integers(0, 256, (6, 1, 3, 3))
    versions = originals[rng.integers(0, 6, 20)] + rng.integers(-3, 4, (20, 1, 3, 3))
    copies = originals[rng.integers(0, 6, 8)] + rng.integers(-6, 7, (8, 1, 3, 3))
    training, generated = (np.clip(images, 0, 255).astype(np.uint8) for images in (versions, copies))
    result = diffmem.audit(generated, training, threshold=threshold)
    search = DistinctNeighbors(TrainingIndex(training), training, find_duplicates(training))
    radii = hidden_radii(search, search.nearest(generated, 8), result.memorized, threshold)
    expected = plain(generated, training, threshold)
    np.testing.assert_allclose(radii, [np.nan if r is None else np.sqrt(r / 9) for r in expected])
    for row, squared in enumerate(expected):
        if squared is not None:
            radius = np.nextafter(np.sqrt(squared / 9), 999)
            assert diffmem.audit(generated[row : row + 1], training, threshold=threshold, duplicate_radius=radius).count
