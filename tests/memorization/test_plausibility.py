"""What makes a verdict worthless is refused or warned about; honest sets, however small, are not."""

import numpy as np
import pytest
import torch

import diffmem
from diffmem.errors import InputError
from diffmem.memorization.plausibility import SetFigures, suspicions

SCALES = [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)]


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return diffmem.load_images("builtin:digits").images


def scaled(images: np.ndarray, scale: tuple[float, float], dtype: str = "float32") -> np.ndarray:
    return (images.astype(np.float64) / 255 * (scale[1] - scale[0]) + scale[0]).astype(dtype)


@pytest.mark.parametrize("theirs", SCALES)
@pytest.mark.parametrize("ours", SCALES)
@pytest.mark.parametrize("start", [0, 1000])
def test_floats_on_different_scales_never_go_unseen(digits, ours, theirs, start):
    generated, training = scaled(digits[start : start + 50], ours), scaled(digits[:900], theirs, "float64")
    copies = 50 if start == 0 else 0
    if ours == theirs:
        result = diffmem.audit(generated, training)
        assert (result.count, result.warnings) == (copies, ())
    else:
        for holdout in ({}, {"holdout": generated}):
            first = training[:50] if holdout else generated
            with pytest.raises(
                InputError, match=r"on different scales\. Give the values of black and white: value_range="
            ):
                diffmem.audit(first, training, **holdout)
    declared = diffmem.audit(generated, training, value_range={"generated": ours, "training": theirs})
    assert declared.count == copies
    assert declared.neighbors.squared_distances.dtype == np.int64
    assert declared.count == diffmem.audit(digits[start : start + 50], digits[:900]).count


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("scale", SCALES)
def test_declared_floats_are_their_gray_levels(digits, dtype, scale, tmp_path):
    tensor = torch.from_numpy(scaled(digits[:60], scale, "float64")).to(getattr(torch, dtype))
    torch.save(tensor, tmp_path / "images.pt")
    for source in (tensor, tmp_path / "images.pt", iter(tensor.split(7))):
        images = diffmem.load_images(source, value_range=scale).images
        np.testing.assert_array_equal(images, digits[:60])
    if dtype != "bfloat16":
        np.save(tmp_path / "images.npy", tensor.numpy())
        np.testing.assert_array_equal(
            diffmem.load_images(tmp_path / "images.npy", value_range=scale).images, digits[:60]
        )


def test_a_part_of_a_range_is_not_another_range():
    """Images in [-1, 1] of which some are bright everywhere; only those are generated."""
    random = np.random.default_rng(0)
    training = random.uniform(-1, 1, (400, 1, 6, 6))
    training[:200] = np.abs(training[:200])
    result = diffmem.audit(training[:40], training)
    assert (result.count, result.warnings) == (40, ())
    training[5:200] *= random.choice([-1, 1], (195, 1, 6, 6))  # now they are few: the copies say so
    assert diffmem.audit(training[:5], training).count == 5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: np.zeros_like(x), "100 of 100 images are of a single color, all of them black"),
        (lambda x: np.full_like(x, 255), "100 of 100 images are of a single color"),
        (lambda x: np.concatenate([x[:90], np.full_like(x[:10], 9)]), "10 of 100 images are of a single color"),
        (lambda x: np.concatenate([x[:40], np.repeat(x[:1], 60, 0)]), "61 of 100 images are identical"),
        (lambda x: x[:1] // 2 + np.random.default_rng(0).integers(0, 3, x.shape, np.uint8), "hardly differ"),
        (lambda x: x[np.arange(100) % 3], "only 3 of 100 images are distinct"),
        (lambda x: (x > 100).astype(np.uint8), "times the contrast of the training images"),
        (lambda x: x // 10, "times the contrast of the training images"),
        (lambda x: x // 2 + 60, "0.49 times the contrast"),
        (lambda x: np.clip(x, 0, 150) + 100, "brighter than the training images by"),
    ],
)
def test_images_that_look_wrong_are_warned_about(digits, make, words):
    result = diffmem.audit(make(digits[1000:1100]), digits[:900])
    assert any(words in warning for warning in result.warnings), result.warnings
    assert not result.reliable
    assert result.to_dict()["warnings"] == list(result.warnings)
    floats = diffmem.audit(scaled(make(digits[1000:1100]), (-1, 1)), digits[:900], value_range=(-1, 1))
    assert floats.warnings == result.warnings


@pytest.mark.parametrize("size", [1, 2, 4, 20, 200])
def test_honest_sets_are_not(digits, size):
    random = np.random.default_rng(size)
    training = diffmem.load_images(digits[:900])
    about = SetFigures.of(training.images)
    for _ in range(40):
        some = digits[random.choice(np.arange(900, 1797), size, replace=False)]
        assert suspicions(SetFigures.of(some, count_identical=True), about) == ()


def test_copies_of_few_images_are_no_failure(digits):
    """The optimum of a small set makes each of its images again and again."""
    training = digits[:12]
    generated = training[np.random.default_rng(0).integers(0, 12, 100)]
    assert diffmem.audit(generated, training).warnings == ()


def test_warnings_stand_where_the_verdict_stands(digits, tmp_path):
    page = diffmem.audit(np.zeros_like(digits[:9]), digits[:900]).save(tmp_path).read_text()
    assert page.index("generated images are copies") < page.index("Do not rely on this yet") < page.index("95 %")
    assert "of a single color" in page


def test_copies_of_few_training_images_are_alike(digits):
    """Every sample of an optimum is an exact copy: 200 of 20 images are no collapse."""
    draws = np.random.default_rng(0).integers(0, 20, 200)
    assert diffmem.audit(digits[:20][draws], digits[:20]).warnings == ()


def test_the_way_out_fits_the_dtype(digits):
    for dtype, words in (("uint8", "check that black became 0 and white 255"), ("float32", "value_range=")):
        warnings = diffmem.audit((digits[1000:1100] // 2 + 60).astype(dtype), digits[:900].astype(dtype)).warnings
        assert words in warnings[0]


def test_an_array_read_in_the_wrong_order_is_told_apart_from_colors(digits):
    with pytest.raises(InputError, match=r"are 8-channel, .* pass layout='NCHW' or layout='NHWC'"):
        diffmem.audit(diffmem.load_images(digits[:9].transpose(0, 2, 3, 1), layout="NCHW"), digits)
    with pytest.raises(InputError, match="images in a grid") as told:
        diffmem.audit(np.random.default_rng(0).integers(0, 256, (1, 1, 512, 512), np.uint8), digits)
    assert "split_grid" in str(told.value)
    with pytest.raises(InputError, match=r"to the smaller size with resize=8$"):
        diffmem.audit(np.random.default_rng(0).integers(0, 256, (1, 1, 520, 520), np.uint8), digits)
