"""Images that come one by one or batch by batch from Python: torch datasets, data loaders, any iterable."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from diffmem.data.adapt import adapt
from diffmem.data.arrays import Arrays, as_nchw, to_numpy
from diffmem.data.decode import MAX_FILE_BYTES, PixelOptions, as_gray_or_rgb, convert, decode_image
from diffmem.data.depth import BadImage
from diffmem.data.grid import rows_and_columns
from diffmem.data.labels import check_labels, or_note
from diffmem.data.storage import Gathering
from diffmem.errors import InputError
from diffmem.progress import Progress, silent
from diffmem.text import printable

_IMAGE_FIELDS = ("image", "images", "pixel_values", "img", "jpg", "jpeg", "png", "webp")
_LABEL_FIELDS = ("label", "labels", "cls")
_NAME_FIELDS = ("__key__", "name", "names", "file_name", "filename")
_LOOKED_AT = 8  # images (or batches) at the beginning that may turn out to be sheets


def is_map_dataset(source: Any) -> bool:
    """Whether `source` is read by index: a torch dataset, or anything that has a length and items and is no iterable.

    Does not import torch.
    """
    data = sys.modules.get("torch.utils.data")
    if data is not None and isinstance(source, data.Dataset):
        return not isinstance(source, data.IterableDataset)
    by_index = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    return by_index and not isinstance(source, (Iterable, Mapping, str, bytes))


def read_stream(
    source: Any,
    options: PixelOptions,
    layout: str | None,
    limit: int | None,
    where: str,
    progress: Progress,
    key: str | None = None,
) -> Arrays:
    """All images of `source` (at most `limit`), with labels and names where every item brings usable ones.

    An item is an image or a batch, alone, as a pair with its labels, or in a mapping with `image(s)` (or the field
    `key`), `label(s)` and `name(s)`, as webdataset's and Hugging Face's samples are. An image is a Pillow image, the
    bytes of an image file, or an array or tensor of three axes; a batch is an array or tensor of four. Items are taken
    once, one after the other, and no more of them than are asked for.
    """
    items: Iterable[Any] = (source[index] for index in range(len(source))) if is_map_dataset(source) else source
    total = len(source) if is_map_dataset(source) else 0
    total = min(total, limit) if limit is not None and total else total
    labels: list[np.ndarray | None] = []
    names: list[str] | None = []
    problem: InputError | None = None
    done, first = 0, None
    stored: list[np.ndarray] = []
    with Gathering() as images:
        for block, block_labels, block_names in _blocks(items, options, layout, where, stored, key):
            if limit is not None and done + len(block) > limit:
                block = block[: limit - done]
                block_labels = block_labels[: limit - done] if isinstance(block_labels, np.ndarray) else block_labels
            if first is None:
                first = block
            if (block.shape[1:], block.dtype) != (first.shape[1:], first.dtype):
                form, expected = f"{block.dtype} {block.shape[1:]}", f"{first.dtype} {first.shape[1:]}"
                raise InputError(
                    f"{where}: image {done} is {form}, those before are {expected}: convert them with resize=N, "
                    "color='rgb' or color='gray'"
                )
            images.append(block)
            if isinstance(block_labels, InputError):
                problem, block_labels = problem or block_labels, None
            labels.append(block_labels)
            if block_names is None:
                names = None
            elif names is not None:
                names += block_names[: len(block)]
            done += len(block)
            progress("reading images", done, max(total, done))
            if done == limit:
                break
        if done == 0:
            raise InputError(f"{where}: no images in it")
        gathered = images.array()
    found, notes = or_note(lambda: _joined(labels, problem, done, where))
    return Arrays(gathered, found, names, notes, sheets=_sheets(stored))


def _sheets(stored: list[np.ndarray]) -> tuple[int, int] | None:
    """What the first blocks, as they were before they were resized, look like (see `ImageSet.sheets`)."""
    if not stored or any(block.shape[1:] != stored[0].shape[1:] for block in stored):
        return None
    return rows_and_columns(np.concatenate(stored))


def _joined(labels: list[np.ndarray | None], problem: InputError | None, count: int, where: str) -> np.ndarray | None:
    """The labels of all blocks, or None where none brought any; raises `InputError`."""
    if problem is not None:
        raise problem
    given = [block for block in labels if block is not None]
    if not given:
        return None
    if len(given) < len(labels):
        raise InputError(f"{where}: some images have labels and some have none")
    try:
        return check_labels(np.concatenate(given), count, where)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: labels of different shapes") from None


def _blocks(
    items: Iterable[Any],
    options: PixelOptions,
    layout: str | None,
    where: str,
    stored: list[np.ndarray],
    key: str | None,
) -> Iterator[tuple[np.ndarray, np.ndarray | InputError | None, list[str] | None]]:
    """Images with their labels, with what is wrong with these, or with None; and with their names, or with None.

    stored: the first images are added to it as they are before `options` resize or crop them, where these do.
    """
    as_stored = replace(options, size=None, center_crop=False)
    for position, item in enumerate(items):
        place = f"{where}: item {position}"
        value, label, name = _split(item, place, key)
        if isinstance(value, (str, os.PathLike)):
            raise InputError(
                f"{place}: a {type(value).__name__}, not an image: give one folder or archive, or open each file "
                "(PIL.Image.open)"
            )
        if isinstance(value, (Image.Image, bytes)):
            if position < _LOOKED_AT and options != as_stored:
                stored.append(_from_pillow(value, as_stored, place))
            block, single = _from_pillow(value, options, place), True
        else:
            array = to_numpy(value)
            single = array.ndim == 3
            block = as_nchw(array[None] if single else array, layout, place)
            if position < _LOOKED_AT and options != as_stored:
                stored.append(block[:_LOOKED_AT])
            block = adapt(block, options, place, silent)
        found = None if label is None else _block_labels(label, len(block), single, place)
        yield block, found, _block_names(name, len(block), single)


def _block_names(name: Any, count: int, single: bool) -> list[str] | None:
    names = [name] if single else list(name) if isinstance(name, (list, tuple)) else []
    return [printable(each) for each in names] if [type(each) for each in names] == [str] * count else None


def _block_labels(label: Any, count: int, single: bool, place: str) -> np.ndarray | InputError:
    try:
        labels = to_numpy(label)
    except Exception:  # anything may stand where a label is expected
        return InputError(f"{place}: its label is a {type(label).__name__}, neither a number nor a vector")
    labels = labels[None] if single else labels
    if labels.shape[:1] != (count,):
        return InputError(f"{place}: {count} images with labels of shape {labels.shape}")
    return labels


def _split(item: Any, place: str, key: str | None) -> tuple[Any, Any, Any]:
    """The image(s) in `item`, the label(s) and the name(s), each of the latter None where there is none."""
    if isinstance(item, Mapping):
        wanted = _IMAGE_FIELDS if key is None else (key,)
        image = next((item[name] for name in wanted if name in item), None)
        if image is None:
            needed = "'image' or 'images' (or name its field with key=…)" if key is None else f"{key!r}"
            raise InputError(f"{place}: a mapping must hold {needed}, this one has {', '.join(map(str, item))}")
        if isinstance(image, Mapping):  # as Hugging Face's library keeps what it has not decoded
            image = _undecoded(image, place)
        label, name = (
            next((item[name] for name in fields if name in item), None) for fields in (_LABEL_FIELDS, _NAME_FIELDS)
        )
        return image, label, name
    if isinstance(item, (tuple, list)):
        if not 1 <= len(item) <= 2:
            raise InputError(f"{place}: must be an image, a batch, or a pair with its labels, has {len(item)} parts")
        return item[0], item[1] if len(item) == 2 else None, None
    return item, None, None


def _undecoded(image: Mapping[str, Any], place: str) -> bytes:
    data = image.get("bytes")
    if data is None and isinstance(path := image.get("path"), str) and os.path.isfile(path):
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    if not isinstance(data, bytes) or not data or len(data) > MAX_FILE_BYTES:
        raise InputError(f"{place}: its image has neither bytes nor a file here")
    return data


def _from_pillow(image: Image.Image | bytes, options: PixelOptions, place: str) -> np.ndarray:
    """A file that was opened but not loaded is read as a file is; pixels that are loaded are taken as they are."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            data = image if isinstance(image, bytes) else _unread_file(image)
            if data is not None:
                pixels = np.asarray(decode_image(data, options)[0])
            else:
                assert isinstance(image, Image.Image)
                pixels = np.asarray(convert(as_gray_or_rgb(image, options.alpha), options))
    except (BadImage, OSError) as bad:
        raise InputError(f"{place}: the image {bad}") from None
    return pixels.reshape(1, *pixels.shape[:2], -1).transpose(0, 3, 1, 2)


def _unread_file(image: Image.Image) -> bytes | None:
    """The file from which `image` was opened, where none of its pixels were loaded yet."""
    file = getattr(image, "fp", None)
    # Pillow's readers of WebP and AVIF say what there is to decode once they decode it.
    unread = isinstance(image, ImageFile.ImageFile) and (image.tile or getattr(image, "_im", image) is None)
    if not unread or file is None:
        return None
    position = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(position)
    return data
