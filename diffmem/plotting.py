"""Images and plots as pages and files want them: data URLs, grids, SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmem.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

THUMBNAIL = 160  # pixels; larger images are reduced, smaller ones are embedded as they are and enlarged by the browser
_LOSSLESS = 64  # pixels up to which an image is embedded as PNG


def data_url(image: np.ndarray) -> str:
    """An image (C, H, W) uint8 as a data URL, reduced to a thumbnail where it is large."""
    from PIL import Image

    pixels = image[0] if image.shape[0] < 3 else np.moveaxis(image[:3], 0, -1)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if max(picture.size) > THUMBNAIL:
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return picture_url(picture, lossless=max(picture.size) <= _LOSSLESS)


def picture_url(picture: Image.Image, *, lossless: bool = True) -> str:
    """A picture of Pillow's as a data URL, as PNG or JPEG."""
    buffer = io.BytesIO()
    if lossless:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=88)
    return f"data:image/{'png' if lossless else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def grid(images: np.ndarray, scale: int | None = None, columns: int | None = None) -> Image.Image:
    """Images (N, C, H, W) uint8 side by side, as square as it goes or in so many columns, a pixel enlarged `scale`
    times (default: to about 64 per image)."""
    from PIL import Image

    count, channels, height, width = images.shape
    columns = int(np.ceil(np.sqrt(count))) if columns is None else columns
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, channels, height, width), np.uint8)
    cells[:count] = images
    picture = cells.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    picture = picture.reshape(rows * height, columns * width, channels)
    scale = max(1, 64 // max(height, width)) if scale is None else scale
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    return Image.fromarray(picture[:, :, 0] if channels == 1 else picture)


@contextmanager
def plot(width: float = 6.2, height: float = 2.9) -> Iterator[Figure]:
    """A figure, so many inches in size, to draw on in the house's style; it needs no display. See `svg`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "diffmem", "font.family": "sans-serif", "font.size": 9}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with rc_context(style):
        yield Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure) -> str:
    """The figure of `plot` as SVG to be embedded in a page: the same figure gives the same bytes. Call it inside."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    return printable(text[text.index("<svg") :], "\n\t")
