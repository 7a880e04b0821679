"""Sheets of images: recognized, cut apart in order, whatever the padding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import diffmem
from diffmem.data.grid import grid_of, looks_tiled, sheets_of, split_grid
from diffmem.errors import InputError


def sheet(images: np.ndarray, columns: int, padding: int) -> np.ndarray:
    """[1, C, H, W]: the images side by side, the last row filled with blank ones."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    out = np.zeros((1, channels, rows * (height + padding) + padding, columns * (width + padding) + padding), np.uint8)
    for i, image in enumerate(images):
        top, left = (padding + (i // columns) * (height + padding), padding + (i % columns) * (width + padding))
        out[0, :, top : top + height, left : left + width] = image
    return out


@given(
    st.integers(2, 9), st.integers(1, 4), st.sampled_from([0, 1, 2, 4]), st.integers(2, 5), st.integers(2, 5),
    st.sampled_from([1, 3]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_cut_apart_as_put_together(count, columns, padding, height, width, channels, seed):
    images = np.random.default_rng(seed).integers(1, 256, (count, channels, height, width), dtype=np.uint8)
    images[:, :, 0, 0] = np.arange(count)[:, None]  # never blank
    sheets = np.concatenate([sheet(images, columns, padding), sheet(images[::-1], columns, padding)])
    found = split_grid(diffmem.load_images(sheets, layout="NCHW"), (height, width))
    np.testing.assert_array_equal(found.images, np.concatenate([images, images[::-1]]))
    assert found.names[0] == "#0[0,0]"
    assert "2 sheets" in found.notes[-1]


def test_a_photograph_is_no_grid(cifar10):
    images = diffmem.load_images(cifar10 / "cifar10-test.zip", limit=64)
    grid = grid_of(images, (8, 8))
    assert grid == (4, 4, 0)
    assert not looks_tiled(images, grid, (8, 8))
    tiled = diffmem.load_images(sheet(images.images, 8, 0))
    assert looks_tiled(tiled, grid_of(tiled, (32, 32)), (32, 32))


def test_sheets_are_suspected_and_cut_by_the_audit():
    digits = diffmem.load_images("builtin:digits")
    sheets = sheet(digits.images[:30], 8, 2)
    with pytest.raises(InputError, match=r"They look like sheets of 4x8 images in a grid: .* split_grid=True"):
        diffmem.audit(sheets, digits)
    assert diffmem.audit(sheets, digits, split_grid=True).count == 30
    with pytest.raises(InputError, match="are not a grid of images of 8x8"):
        diffmem.audit(sheets[..., :-1], digits, split_grid=True)


def test_center_crop_takes_the_central_square(tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, 3, 10, 15), dtype=np.uint8)
    diffmem.data.write_folder(diffmem.ImageSet(images), tmp_path / "images")
    for source in (images, tmp_path / "images", iter(images)):
        np.testing.assert_array_equal(diffmem.load_images(source, center_crop=True).images, images[..., 2:12])
    both = diffmem.load_images(tmp_path / "images", center_crop=True, resize=5).images
    np.testing.assert_array_equal(both, diffmem.load_images(images[..., 2:12], resize=5).images)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("factor", [1, 2])
def test_sheets_are_suspected_before_they_are_resized(cifar10, tmp_path, padding, factor):
    training = diffmem.load_images(cifar10 / "cifar10-train.zip", limit=80)
    large = diffmem.load_images(training, resize=32 * factor) if factor > 1 else training
    sheets = np.concatenate([sheet(large.images[start : start + 16], 4, padding) for start in range(0, 64, 16)])
    diffmem.data.write_folder(diffmem.ImageSet(sheets), tmp_path / "sheets")
    for source in (sheets, tmp_path / "sheets", iter(sheets)):
        resized = diffmem.load_images(source, resize=32)
        result = diffmem.audit(resized, training)
        assert "look like sheets of 4x4 images in a grid" in result.warnings[0]
        assert result.gate(max_copies=0).state == "undecided"
    cached = [diffmem.load_images(tmp_path / "sheets", resize=32, cache=True).sheets for _ in range(2)]
    assert cached == [(4, 4), (4, 4)]
    cut = diffmem.audit(sheets, training, split_grid=True)
    assert (cut.total, cut.count, cut.warnings) == (64, 64, ())
    # Training images that are such sheets too are compared as they are.
    assert not diffmem.audit(resized, diffmem.load_images(sheets[::-1], resize=32)).warnings


def test_photographs_and_blank_images_are_no_sheets(cifar10):
    images = diffmem.load_images(cifar10 / "cifar10-test.zip", limit=400)
    assert not any(sheets_of(images.images[start : start + 4]) for start in range(0, 400, 4))
    assert sheets_of(np.zeros((3, 3, 2000, 2000), np.uint8)) is None
    assert sheets_of(np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), np.uint8)) is None
    assert diffmem.load_images(images, resize=16).sheets is None
