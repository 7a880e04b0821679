"""Pixels deeper than eight bits: known from the file's header in every format, held exactly or refused."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffmem.data import load_images
from diffmem.data.decode import BadImage, PixelOptions, decode_image
from diffmem.errors import InputError

PICTURES = Path(__file__).parent / "pictures"
RNG = np.random.default_rng(5)
GRAY = RNG.integers(0, 256, (5, 4), dtype=np.uint8)
RGB = RNG.integers(0, 256, (5, 4, 3), dtype=np.uint8)
# Right to the byte without a file of their own: JPEG inside TIFF decodes to the picture of rgb8.
SAME_AS = {"rgb_jpegtiff.tif": "rgb8.avif"}


def decoded(data):
    return np.asarray(decode_image(data, PixelOptions())[0])


def encoded(array, kind, **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", sorted(path for path in PICTURES.iterdir() if path.suffix != ".npy"), ids=str)
def test_odd_pictures_are_read_rightly_or_refused(path):
    wanted = PICTURES / f"{SAME_AS.get(path.name, path.name)}.want.npy"
    if not wanted.exists():
        with pytest.raises(InputError, match=path.name):
            load_images(path)
        return
    pixels = np.load(wanted)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    np.testing.assert_array_equal(load_images(path).images, pixels[None])


def png(depth, color_type, rows, extra=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = rows.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in rows)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def test_png():
    deep = GRAY.astype(np.uint16) * 257
    np.testing.assert_array_equal(decoded(png(16, 0, deep)), GRAY)
    np.testing.assert_array_equal(decoded(png(8, 2, RGB)), RGB)
    transparent = struct.pack(">I", 2) + b"tRNS\0\0" + struct.pack(">I", zlib.crc32(b"tRNS\0\0"))
    for refused in (
        png(16, 0, deep ^ 1),
        png(16, 0, deep, transparent),
        png(16, 2, RGB.astype(np.uint16) * 257),
        png(16, 4, np.stack([deep, np.full_like(deep, 65535)], axis=-1)),
        png(16, 6, np.full((5, 4, 4), 65535)),
    ):
        with pytest.raises(BadImage, match="16"):
            decoded(refused)


def tiff(array, *, order="<", planar=False, photometric=None, sample_format=1, colors=()):
    """An uncompressed TIFF in one strip per plane, of any depth, byte order and arrangement."""
    samples = array.shape[2] if array.ndim == 3 else 1
    depth = array.dtype.itemsize * 8
    planes = [array[..., index] for index in range(samples)] if planar and samples > 1 else [array]
    data = [np.ascontiguousarray(plane).astype(array.dtype.newbyteorder(order)).tobytes() for plane in planes]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + sum(map(len, data)))
    offsets = [8 + sum(map(len, data[:index])) for index in range(len(data))]
    tags = {
        256: ("I", [array.shape[1]]), 257: ("I", [array.shape[0]]), 258: ("H", [depth] * samples), 259: ("H", [1]),
        262: ("H", [photometric if photometric is not None else 2 if samples == 3 else 1]), 273: ("I", offsets),
        277: ("H", [samples]), 278: ("I", [array.shape[0]]), 279: ("I", list(map(len, data))),
        284: ("H", [2 if planar else 1]), 339: ("H", [sample_format] * samples),
    } | ({320: ("H", colors)} if len(colors) else {})  # fmt: skip
    where = 8 + sum(map(len, data)) + 2 + 12 * len(tags) + 4
    directory, behind = struct.pack(f"{order}H", len(tags)), b""
    for tag, (code, values) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(packed) > 4:
            packed, behind = struct.pack(f"{order}I", where + len(behind)), behind + packed
        directory += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[code], len(values)) + packed.ljust(4, b"\0")
    return head + b"".join(data) + directory + bytes(4) + behind


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("planar", [False, True])
def test_tiff(order, planar):
    deep = GRAY.astype(np.uint16) * 257
    np.testing.assert_array_equal(decoded(tiff(RGB, order=order, planar=planar)), RGB)
    np.testing.assert_array_equal(decoded(tiff(GRAY, order=order)), GRAY)
    np.testing.assert_array_equal(decoded(tiff(deep, order=order)), GRAY)
    np.testing.assert_array_equal(decoded(tiff(GRAY, order=order, photometric=0)), 255 - GRAY)
    for refused, says in (
        (tiff(RGB.astype(np.uint16) * 257, order=order, planar=planar), "16 bits per channel"),
        (tiff(deep, order=order, photometric=0), "16 bits per channel|not an image"),  # zero is white
        (tiff(deep.astype(np.int16), order=order, sample_format=2), "signed"),
        (tiff(GRAY.astype(np.int8), order=order, sample_format=2), "signed"),
        (tiff(GRAY.astype(np.uint32), order=order), "32 bits per channel|not an image"),
        (tiff(GRAY / np.float32(255), order=order, sample_format=3), "floating-point"),
        (tiff(RGB, order=order, photometric=6), "subsampled"),
    ):
        with pytest.raises(BadImage, match=says):
            decoded(refused)


def test_palette_of_a_tiff():
    colors = RNG.integers(0, 256, 768)
    for levels in (colors * 257, colors * 256):
        data = tiff(GRAY, photometric=3, colors=levels.tolist())
        np.testing.assert_array_equal(decoded(data), colors.reshape(3, 256).T[GRAY])
    for levels in (colors, colors * 257 ^ 1):
        with pytest.raises(BadImage, match="palette of 16 bits"):
            decoded(tiff(GRAY, photometric=3, colors=levels.tolist()))


@pytest.mark.parametrize(("highest", "exact"), [(1, True), (15, True), (51, True), (255, True), (100, False)])
def test_portable_maps(highest, exact):
    levels = (GRAY.astype(int) * highest // 255).astype(np.uint8)
    data = b"P5 # a remark\n4 5\n%d\n" % highest + levels.tobytes()
    if exact:
        np.testing.assert_array_equal(decoded(data), levels * (255 // highest))
    else:
        with pytest.raises(BadImage, match="levels up to 100"):
            decoded(data)
    np.testing.assert_array_equal(
        decoded(b"P5 4 5 65535\n" + (GRAY.astype(np.uint16) * 257).astype(">u2").tobytes()), GRAY
    )
    for refused in (b"P5 4 5 4095\n" + bytes(40), b"P6 4 5 65535\n" + bytes(120), b"Pf\n4 5\n-1.0\n" + bytes(80)):
        with pytest.raises(BadImage, match=r"bits per channel|unusual kind"):
            decoded(refused)


def test_jpeg_2000():
    data = encoded(RGB, "JPEG2000", irreversible=False)
    np.testing.assert_array_equal(decoded(data), RGB)
    with pytest.raises(BadImage, match="truncated"):
        decoded(data[:-2])
    np.testing.assert_array_equal(decoded(encoded(GRAY.astype(np.uint16) * 257, "JPEG2000")), GRAY)
    sizes = data.index(b"\xff\x4f\xff\x51") + 42  # the precision of the first component
    for precision, says in ((11, "12 bits"), (3, "bits per channel"), (0x87, "signed")):
        with pytest.raises(BadImage, match=says):
            decoded(data[:sizes] + bytes([precision]) + data[sizes + 1 :])


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
def test_textures_icons_and_other_formats():
    texture = encoded(np.dstack([RGB, np.full((5, 4), 255, np.uint8)]), "DDS")
    np.testing.assert_array_equal(decoded(texture), RGB)
    wide = bytearray(texture)
    struct.pack_into("<4I", wide, 92, 0x3FF, 0x3FF << 10, 0x3FF << 20, 3 << 30)
    with pytest.raises(BadImage, match="10 bits"):
        decoded(bytes(wide))
    deep = png(16, 2, RGB.astype(np.uint16) * 257)
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 4, 5, 0, 0, 1, 48, len(deep), 22) + deep
    with pytest.raises(BadImage, match="16 bits"):
        decoded(icon)
    with pytest.raises(BadImage, match="format IM, whose bit depth cannot be determined"):
        decoded(encoded(RGB, "IM"))


def test_other_libraries_do_not_make_damaged_files_readable(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    data = encoded(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), "PNG")
    with pytest.raises(BadImage):
        decoded(data[: len(data) // 2])
    from PIL import ImageFile

    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
