"""JPEG files the quick way and Pillow's ordinary way: the same pixels, or the same refusal."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffmem.data import jpeg
from diffmem.data.decode import PixelOptions, decode_into

RNG = np.random.default_rng(5)
COLOR = RNG.integers(0, 256, (24, 20, 3), dtype=np.uint8)
CASES = Path("/work/shared/cases/images")


def encoded(image, **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", **options)
    return stream.getvalue()


FILES = [
    encoded(COLOR),
    encoded(COLOR, subsampling=0),
    encoded(COLOR, subsampling=1, quality=95),
    encoded(COLOR[..., 0]),
    encoded(COLOR, comment=b"made today"),
    encoded(COLOR, progressive=True),
    encoded(COLOR, restart_marker_blocks=1),
    encoded(COLOR, icc_profile=b"a profile"),
    encoded(COLOR, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
]
WAYS = ["pillow", "simplejpeg"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")
    else:
        monkeypatch.setattr(jpeg, "_simplejpeg", lambda: None)
    jpeg._agrees.cache_clear()
    jpeg._known.clear()
    yield request.param
    jpeg._agrees.cache_clear()
    jpeg._known.clear()


def decoded(files, options=None, shape=(3, 24, 20)):
    out = np.zeros((len(files), *shape), np.uint8)
    return decode_into(out, files, options or PixelOptions()), out


def ordinary(files, options=None, shape=(3, 24, 20)):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffmem.data.decode.plain_header", lambda data: None)
        return decoded(files, options, shape)


def assert_same(files, options=None, shape=(3, 24, 20)):
    ours, theirs = decoded(files, options, shape), ordinary(files, options, shape)
    assert ours[0] == theirs[0]
    np.testing.assert_array_equal(ours[1], theirs[1])


def test_pixels_are_those_of_the_ordinary_way(way):
    assert_same(FILES)
    assert_same(FILES, PixelOptions("grey"), (1, 24, 20))
    assert_same(FILES, PixelOptions("rgb", (8, 9), center_crop=True), (3, 8, 9))
    assert_same(FILES, PixelOptions(mode="L"), (1, 24, 20))


def test_which_files_are_plain(way):
    headers = [jpeg.plain_header(data) for data in FILES]
    assert [header is not None for header in headers] == [True] * 5 + [False, True, False, False]
    assert [header[1:] for header in headers[:4]] == [(3, 24, 20, way == "simplejpeg")] * 3 + [
        (1, 24, 20, way == "simplejpeg")
    ]
    assert jpeg.plain_header(FILES[0][:600]) is None
    assert jpeg.plain_header(b"") is None


def test_one_header_is_read_once(way, monkeypatch):
    assert jpeg.plain_header(FILES[0]) is not None
    monkeypatch.setattr(jpeg, "_read_header", lambda data: pytest.fail("read again"))
    assert jpeg.plain_header(FILES[0]) is not None


def test_a_library_that_rounds_otherwise_is_not_used(monkeypatch):
    module = pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")

    class Other:
        @staticmethod
        def decode_jpeg(*arguments, **options):
            return module.decode_jpeg(*arguments, **options, fastupsample=True)

    monkeypatch.setattr(jpeg, "_simplejpeg", lambda: Other)
    jpeg._agrees.cache_clear()
    assert [jpeg._agrees(each) for each in jpeg._USUAL] == [True, True, False, False]
    jpeg._agrees.cache_clear()


@pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not there")
def test_odd_pictures(way):
    files = [path.read_bytes() for path in sorted(CASES.iterdir()) if path.suffix in (".jpg", ".png")]
    for file in files:
        assert_same([file])


@given(data=st.data())
@settings(max_examples=40)
def test_damaged_files_end_as_in_the_ordinary_way(data):
    damaged = bytearray(data.draw(st.sampled_from(FILES)))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    assert_same([bytes(damaged), FILES[0]])
