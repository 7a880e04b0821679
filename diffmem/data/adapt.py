"""Color and size of images that are arrays already, by the same rules as for decoded files."""

from __future__ import annotations

import numpy as np
from PIL import Image

from diffmem.data.decode import PixelOptions
from diffmem.data.storage import allocate
from diffmem.errors import InputError
from diffmem.progress import Progress

_BLOCK_BYTES = 2**24


def adapt(images: np.ndarray, options: PixelOptions, where: str, progress: Progress) -> np.ndarray:
    """`images` [N, C, H, W] in the wanted color and size, of the same dtype; the same array where nothing changes.

    Gray is Pillow's integer ITU-R 601 luma for uint8 and 0.299 R + 0.587 G + 0.114 B for floats. Sizes change by
    Lanczos resampling with antialiasing, for floats in float32. A fourth channel is alpha where `options` name a color
    or what becomes of alpha, and a channel like the others else. Raises `InputError` for colors that cannot be had.
    """
    if images.shape[1] == 4 and (options.color is not None or options.alpha is not None):
        images = _without_alpha(images, options.alpha, where)
    if options.center_crop and images.shape[2] != images.shape[3]:
        side = min(images.shape[2:])
        top, left = ((length - side) // 2 for length in images.shape[2:])
        images = images[:, :, top : top + side, left : left + side]
    count, channels, height, width = images.shape
    wanted = {None: channels, "grey": 1, "rgb": 3}[options.color]
    if channels != wanted and channels not in (1, 3):
        raise InputError(f"{where}: color={options.color!r} needs images of 1 or 3 channels, these have {channels}")
    size = options.size or (height, width)
    if wanted == channels and size == (height, width):
        return images
    out = allocate((count, wanted, *size), images.dtype)
    rows = max(1, _BLOCK_BYTES // max(1, images[:1].nbytes))
    for start in range(0, count, rows):
        block = images[start : start + rows]
        if channels == 3 and wanted == 1:
            block = _luma(block)
        if size == (height, width):
            out[start : start + rows] = block  # gray to color: broadcast over the channels
        else:
            for row, planes in enumerate(block):
                for channel, plane in enumerate(planes):
                    out[start + row, channel] = _resized(plane, size)
                if len(planes) < wanted:
                    out[start + row, 1:] = out[start + row, 0]
        progress("converting images", min(start + rows, count), count)
    return out


def _without_alpha(images: np.ndarray, alpha: str | None, where: str) -> np.ndarray:
    """The colors of RGBA images, on the background `alpha`; floats reach to 1, or to 255 where one is higher."""
    colors, opacity = images[:, :3], images[:, 3:]
    full = 255 if images.dtype == np.uint8 or images.max() > 1 else 1
    if alpha == "drop" or bool((opacity == full).all()):
        return colors
    if alpha is None:
        raise InputError(
            f"{where}: images of 4 channels with transparent pixels: composite them with alpha='white' or "
            "alpha='black', or pass alpha='drop'"
        )
    if images.min() < 0:
        raise InputError(f"{where}: images with negative values have no {alpha} background: pass alpha='drop'")
    share = opacity / np.float64(full)
    mixed = colors * share + (full if alpha == "white" else 0) * (1 - share)
    return (np.floor(mixed + 0.5) if images.dtype == np.uint8 else mixed).astype(images.dtype)


def _luma(block: np.ndarray) -> np.ndarray:
    if block.dtype == np.uint8:
        red, green, blue = block.astype(np.uint32).transpose(1, 0, 2, 3)
        return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)[:, None]
    return np.tensordot(block, np.array([0.299, 0.587, 0.114], block.dtype), axes=(1, 0))[:, None]


def _resized(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(plane, np.uint8 if plane.dtype == np.uint8 else np.float32))
    return np.asarray(image.resize(size[::-1], Image.Resampling.LANCZOS))
