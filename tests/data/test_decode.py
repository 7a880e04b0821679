"""What counts as an image's pixels: modes, depths, transparency, frames; colour and size alike for files and arrays."""

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
GREY = RNG.integers(0, 256, (5, 4), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def decoded(data, color=None, size=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return np.asarray(decode_image(data, PixelOptions(color, size)))


def test_plain_modes():
    np.testing.assert_array_equal(decoded(encoded(RGB)), RGB)
    np.testing.assert_array_equal(decoded(encoded(GREY)), GREY)
    bits = Image.fromarray(GREY).convert("1")
    np.testing.assert_array_equal(decoded(encoded(bits)), np.where(np.asarray(bits), 255, 0))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "PPM", "TIFF", "TGA"])
def test_formats_without_loss(kind):
    np.testing.assert_array_equal(decoded(encoded(GREY, kind)).reshape(5, 4, -1)[..., 0], GREY)


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
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(GREY).convert("LA"))), GREY)
    opaque[2, 1, 3] = 254
    with pytest.raises(BadImage, match="transparent"):
        decoded(encoded(opaque))
    with pytest.raises(BadImage, match="transparent"):
        decoded(encoded(RGB, transparency=tuple(int(level) for level in RGB[0, 0])))


def test_sixteen_bit_grey_only_where_exact():
    wide = GREY.astype(np.uint16) * 257
    np.testing.assert_array_equal(decoded(encoded(wide)), GREY)
    np.testing.assert_array_equal(decoded(encoded(wide, "TIFF")), GREY)
    wide[1, 1] ^= 1
    with pytest.raises(BadImage, match="16-bit grey"):
        decoded(encoded(wide))


def test_sixteen_bit_color_is_refused():
    ppm = b"P6 2 1 65535\n" + bytes(range(12))
    with pytest.raises(BadImage, match="16 bits per channel"):
        decoded(ppm)
    # A 16-bit RGB PNG: Pillow writes none, so its header and data are made here.
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(bytes(13))) + chunk(b"IEND", b"")
    with pytest.raises(BadImage, match="16 bits per channel"):
        decoded(png)


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


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoded(encoded(RGB, "PNG", exif=exif)).shape == RGB.shape


def test_nothing_that_starts_programs_is_opened(monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    data = encoded(RGB, "EPS")
    with pytest.raises(BadImage, match="no image that Pillow can read"):
        decoded(data)
    assert ".eps" not in image_suffixes()
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff"} <= image_suffixes()


@given(data=st.data())
def test_damaged_files_end_in_bad_image(data):
    """Whatever bytes: pixels or `BadImage`, never anything else."""
    whole = data.draw(st.sampled_from([encoded(RGB), encoded(RGB, "JPEG"), encoded(GREY, "GIF"), encoded(RGB, "TIFF")]))
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
    for stored in (RGB, GREY):
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
    """Antialiased: a fine checkerboard becomes even grey, not a sample of it."""
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)[None, None]
    small = load_images(board, resize=8).images
    assert np.abs(small.astype(int) - 127.5).max() < 20


@pytest.mark.parametrize(
    "options", [{"resize": 0}, {"resize": (4,)}, {"resize": 2.5}, {"color": "blue"}, {"limit": 0}, {"layout": "HW"}]
)
def test_options_that_make_no_sense(options):
    with pytest.raises(InputError, match=next(iter(options))):
        load_images(GREY[None, None], **options)
