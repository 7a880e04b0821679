"""From the bytes of one image file to 8-bit gray or color pixels, and what counts as those pixels.

The rules, in one place, for every source of encoded images:

- gray (L, and 1-bit as 0/255) has one channel; RGB and palette images have three; CMYK, YCbCr and HSV become RGB;
- an alpha channel (or a palette with transparency) is dropped where every pixel is opaque and refused where one is
  not: pixels under transparency mean nothing until somebody chooses a background (`PixelOptions.alpha`);
- deeper pixels than eight bits, by the file's own header (see `depth`), are refused, since Pillow would drop bits
  silently; but for 16-bit gray that eight bits hold exactly (every level a multiple of 257, which becomes level / 257);
- an animation, or a file of several pages, is refused, since no frame is more right than the others (a photograph with
  an embedded preview, MPO, is its main picture);
- an image is turned or mirrored as its EXIF orientation says, in every format: as image viewers show it and as Hugging
  Face `datasets` reads it (`torchvision.datasets.ImageFolder` and EDM's dataset tool take the pixels as stored). A note
  counts such images. A Pillow image whose pixels are loaded already is taken as it is;
- color profiles are ignored;
- an image that declares more than `MAX_PIXELS` is refused before any of it is decoded.

This module is also what the decoding processes run (see `decode_pool`), so it imports little.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from diffmem.data.depth import BadImage, require_eight_bits
from diffmem.data.jpeg import decode_plain, decode_turbo, plain_header

MAX_PIXELS = 64 * 2**20
# Nothing that an image within MAX_PIXELS needs: 4 bytes a pixel, stored raw, and a header.
MAX_FILE_BYTES = 4 * MAX_PIXELS + 2**20

# Formats whose plugins start another program (EPS), hold a place for a decoder that Pillow lacks, or are not pictures.
_REFUSED_FORMATS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"})
_USUAL_FORMATS = ("JPEG", "PNG")

_ORIENTATION = 0x0112  # the EXIF tag
# Where Pillow keeps what it reads the tag from, of the usual formats; of others it may read the file again.
_METADATA = frozenset({"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"})
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Decoded(NamedTuple):
    """The pixels' shape, and whether an EXIF orientation turned or mirrored them."""

    channels: int
    height: int
    width: int
    turned: bool


# What came out of one file: its pixels, or why there are none.
Outcome = Decoded | str


@dataclass(frozen=True)
class PixelOptions:
    """What is done to every image on its way in: `color` None, "grey" or "rgb"; `size` None or (height, width).

    center_crop: cut out the central square first.
    alpha: what becomes of images with transparent pixels: None: they are refused; "drop": their colors are taken as
        they are stored; "white", "black": they are put on that background.
    mode: the Pillow mode "L" or "RGB" that the source itself prescribes for its images, before anything else.
    """

    color: str | None = None
    size: tuple[int, int] | None = None
    center_crop: bool = False
    alpha: str | None = None
    mode: str | None = None

    def leaves(self, mode: str, height: int, width: int) -> bool:
        """Whether nothing is done to an opaque image of Pillow's mode "L" or "RGB" and this size."""
        return (
            self.mode in (None, mode)
            and self.color in (None, "grey" if mode == "L" else "rgb")
            and self.size in (None, (height, width))
            and not (self.center_crop and height != width)
        )


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _REFUSED_FORMATS)


@cache
def image_suffixes() -> frozenset[str]:
    """The lower-case suffixes, with their dots, of the image files that can be read."""
    formats = {*_formats(), "MPO"}
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def decode_image(data: bytes, options: PixelOptions) -> tuple[Image.Image, bool]:
    """The one image in `data` as a Pillow image of mode "L" or "RGB", converted as `options` ask, and whether its EXIF
    orientation turned it.

    Raises `BadImage`. Call it with Pillow's warnings silenced, except for `DecompressionBombWarning`, which must be an
    error (`decode_into` does both).
    """
    if (header := plain_header(data)) is not None and header.height * header.width <= MAX_PIXELS:
        plain = decode_plain(data, header)
        if plain is not None:
            return _converted(plain, options), False
    # Other libraries set this to read what is left of a damaged file; the rest of its pixels would be made up.
    truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        stream = io.BytesIO(data)
        try:
            image: Image.Image = Image.open(stream, formats=_USUAL_FORMATS)
        except UnidentifiedImageError:
            stream.seek(0)
            image = Image.open(stream, formats=_formats())
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(f"declares {width}×{height} pixels, more than the limit of {MAX_PIXELS:,}")
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise BadImage(
                f"holds {getattr(image, 'n_frames', 'several')} frames: save one of them as a separate image"
            )
        deep_gray = require_eight_bits(image, data)
        image, turned = _upright(image)
        if deep_gray:
            image = _sixteen_bit_gray(image)
        return _converted(image, options), turned
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"declares more pixels than the limit of {MAX_PIXELS:,}") from None
    except UnidentifiedImageError:
        raise BadImage("is not an image that Pillow can read (corrupt, or another file type)") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on corrupt input
        raise BadImage(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = truncated


def _converted(image: Image.Image, options: PixelOptions) -> Image.Image:
    if options.mode is not None and image.mode != options.mode:
        image = image.convert(options.mode)
    return convert(as_gray_or_rgb(image, options.alpha), options)


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation of `image`, 1 to 8; 1 where there is none, or none that can be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's reader raises nearly anything on damaged metadata, which says nothing of the pixels
        return 1
    return value if value in _TURNS else 1


def _upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """`image`, loaded, as its EXIF orientation says, and whether that changed it."""
    # Pillow's TIFF reader turns the pixels as it loads them, and takes the tag away.
    turned = image.format == "TIFF" and cast(Any, image).tag_v2.get(_ORIENTATION, 1) in _TURNS
    image.load()
    # Setting out to find EXIF costs a tenth of decoding a small image, and most images have none.
    if image.format in _USUAL_FORMATS and _METADATA.isdisjoint(image.info):
        return image, turned
    if (orientation := exif_orientation(image)) != 1:
        image, turned = image.transpose(_TURNS[orientation]), True
    return image, turned


def as_gray_or_rgb(image: Image.Image, alpha: str | None = None) -> Image.Image:
    """`image` as mode "L" or "RGB", without losing anything but what `alpha` says; raises `BadImage` where that cannot
    be."""
    image.load()
    mode = image.mode
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or (mode in ("1", "L", "P", "RGB") and "transparency" in image.info):
        return _opaque(image, alpha)
    if mode in ("L", "RGB"):
        return image
    if mode == "1":
        return image.convert("L")
    if mode in ("P", "CMYK", "YCbCr", "HSV"):
        return image.convert("RGB")
    if mode.startswith("I;16"):
        return _sixteen_bit_gray(image)
    raise BadImage(f"has pixels of Pillow's mode {mode}: convert it to 8-bit gray or RGB first")


def convert(image: Image.Image, options: PixelOptions) -> Image.Image:
    """`image` (mode "L" or "RGB") in the wanted color and size: gray by ITU-R 601 luma, sizes by Lanczos."""
    if options.color == "grey" and image.mode == "RGB":
        image = image.convert("L")
    elif options.color == "rgb" and image.mode == "L":
        image = image.convert("RGB")
    if options.center_crop and image.width != image.height:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
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
    # Rows as they are decoded, channels last, and one tall Pillow image over the same block: they are turned into the
    # rows of `out` once, which per image would cost more than decoding does.
    rows = np.zeros((count, height, width, channels), np.uint8)
    canvas: Image.Image | None = None
    pasted: list[int] = []
    outcomes: list[Outcome] = []
    expected = Decoded(channels, height, width, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for row, data in enumerate(encoded):
            header = plain_header(data)
            if (
                header is not None
                and header.turbo
                and header[1:4] == expected[:3]
                and options.leaves(header.mode, height, width)
            ):
                if decode_turbo(data, header, rows[row]) is not None:
                    outcomes.append(expected)
                    continue
                rows[row] = 0  # what came before the damage
            try:
                image, turned = decode_image(data, options)
            except BadImage as bad:
                outcomes.append(str(bad))
                continue
            outcomes.append(Decoded(1 if image.mode == "L" else 3, image.height, image.width, turned))
            if outcomes[-1][:3] == (channels, height, width):
                if canvas is None:
                    canvas = Image.new("L" if channels == 1 else "RGB", (width, height * count))
                canvas.paste(image, (0, row * height))
                pasted.append(row)
    if canvas is not None:
        drawn = np.asarray(canvas).reshape(rows.shape)
        if len(pasted) == count:
            rows = drawn
        else:
            rows[pasted] = drawn[pasted]
    out[:] = rows.transpose(0, 3, 1, 2)
    return outcomes


def _opaque(image: Image.Image, alpha: str | None) -> Image.Image:
    gray = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    elif image.mode not in ("LA", "RGBA"):
        image = image.convert("LA" if gray else "RGBA")
    if cast(Any, image.getchannel("A").getextrema())[0] < 255:
        if alpha is None:
            raise BadImage(
                "has transparent pixels: composite it with alpha='white' or alpha='black', or pass alpha='drop'"
            )
        if alpha != "drop":
            background = Image.new(image.mode, image.size, alpha)
            image = Image.composite(image, background, image.getchannel("A"))
    return image.convert("L" if gray else "RGB")


def _sixteen_bit_gray(image: Image.Image) -> Image.Image:
    levels = np.asarray(image)
    eight_bits, remainder = np.divmod(levels, 257)
    if remainder.any() or levels.min() < 0 or levels.max() > 65535:
        raise BadImage("is 16-bit gray with values that do not fit 8 bits exactly: convert it to 8 bits first")
    return Image.fromarray(eight_bits.astype(np.uint8))
