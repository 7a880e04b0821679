"""What counts as an image's pixels: modes, depths, transparency, frames; color and size alike for files and arrays."""

import io
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffmem.data import load_images
from diffmem.data.decode import BadImage, PixelOptions, decode_image, image_suffixes
from diffmem.errors import InputError

RNG = np.random.default_rng(3)
RGB = RNG.integers(0, 256, (5, 4, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (5, 4), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def decoded(data, color=None, size=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return np.asarray(decode_image(data, PixelOptions(color, size))[0])


def test_plain_modes():
    np.testing.assert_array_equal(decoded(encoded(RGB)), RGB)
    np.testing.assert_array_equal(decoded(encoded(GRAY)), GRAY)
    bits = Image.fromarray(GRAY).convert("1")
    np.testing.assert_array_equal(decoded(encoded(bits)), np.where(np.asarray(bits), 255, 0))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "PPM", "TIFF", "TGA"])
def test_formats_without_loss(kind):
    np.testing.assert_array_equal(decoded(encoded(GRAY, kind)).reshape(5, 4, -1)[..., 0], GRAY)


def test_palette_becomes_rgb():
    palette = Image.fromarray(RGB).quantize(8)
    np.testing.assert_array_equal(decoded(encoded(palette)), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_transparency(kind):
    palette = Image.fromarray(RGB).quantize(8)
    used = np.asarray(palette).flat[0]
    with pytest.raises(BadImage, match="transparent"):
        decoded(encoded(palette, kind, transparency=int(used)))
    unused = Image.fromarray(RGB).quantize(8)
    unused.putpalette([*unused.getpalette()[:24], 1, 2, 3])
    expected = np.asarray(unused.convert("RGB"))
    np.testing.assert_array_equal(decoded(encoded(unused, kind, transparency=8)), expected)


def test_alpha_is_dropped_only_where_opaque():
    opaque = np.dstack([RGB, np.full((5, 4), 255, np.uint8)])
    np.testing.assert_array_equal(decoded(encoded(opaque)), RGB)
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(GRAY).convert("LA"))), GRAY)
    opaque[2, 1, 3] = 254
    with pytest.raises(BadImage, match="transparent"):
        decoded(encoded(opaque))
    with pytest.raises(BadImage, match="transparent"):
        decoded(encoded(RGB, transparency=tuple(int(level) for level in RGB[0, 0])))


def test_cmyk_jpeg_becomes_rgb():
    image = Image.fromarray(RGB).convert("CMYK")
    data = encoded(image, "JPEG", quality=95)
    np.testing.assert_array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_are_refused(kind):
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    with pytest.raises(BadImage, match="holds 2 frames"):
        decoded(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))


def test_photograph_with_preview_is_its_main_picture():
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


# Pillow's AVIF writer turns an orientation into the format's own rotation and mirror, and its reader turns these back.
ORIENTED = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "TIFF": {}, "AVIF": {"quality": 90}}


@pytest.mark.parametrize("kind", ORIENTED)
def test_exif_orientation_is_followed_in_every_format(tmp_path, kind):
    stored = np.kron(RGB, np.ones((8, 8, 1), np.uint8))
    plain = decoded(encoded(stored, kind, **ORIENTED[kind]))
    upright = {
        1: plain, 2: plain[:, ::-1], 3: plain[::-1, ::-1], 4: plain[::-1], 5: plain.swapaxes(0, 1),
        6: plain[::-1].swapaxes(0, 1), 7: plain[::-1, ::-1].swapaxes(0, 1), 8: plain[:, ::-1].swapaxes(0, 1), 9: plain,
    }  # fmt: skip
    for orientation, expected in upright.items():
        if (kind, orientation) == ("AVIF", 9):
            continue  # the writer refuses it
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(stored, kind, exif=exif, **ORIENTED[kind])
        np.testing.assert_array_equal(decoded(data), expected)
        (tmp_path / "one").write_bytes(data)
        (tmp_path / "one").rename(tmp_path / f"one.{kind.lower()}")
        notes = load_images(tmp_path / f"one.{kind.lower()}").notes
        assert len(notes) == (orientation in range(2, 9))
        assert all("1 of 1 images have an EXIF orientation" in note for note in notes)


@pytest.mark.parametrize("kind", [kind for kind in ORIENTED if kind != "TIFF"])
def test_pillow_images_are_read_as_files_until_they_are_loaded(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / f"one.{kind.lower()}"
    file.write_bytes(encoded(RGB, kind, exif=exif, **ORIENTED[kind]))
    turned = load_images(file).images
    assert turned.shape == (1, 3, 4, 5)
    with Image.open(file) as image:
        np.testing.assert_array_equal(load_images([image]).images, turned)
        image.load()
        if kind in ("JPEG", "PNG", "WEBP"):  # Pillow turns AVIF as it loads it
            stored = turned[0].transpose(0, 2, 1)[:, ::-1]
            np.testing.assert_array_equal(load_images([image]).images[0], stored)
            np.testing.assert_array_equal(load_images([image.convert("RGB")]).images[0], stored)


def test_damaged_exif_says_nothing_of_the_pixels():
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"MM"):
        np.testing.assert_array_equal(decoded(encoded(RGB, "PNG", exif=exif)), RGB)


def test_nothing_that_starts_programs_is_opened(monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    data = encoded(RGB, "EPS")
    with pytest.raises(BadImage, match="not an image that Pillow can read"):
        decoded(data)
    assert ".eps" not in image_suffixes()
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff"} <= image_suffixes()


@given(data=st.data())
def test_damaged_files_end_in_bad_image(data):
    """Whatever bytes: pixels or `BadImage`, never anything else."""
    whole = data.draw(st.sampled_from([encoded(RGB), encoded(RGB, "JPEG"), encoded(GRAY, "GIF"), encoded(RGB, "TIFF")]))
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        reason = ""
        assert decoded(bytes(damaged)).dtype == np.uint8
    except BadImage as bad:
        reason = str(bad)
    assert "\n" not in reason


@pytest.mark.parametrize("color", [None, "grey", "rgb"])
@pytest.mark.parametrize("size", [None, (3, 2), (5, 9)])
def test_files_and_arrays_are_adapted_alike(tmp_path, color, size):
    for stored in (RGB, GRAY):
        path = tmp_path / "image.png"
        path.write_bytes(encoded(stored))
        from_file = load_images(path, color=color, resize=size).images
        array = stored.reshape(5, 4, -1).transpose(2, 0, 1)[None]
        np.testing.assert_array_equal(from_file, load_images(array, layout="NCHW", color=color, resize=size).images)
        floats = load_images(array.astype(np.float32), layout="NCHW", color=color, resize=size).images
        assert floats.dtype == np.float32
        # Two resampling passes and the luma each round to whole levels; overshoot is clipped in bytes.
        np.testing.assert_allclose(np.clip(floats, 0, 255), from_file, atol=2.01)


def test_resizing_averages():
    """Antialiased: a fine checkerboard becomes even gray, not a sample of it."""
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)[None, None]
    small = load_images(board, resize=8).images
    assert np.abs(small.astype(int) - 127.5).max() < 20


@pytest.mark.parametrize(
    "options", [{"resize": 0}, {"resize": (4,)}, {"resize": 2.5}, {"color": "blue"}, {"limit": 0}, {"layout": "HW"}]
)
def test_options_that_make_no_sense(options):
    with pytest.raises(InputError, match=next(iter(options))):
        load_images(GRAY[None, None], **options)
