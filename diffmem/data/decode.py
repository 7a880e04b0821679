"""From the bytes of one image file to 8-bit grey or colour pixels, and what counts as those pixels.

The rules, in one place, for every source of encoded images:

- grey (L, and 1-bit as 0/255) has one channel; RGB and palette images have three; CMYK, YCbCr and HSV become RGB;
- an alpha channel (or a palette with transparency) is dropped where every pixel is opaque and refused where one is
  not: pixels under transparency mean nothing until somebody chooses a background;
- 16-bit grey is accepted where eight bits hold it exactly (every level a multiple of 257, which becomes level / 257)
  and refused otherwise; 16-bit colour is refused, since Pillow would drop its low byte silently;
- an animation, or a file of several pages, is refused, since no frame is more right than the others (a photograph with
  an embedded preview, MPO, is its main picture);
- EXIF orientation and colour profiles are ignored: the pixels are those stored in the file, as training code sees them;
- an image that declares more than `MAX_PIXELS` is refused before any of it is decoded.

This module is also what the decoding processes run (see `decode_pool`), so it imports little.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 64 * 2**20
# Nothing that an image within MAX_PIXELS needs: 4 bytes a pixel, stored raw, and a header.
MAX_FILE_BYTES = 4 * MAX_PIXELS + 2**20

# Formats whose plugins start another program (EPS), hold a place for a decoder that Pillow lacks, or are no pictures.
_REFUSED_FORMATS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"})
_USUAL_FORMATS = ("JPEG", "PNG")

# What came out of one file: the pixels' shape (C, H, W), or why there are none.
Outcome = tuple[int, int, int] | str


class BadImage(Exception):
    """One file holds no usable pixels; the message says why, without the file's name."""


@dataclass(frozen=True)
class PixelOptions:
    """What is done to every image on its way in: `color` None, "grey" or "rgb"; `size` None or (height, width)."""

    color: str | None = None
    size: tuple[int, int] | None = None


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _REFUSED_FORMATS)


@cache
def image_suffixes() -> frozenset[str]:
    """The lower-case suffixes, with their dots, of the image files that can be read."""
    formats = {*_formats(), "MPO"}
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def decode_image(data: bytes, options: PixelOptions) -> Image.Image:
    """The one image in `data` as a Pillow image of mode "L" or "RGB", converted as `options` ask.

    Raises `BadImage`. Call it with Pillow's warnings silenced, except for `DecompressionBombWarning`, which must be an
    error (`decode_into` does both).
    """
    try:
        stream = io.BytesIO(data)
        try:
            image = Image.open(stream, formats=_USUAL_FORMATS)
        except UnidentifiedImageError:
            stream.seek(0)
            image = Image.open(stream, formats=_formats())
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(f"declares {width}×{height} pixels, more than the {MAX_PIXELS:,} that are decoded")
        return convert(as_grey_or_rgb(image), options)
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"declares more than the {MAX_PIXELS:,} pixels that are decoded") from None
    except UnidentifiedImageError:
        raise BadImage("is no image that Pillow can read (corrupt, or another kind of file)") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on corrupt input
        raise BadImage(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None


def as_grey_or_rgb(image: Image.Image) -> Image.Image:
    """`image` as mode "L" or "RGB", without losing anything; raises `BadImage` where that cannot be."""
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise BadImage(f"holds {image.n_frames} frames: keep one of them as an image of its own")
    _refuse_sixteen_bit_color(image)
    image.load()
    mode = image.mode
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _opaque(image)
    if mode in ("L", "RGB"):
        return image
    if mode == "1":
        return image.convert("L")
    if mode in ("P", "CMYK", "YCbCr", "HSV"):
        return image.convert("RGB")
    if mode.startswith("I"):
        return _sixteen_bit_grey(image)
    raise BadImage(f"has pixels of Pillow's mode {mode}: convert it to 8-bit grey or RGB first")


def convert(image: Image.Image, options: PixelOptions) -> Image.Image:
    """`image` (mode "L" or "RGB") in the wanted colour and size: grey by ITU-R 601 luma, sizes by Lanczos."""
    if options.color == "grey" and image.mode == "RGB":
        image = image.convert("L")
    elif options.color == "rgb" and image.mode == "L":
        image = image.convert("RGB")
    if options.size is not None:
        height, width = options.size
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image


def decode_into(out: np.ndarray, encoded: Sequence[bytes], options: PixelOptions) -> list[Outcome]:
    """What came out of each of `encoded`; those of shape `out.shape[1:]` are written to their row of `out`.

    out: uint8 [n, C, H, W], C 1 or 3, C-contiguous.
    """
    count, channels, height, width = out.shape
    # One tall Pillow image for the block, turned into an array once: per image that would cost more than decoding does.
    canvas = Image.new("L" if channels == 1 else "RGB", (width, height * count))
    outcomes: list[Outcome] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for row, data in enumerate(encoded):
            try:
                image = decode_image(data, options)
            except BadImage as bad:
                outcomes.append(str(bad))
                continue
            outcomes.append((1 if image.mode == "L" else 3, image.height, image.width))
            if outcomes[-1] == (channels, height, width):
                canvas.paste(image, (0, row * height))
    out[:] = np.asarray(canvas).reshape(count, height, width, channels).transpose(0, 3, 1, 2)
    return outcomes


def _opaque(image: Image.Image) -> Image.Image:
    grey = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    elif image.mode not in ("LA", "RGBA"):
        image = image.convert("LA" if grey else "RGBA")
    if image.getchannel("A").getextrema()[0] < 255:
        raise BadImage("has transparent pixels: put it on a background first (or drop its alpha channel)")
    return image.convert("L" if grey else "RGB")


def _refuse_sixteen_bit_color(image: Image.Image) -> None:
    if image.format == "JPEG":
        return  # Pillow opens none of more than eight bits
    arguments = [tile[3] for tile in getattr(image, "tile", ())]
    wide = any(";16" in str(argument) for argument in arguments) or (
        image.format == "PPM" and any(isinstance(argument, tuple) and argument[-1] > 255 for argument in arguments)
    )
    if wide and image.mode in ("LA", "RGB", "RGBA"):
        raise BadImage("has 16 bits per channel: convert it to 8 bits first")


def _sixteen_bit_grey(image: Image.Image) -> Image.Image:
    levels = np.asarray(image)
    eight_bits, remainder = np.divmod(levels, 257)
    if remainder.any() or levels.min() < 0 or levels.max() > 65535:
        raise BadImage("is 16-bit grey with levels that 8 bits cannot hold: convert it to 8 bits first")
    return Image.fromarray(eight_bits.astype(np.uint8))
