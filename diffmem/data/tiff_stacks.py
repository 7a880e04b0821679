"""TIFF stacks: each page of one file is an image, under the rules of every other image file."""

from __future__ import annotations

import io
import threading
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from diffmem.data.decode import MAX_PIXELS
from diffmem.data.depth import BadImage, require_eight_bits
from diffmem.inert.boundary import one_line

_AS_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def pages(path: Path) -> int:
    """How many pages the TIFF file `path` has; 0 where it cannot be read."""
    try:
        with warnings.catch_warnings(), Image.open(path, formats=["TIFF"]) as image:
            warnings.simplefilter("ignore")
            return int(getattr(image, "n_frames", 1))
    except Exception:  # Pillow's reader raises nearly anything; whoever reads the file as one image says what is wrong
        return 0


class TiffStack:
    """The pages of a TIFF file, each of them handed on as a PNG of the same pixels."""

    def __init__(self, path: Path, count: int) -> None:
        self.description = str(path)
        self.names: Sequence[str] = [f"page-{index:06d}" for index in range(count)]
        self.fork_safe = False  # pages are sought in one file
        self.mode: str | None = None
        self.labels: np.ndarray | None = None
        self.notes: tuple[str, ...] = ()
        self._path = path
        self._lock = threading.Lock()
        self._image: Any = None

    def read(self, index: int) -> bytes:
        """Page `index` as PNG; raises `BadImage`."""
        with self._lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                if self._image is None:
                    file = open(self._path, "rb")  # noqa: SIM115 (kept, since pages are found one from the other)
                    weakref.finalize(self, file.close)
                    self._image = Image.open(file, formats=["TIFF"])
                self._image.seek(index)
                width, height = self._image.size
                if width * height > MAX_PIXELS:
                    raise BadImage(f"declares {width}×{height} pixels, more than the {MAX_PIXELS:,} that are decoded")
                require_eight_bits(self._image, b"")
                page = cast(Image.Image, self._image.copy())
                if page.mode not in _AS_PNG:
                    page = page.convert("RGB") if page.mode in ("CMYK", "YCbCr") else page
                stream = io.BytesIO()
                page.save(stream, "PNG", compress_level=0)
                return stream.getvalue()
            except BadImage:
                raise
            except Exception as error:  # Pillow's reader raises nearly anything on damaged files
                raise BadImage(f"cannot be decoded: {one_line(error)}") from None
