"""How many bits each channel of an image file has, as the file's own header says.

Pillow turns several kinds of deep pixels into eight bits without a word, and not always rightly: of 16-bit planar TIFF
it reads every second byte as a pixel, of 12-bit JPEG 2000 white comes out black. So its modes cannot tell. A file whose
header does not say how deep its pixels are, or that is of a format not listed here, is refused.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

# Formats without deeper pixels (or whose deeper kinds Pillow does not open: JPEG of 12 bits, PSD of 16).
_EIGHT_BITS = frozenset(
    {"BMP", "CUR", "DCX", "DIB", "GIF", "JPEG", "MPO", "MSP", "PCX", "QOI", "SUN", "TGA", "WEBP", "XBM", "XPM"}
)
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG_2000_STREAM = b"\xff\x4f\xff\x51"
_PNM = re.compile(rb"P([1-6])(?:\s|#[^\n\r]*[\n\r])+(\d+)(?:\s|#[^\n\r]*[\n\r])+(\d+)(?:(?:\s|#[^\n\r]*[\n\r])+(\d+))?")


class BadImage(Exception):
    """One file holds no usable pixels; the message says why, without the file's name."""


def require_eight_bits(image: Image.Image, data: bytes) -> bool:
    """Whether `image`, opened from the file `data` and not loaded yet, holds 16-bit gray levels (whoever reads them
    decides whether eight bits hold them); False where it has eight bits or fewer per channel.

    Raises `BadImage` where Pillow would turn deeper pixels into eight bits, or where the depth is not known.
    """
    kind = image.format or ""
    if kind in _EIGHT_BITS:
        return False
    if kind not in _CHECKS:
        raise BadImage(f"is in the format {kind}, whose bit depth cannot be determined: convert it to PNG first")
    try:
        return _CHECKS[kind](image, data)
    except (IndexError, KeyError, StopIteration, TypeError, ValueError, struct.error):
        raise BadImage(f"has no readable {kind} header that gives its bit depth: convert it to PNG first") from None


def _refusal(bits: int | str) -> BadImage:
    return BadImage(f"has {bits} bits per channel: convert it to 8 bits first")


def _png(image: Image.Image, data: bytes) -> bool:
    if not data.startswith(_PNG) or data[12:16] != b"IHDR":
        raise ValueError
    bits, color_type = data[24], data[25]
    if bits > 8 and (color_type != 0 or "transparency" in image.info):
        raise _refusal(bits)
    return bits == 16


def _tiff(image: Image.Image, data: bytes) -> bool:
    tags = image.tag_v2  # type: ignore[attr-defined] # of TIFF images
    bits = set(_numbers(tags.get(258, (1,))))
    photometric = tags.get(262, 0)
    if signs := set(_numbers(tags.get(339, (1,)))) - {1, 4}:
        names = {2: "signed whole numbers", 3: "floating-point numbers"}
        raise BadImage(
            f"has {names.get(min(signs), 'numbers of an unusual kind')} as pixels: convert it to 8 bits first"
        )
    if max(bits) > 8:
        # Pillow inverts pictures whose zero is white only where they have eight bits.
        if bits == {16} and photometric == 1 and tags.get(277, 1) == 1:
            return True
        raise _refusal(max(bits))
    if photometric == 3:
        # Eight-bit colors are stored as 257·v or 256·v, of which Pillow takes the high byte.
        levels = _numbers(tags[320])
        if any(level % 256 not in (0, level // 256) for level in levels) or 0 < max(levels) < 256:
            raise BadImage("has a palette of 16 bits per channel: convert it to 8 bits first")
    if photometric == 6 and tags.get(259, 1) == 1 and tuple(_numbers(tags.get(530, (2, 2)))) != (1, 1):
        raise BadImage("has subsampled YCbCr pixels without compression: convert it to RGB first")
    return False


def _jpeg_2000(image: Image.Image, data: bytes) -> bool:
    stream, end = 0, len(data)
    if not data.startswith(_JPEG_2000_STREAM):
        boxes = list(_boxes(data, 0, len(data)))
        stream, end = next((start, end) for kind, start, end in boxes if kind == b"jp2c")
        header_start, header_end = next((start, end) for kind, start, end in boxes if kind == b"jp2h")
        for kind, start, _ in _boxes(data, header_start, header_end):
            if kind == b"pclr":
                raise BadImage("is JPEG 2000 with a palette: convert it to PNG first")
            if kind == b"colr" and data[start] == 1:
                space = int.from_bytes(data[start + 3 : start + 7], "big")
                if space not in (12, 16, 17, 18):  # CMYK, sRGB, gray, sYCC
                    raise BadImage(f"is JPEG 2000 in the color space {space}: convert it to RGB first")
    if data[stream : stream + 4] != _JPEG_2000_STREAM:
        raise ValueError
    if not data[stream:end].rstrip(b"\0").endswith(b"\xff\xd9"):  # OpenJPEG reads on where tiles are missing
        raise BadImage("is truncated: its JPEG 2000 stream does not end")
    components = int.from_bytes(data[stream + 40 : stream + 42], "big")
    precisions = data[stream + 42 : stream + 42 + 3 * components : 3]
    if components == 0 or len(precisions) != components:
        raise ValueError
    if any(precision & 0x80 for precision in precisions):
        raise BadImage("has signed pixels: convert it to 8 bits first")
    bits = {precision + 1 for precision in precisions}
    if bits == {8}:
        return False
    if bits == {16} and components == 1:
        return True
    raise _refusal(max(bits))  # also fewer than eight, which Pillow does not stretch to 255


def _avif(image: Image.Image, data: bytes) -> bool:
    # Every item and track has one; what else a file holds besides its picture (alpha, a gain map) must be as plain.
    found = [match.end() for match in re.finditer(rb"av1C(?=[\x81])", data)]
    if not found:
        raise ValueError
    for position in found:
        if data[position + 2] & 0x40:
            raise _refusal(12 if data[position + 2] & 0x20 else 10)
    return False


def _sgi(image: Image.Image, data: bytes) -> bool:
    if data[3] != 1:
        raise _refusal(8 * data[3])
    return False


def _ppm(image: Image.Image, data: bytes) -> bool:
    match = _PNM.match(data)
    if match is None:
        raise BadImage("is a Netpbm file of an unusual kind: convert it to PNG first")
    kind, highest = int(match[1]), match[4]
    if kind in (1, 4):
        return False
    highest = int(highest)
    if highest == 65535 and kind in (2, 5):
        return True
    if highest > 255:
        raise _refusal(highest.bit_length())
    if 255 % highest:
        raise BadImage(f"has levels up to {highest}, which do not map to 0–255 exactly: convert it to 8 bits first")
    return False


def _ico(image: Image.Image, data: bytes) -> bool:
    for index in range(int.from_bytes(data[4:6], "little")):
        size, offset = struct.unpack_from("<II", data, 6 + 16 * index + 8)
        picture = data[offset : offset + size]
        if picture.startswith(_PNG) and picture[24] > 8:
            raise _refusal(picture[24])
    return False


def _psd(image: Image.Image, data: bytes) -> bool:
    bits, color_mode = struct.unpack_from(">HH", data, 22)
    if bits > 8:
        raise _refusal(bits)
    if color_mode not in (0, 1, 2, 3, 4):  # bitmap, gray, palette, RGB, CMYK
        raise BadImage("is a PSD file in an unusual color mode: convert it to PNG first")
    return False


def _dds(image: Image.Image, data: bytes) -> bool:
    flags, code = struct.unpack_from("<I4s", data, 80)
    if flags & 0x4:
        if code == b"DX10":
            (code,) = struct.unpack_from("<I", data, 128)
            # R8G8B8A8, BC1, BC2, BC3, BC4, BC5, BC7: all but the signed ones.
            if code not in (27, 28, 29, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80, 82, 83, 97, 98, 99):
                raise BadImage("is a DDS texture of an unusual kind: convert it to PNG first")
        elif code not in (b"DXT1", b"DXT3", b"DXT5", b"ATI1", b"BC4U", b"ATI2", b"BC5U"):
            raise BadImage("is a DDS texture of an unusual kind: convert it to PNG first")
        return False
    masks = struct.unpack_from("<4I", data, 92)
    deepest = max(mask.bit_count() for mask in masks)
    if deepest > 8:
        raise _refusal(deepest)
    return False


_CHECKS: dict[str, Callable[[Image.Image, bytes], bool]] = {
    "AVIF": _avif,
    "DDS": _dds,
    "ICO": _ico,
    "JPEG2000": _jpeg_2000,
    "PNG": _png,
    "PPM": _ppm,
    "PSD": _psd,
    "SGI": _sgi,
    "TIFF": _tiff,
}


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes of the ISO base media format between `start` and `end`: kind, first and last position of contents."""
    while start + 8 <= end:
        length, kind = struct.unpack_from(">I4s", data, start)
        contents = start + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, contents)
            contents += 8
        stop = end if length == 0 else start + length
        if stop < contents:
            raise ValueError
        yield kind, contents, min(stop, end)
        start = stop
