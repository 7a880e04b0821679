"""JPEG files of the usual kind, decoded without what Pillow's reading of a file costs.

Of a 32×32 picture's 55 µs Pillow spends half on the file's header and on setting out to find metadata. A plain JPEG
file has none of that: baseline, gray or color, nothing before its only scan but tables, comments and the JFIF mark; no
EXIF, no color profile, no previews, no Adobe mark. Such a header is read here, once for all files that begin with the
same one, and the file goes to Pillow's decoder as it is (30 µs), or to libjpeg-turbo by the package simplejpeg where
that is installed (the extra `jpeg`; 10 µs). Of large pictures all take the same time.

Both give the pixels of Pillow's ordinary way, or nothing: the decoder is the same one, and simplejpeg is used for those
kinds of files alone for which it was seen to decode samples to the same pixels. A file with anything unusual, damage
included, is left to the ordinary way, which also says what is wrong with it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

_LONGEST_HEADER = 4096  # of a plain file, which has some 620 bytes
_KNOWN = 16  # headers that are remembered
# Segments that say nothing of the pixels but what any decoder takes from them: Huffman and quantization tables,
# restart intervals, comments. JFIF's mark, the frame and the scan are looked into.
_TABLES = frozenset({0xC4, 0xDB, 0xDD, 0xFE})
_JFIF, _BASELINE, _SCAN = 0xE0, 0xC0, 0xDA

Sampling = tuple[tuple[int, int], ...]
_USUAL: tuple[Sampling, ...] = (
    ((1, 1),),
    ((1, 1), (1, 1), (1, 1)),
    ((2, 1), (1, 1), (1, 1)),
    ((2, 2), (1, 1), (1, 1)),
)


class Header(NamedTuple):
    """What a plain JPEG file begins with.

    Attributes:
        start: All bytes before the compressed pixels.
        channels: 1 or 3.
        height: In pixels.
        width: In pixels.
        turbo: Whether simplejpeg decodes such files.
    """

    start: bytes
    channels: int
    height: int
    width: int
    turbo: bool

    @property
    def mode(self) -> str:
        """Pillow's name of such pixels."""
        return "L" if self.channels == 1 else "RGB"


_known: list[Header] = []


def plain_header(data: bytes) -> Header | None:
    """The header of the plain JPEG file `data`, or None where it is none."""
    for header in _known:
        if data.startswith(header.start):
            return header
    found = _read_header(data)
    if found is not None:
        _known.insert(0, found)
        del _known[_KNOWN:]
    return found


def decode_plain(data: bytes, header: Header) -> Image.Image | None:
    """The pixels of a plain file as a Pillow image, or None where they cannot be had in this way."""
    if header.turbo:
        pixels = decode_turbo(data, header)
        return None if pixels is None else Image.fromarray(pixels if header.channels > 1 else pixels[:, :, 0])
    try:
        return Image.frombytes(header.mode, (header.width, header.height), data, "jpeg", header.mode, "")
    except Exception:  # whatever it is, the ordinary way meets it too, and has the words for it
        return None


def decode_turbo(data: bytes, header: Header, out: np.ndarray | None = None) -> np.ndarray | None:
    """The pixels uint8 [height, width, channels], in `out` if one is given, by simplejpeg; None where it has doubts."""
    try:
        return _simplejpeg().decode_jpeg(data, "RGB" if header.channels == 3 else "GRAY", buffer=out)
    except (ValueError, MemoryError):
        return None


def _read_header(data: bytes) -> Header | None:
    if not data.startswith(b"\xff\xd8"):
        return None
    position, frame, jfif = 2, None, False
    while position + 4 <= min(len(data), _LONGEST_HEADER):
        kind, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position + 4 : position + 2 + length]
        if data[position] != 0xFF or length < 2 or len(segment) != length - 2:
            return None
        position += 2 + length
        if kind == _SCAN:
            if frame is None or segment[:1] != frame[5:6] or position > _LONGEST_HEADER:
                return None
            return _header(data[:position], frame, jfif)
        if kind == _BASELINE and frame is None:
            frame = segment
        elif kind == _JFIF and segment.startswith(b"JFIF\0") and length >= 16:
            jfif = True
        elif kind not in _TABLES:
            return None
    return None


def _header(start: bytes, frame: bytes, jfif: bool) -> Header | None:
    """start: the header's bytes. frame: the contents of its frame's segment."""
    channels = frame[5] if len(frame) > 5 else 0
    if channels not in (1, 3) or len(frame) != 6 + 3 * channels or frame[0] != 8:
        return None
    if not jfif and channels == 3 and frame[6::3] != b"\1\2\3":  # other names of components mean other colors
        return None
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    limit = Image.MAX_IMAGE_PIXELS
    if height == 0 or width == 0 or (limit is not None and height * width > limit):
        return None
    sampling = tuple((each >> 4, each & 15) for each in frame[7::3])
    return Header(start, channels, height, width, sampling in _USUAL and _agrees(sampling))


@cache
def _simplejpeg() -> Any:
    """The module, or None where it is not installed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


@cache
def _agrees(sampling: Sampling) -> bool:
    """Whether simplejpeg decodes samples of such a file to the pixels that Pillow gives: libraries that differ in how
    they round or smooth colors differ in most pixels of these."""
    if (module := _simplejpeg()) is None:
        return False
    decode: Callable[..., np.ndarray] = module.decode_jpeg
    for height, width, quality in ((37, 29, 75), (16, 33, 96)):
        noise = np.random.default_rng(quality).integers(0, 256, (height, width, 3), dtype=np.uint8)
        noise[height // 2 :] = np.linspace(0, 255, width, dtype=np.uint8)[:, None]
        stream = io.BytesIO()
        image = Image.fromarray(noise).convert("L" if len(sampling) == 1 else "RGB")
        how = {} if len(sampling) == 1 else {"subsampling": _USUAL.index(sampling) - 1}
        image.save(stream, "JPEG", quality=quality, **how)
        pixels = np.asarray(Image.open(io.BytesIO(stream.getvalue())))
        if not np.array_equal(decode(stream.getvalue(), "RGB" if len(sampling) > 1 else "GRAY").squeeze(), pixels):
            return False
    return True
