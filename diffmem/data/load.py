"""`load_images`: the front door to every kind of image source."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np

from diffmem.data import builtin
from diffmem.data.adapt import adapt
from diffmem.data.arrays import (
    Arrays,
    as_nchw,
    check_finite,
    is_tensor,
    read_npy,
    read_npz,
    read_pt,
    read_safetensors,
    to_numpy,
)
from diffmem.data.cache import CachedCopy
from diffmem.data.cifar import is_cifar, read_cifar
from diffmem.data.containers import (
    HF,
    Folder,
    HuggingFaceDataset,
    ZipArchive,
    files_without_images,
    is_hugging_face,
    is_saved_dataset,
)
from diffmem.data.decode import PixelOptions, image_suffixes
from diffmem.data.decode_forks import can_fork
from diffmem.data.decode_pool import Decoding, EncodedImages, decode_all
from diffmem.data.grid import rows_and_columns, sheets_of_files
from diffmem.data.hdf5 import HDF5_SUFFIXES, read_hdf5
from diffmem.data.image_set import ImageRecipe, ImageSet
from diffmem.data.image_source import ImageSource
from diffmem.data.labels import check_labels, or_note
from diffmem.data.lmdb import LmdbImages, lmdb_file
from diffmem.data.medical import medical_files, read_medical
from diffmem.data.parquet import ParquetImages, parquet_files
from diffmem.data.streams import is_map_dataset, read_stream
from diffmem.data.tar_shards import TarShards, expand_braces
from diffmem.data.tiff_stacks import TiffStack, pages
from diffmem.data.value_range import as_bytes, check_value_range
from diffmem.errors import InputError, MissingExtraError
from diffmem.logs import logger
from diffmem.progress import Progress, silent
from diffmem.recognize import network_kind

_log = logger(__name__)


def load_images(
    source: ImageSource,
    *,
    resize: int | tuple[int, int] | None = None,
    center_crop: bool = False,
    color: str | None = None,
    alpha: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    cache: bool = False,
    key: str | None = None,
    layout: str | None = None,
    value_range: tuple[float, float] | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """The images of `source` as an `ImageSet`: uint8 [N, C, H, W], or float32 / float64 where the source holds floats
    and no `value_range` is given.

    What counts as a file's pixels is in `diffmem.data.decode`: images are turned as their EXIF orientation says, which
    a note counts, and none loses bits. Labels and file names are kept. Arrays of more than a quarter of the machine's
    memory lie in a memory-mapped temporary file. The images must not be written to.

    Args:
        source: A folder (searched recursively, files in natural order), a zip archive (EDM's layout or any other), a
            single image file, tar archives of webdataset and img2dataset (one, a folder of them, or
            "train-{000..127}.tar"), parquet (a file, or a folder as the hub of Hugging Face holds), `.npz` (`images`
            NCHW and `labels`, ADM's `arr_0` NHWC, or MedMNIST's `train_images`), `.npy`, `.pt`, `.safetensors`, HDF5
            (`.h5`), LMDB (values that are image files), a TIFF stack (each page an image), DICOM and NIfTI (a file,
            or a folder; each slice an image), `cifar-10-python.tar.gz`, a saved Hugging Face dataset,
            "hf:PATH?split=…&column=…&label=…" (the same or parquet, on this disk), a dataset of Hugging Face's
            library, "builtin:digits", "builtin:patches?n=…&seed=…", a numpy array, a torch tensor, a torch dataset or
            another one read by index, an iterable of images or batches (alone or with labels), which is read once, an
            `ImageSet`, or a `DatasetSpec`.
        resize: N for N×N, or (height, width), in pixels: Lanczos resampling with antialiasing, not keeping the aspect
            ratio.
        center_crop: Cut out the central square first, as the preprocessing of ADM and EDM does for images that are not
            square; with `resize` the square is then resized.
        color: "gray" (one channel, ITU-R 601 luma) or "rgb" (three equal channels for gray images); None changes
            nothing.
        alpha: What becomes of transparent pixels: "drop" takes their colors as stored, "white" and "black" put them on
            that background; None refuses files with such pixels, and leaves arrays of four channels as they are.
        limit: Only the first so many images (files, where the source is made of files).
        skip_bad: Skip files that cannot be used; they are listed in `ImageSet.skipped`.
        cache: Keep a packed, memory-mapped copy beside a folder, zip or dataset of files and use it while the source's
            contents are the same (see `diffmem.data.cache`). Array files have nothing to cache.
        key: Which array of an `.npz`, `.pt`, `.safetensors` or HDF5 file; which split of a saved Hugging Face dataset;
            the ending of the images in tar archives whose samples hold several ("jpg"); the column of a parquet file
            (of a folder of them: the split, or split and column, "train:image"); the field of mappings from Python; or
            "train" (default), "test" or "all" of CIFAR-10's archive, and also "val" of MedMNIST's.
        layout: "NCHW" or "NHWC" for arrays whose shape leaves that open.
        value_range: The values of black and white where the source holds floats, such as (-1, 1), (0, 1) or (0, 255):
            they are rounded to gray levels. Values a little beyond are clipped. Sources of uint8 are not changed.
        progress: Called as `progress(stage, done, total)`.

    Returns:
        The images with their names, labels and notes.

    Raises:
        InputError: The source cannot be read, is empty, or holds values that are not finite; the message names the file
            and what to do.
        MissingExtraError: The source needs an optional package.

    Example:
        >>> load_images("builtin:digits", limit=100)
        ImageSet(builtin:digits: uint8 [100, 1, 8, 8], labels int64 [100])
        >>> load_images(np.zeros((2, 3, 32, 32)), value_range=(-1, 1)).images[0, 0, 0, 0]
        np.uint8(128)
    """
    return _load(
        source, None, resize=resize, center_crop=center_crop, color=color, alpha=alpha, limit=limit, skip_bad=skip_bad,
        cache=cache, key=key, layout=layout, value_range=value_range, progress=progress,
    )  # fmt: skip


class Loading:
    """`load_images` in two steps: files of images are decoded from now on, where processes may be forked for it
    (`diffmem.data.decode_forks`); all else is done in `result`, which also says what is wrong with the source.

    Close it. Takes what `load_images` takes.
    """

    _checking: _Checking | None = None

    def __init__(self, source: ImageSource, **options: Any) -> None:
        self._source: Any = source
        self._options: dict[str, Any] = dict.fromkeys(_DEFAULT_NONE) | _DEFAULTS | options
        self._begun: _Begun | None = None
        if can_fork():
            # Whatever is wrong, `result` meets it again.
            with suppress(InputError, MissingExtraError, OSError):
                self._begun = _begin(source, **self._options)

    def result(self) -> ImageSet:
        """The images."""
        return _load(self._source, self._begun or self._checking, **self._options)

    def check_meanwhile(self) -> None:
        """Checks the cached copy, where there is one of a file, in a thread from now on; nothing may be forked after
        that."""
        with suppress(InputError, MissingExtraError, OSError):
            if self._begun is None and (found := _copy_of(self._source, **self._options)) is not None:
                _, path, copy = found
                if copy is not None and copy.exists and path.is_file():
                    self._checking = _Checking(copy)

    def close(self) -> None:
        """Ends what is still going on."""
        if self._checking is not None:
            self._checking.result()
        if self._begun is not None:
            self._begun.decoding.close()


class _Checking:
    """A cached copy that is checked in a thread: hashing leaves the interpreter to others, such as imports."""

    def __init__(self, copy: CachedCopy) -> None:
        self.copy = copy
        self._found: ImageSet | None = None
        self._thread = Thread(target=self._check, name="diffmem-cached-copy", daemon=True)
        self._thread.start()

    def _check(self) -> None:
        with suppress(Exception):  # whoever wants the images meets it again
            self.copy.examine(None, silent)
            self._found = self.copy.read()
            if self._found is not None:
                self._found.pixel_fingerprint  # noqa: B018  an index asks for it

    def result(self) -> ImageSet | None:
        """The images, where the copy is one of its source."""
        self._thread.join()
        return self._found


class _Begun(NamedTuple):
    """A source that is being decoded."""

    encoded: EncodedImages
    decoding: Decoding
    copy: CachedCopy | None


_DEFAULT_NONE = ("resize", "color", "alpha", "limit", "key", "layout", "value_range", "progress")
_DEFAULTS = {"center_crop": False, "skip_bad": False, "cache": False}


def _begin(source: Any, **given: Any) -> _Begun | None:
    """Begins to decode `source` if it is a container of image files without a cached copy."""
    if (found := _copy_of(source, **given)) is None:
        return None
    options, path, copy = found
    limit, skip_bad, key = given["limit"], given["skip_bad"], given["key"]
    if copy is not None and copy.exists:
        return None
    encoded = _encoded(path, key)
    if encoded is None or not encoded.fork_safe:
        return None
    progress = given["progress"] or silent
    if copy is not None:
        copy.examine(encoded, progress)
    options = replace(options, mode=encoded.mode)
    return _Begun(encoded, Decoding(encoded, options, limit=limit, skip_bad=skip_bad, progress=progress), copy)


def _copy_of(source: Any, **given: Any) -> tuple[PixelOptions, Path, CachedCopy | None] | None:
    """What may be decoded or checked ahead: how, where it lies, and its cached copy where one is asked for."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    text, path = _path_of(source)
    if text.startswith((builtin.PREFIX, HF)) or network_kind(path) is not None:
        return None
    options = _pixel_options(given["color"], given["resize"], given["center_crop"], given["alpha"])
    settings = _settings(text, options, given["limit"], given["skip_bad"], given["key"])
    return options, path, CachedCopy(path, settings) if given["cache"] else None


def _path_of(source: str | os.PathLike[str]) -> tuple[str, Path]:
    """A source as text, and the path in it."""
    text = os.fspath(source)
    return text, Path(text.removeprefix(HF).partition("?")[0] if text.startswith(HF) else text).expanduser()


def _pixel_options(color: str | None, resize: Any, center_crop: bool, alpha: str | None) -> PixelOptions:
    color = "grey" if color == "gray" else color
    options = PixelOptions(color, _size(resize), center_crop, alpha)
    if color not in (None, "grey", "rgb"):
        raise InputError(f"color must be 'gray', 'rgb' or None, not {color!r}")
    if alpha not in (None, "drop", "white", "black"):
        raise InputError(f"alpha must be 'drop', 'white', 'black' or None, not {alpha!r}")
    return options


def _settings(text: str, options: PixelOptions, limit: int | None, skip_bad: bool, key: str | None) -> dict[str, Any]:
    """What a cached copy depends on besides the contents of its source."""
    settings: dict[str, Any] = {
        "color": options.color, "size": options.size, "limit": limit, "skip_bad": skip_bad, "key": key
    }  # fmt: skip
    if options.center_crop:
        settings["center_crop"] = True
    settings |= {} if options.alpha is None else {"alpha": options.alpha}
    return settings | ({"source": text.partition("?")[2]} if text.startswith(HF) else {})


def _load(
    source: Any, begun: _Begun | _Checking | None, *, resize: Any, center_crop: bool, color: str | None,
    alpha: str | None, limit: int | None, skip_bad: bool, cache: bool, key: str | None, layout: str | None,
    value_range: tuple[float, float] | None, progress: Progress | None,
) -> ImageSet:  # fmt: skip
    options = _pixel_options(color, resize, center_crop, alpha)
    if layout not in (None, "NCHW", "NHWC"):
        raise InputError(f"layout must be 'NCHW', 'NHWC' or None, got {layout!r}")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    report = progress or silent
    value_range = None if value_range is None else check_value_range(value_range)

    if isinstance(source, ImageSet):
        return _finish(_with_checked_labels(source), options, limit, value_range, report)

    def finish(images: ImageSet) -> ImageSet:
        return _logged(_finish(images, options, limit, value_range, report))

    if isinstance(source, ImageRecipe):
        return finish(source.load(report))
    if isinstance(source, str) and source.startswith(builtin.PREFIX):
        return finish(_image_set(builtin.read_builtin(source, limit), source))
    if isinstance(source, (str, os.PathLike)):
        text, path = _path_of(source)
        if (kind := network_kind(path)) is not None:
            raise InputError(
                f"{path}: is {kind}, not a set of images: sample it and pass the images (`diffmem sample` samples"
                " networks of diffmem and snapshots of EDM)"
            )
        encoded: EncodedImages | None
        copy: CachedCopy | None
        if isinstance(begun, _Checking):
            if (cached := begun.result()) is not None:
                return _logged(cached)
            begun = None
        if begun is not None:
            encoded, copy = begun.encoded, begun.copy
        else:
            copy = CachedCopy(path, _settings(text, options, limit, skip_bad, key)) if cache else None
            # A file need not be opened to know whether the copy is one of it.
            if copy is not None and copy.exists and path.is_file():
                copy.examine(None, report)
                if (cached := copy.read()) is not None:
                    return _logged(cached)
            encoded = _hugging_face(text, path, key) if text.startswith(HF) else _encoded(path, key)
        if encoded is not None:
            if copy is not None and begun is None:
                copy.examine(encoded, report)
                if not path.is_file() and (cached := copy.read()) is not None:
                    return _logged(cached)
            images = _decoded(encoded, options, limit, skip_bad, report, begun)
            return _logged(images if copy is None else copy.write(images))
        slices = medical_files(path.parent, [path.name]) if path.is_file() else _slices_in(path)
        if slices:
            return finish(_image_set(read_medical(slices, path, limit, report), str(path)))
        return finish(_image_set(_array_file(path, key, layout, report), str(path)))
    if isinstance(source, np.ndarray) or is_tensor(source):
        where = "array" if isinstance(source, np.ndarray) else "tensor"
        return finish(_image_set(Arrays(as_nchw(to_numpy(source), layout, where, assume="NCHW")), where))
    if is_hugging_face(source):
        return _logged(_decoded(HuggingFaceDataset(source, key), options, limit, skip_bad, report))
    if is_map_dataset(source) or (isinstance(source, Iterable) and not isinstance(source, (Mapping, bytes))):
        where = type(source).__name__
        arrays = read_stream(source, options, layout, limit, where, report, key)
        return finish(_image_set(arrays, where))
    raise InputError(
        f"cannot read images from an object of type {type(source).__name__}: give a path, an array, a tensor or an "
        "iterable of images"
    )


def _logged(images: ImageSet) -> ImageSet:
    """The images; what a caller might want to know of how they were read is logged."""
    for note in images.notes:
        _log.info("%s", note)
    for file in images.skipped:
        _log.warning("%s: skipped %s: %s", images.source, file.name, file.reason)
    return images


def _decoded(
    encoded: EncodedImages, options: PixelOptions, limit: int | None, skip_bad: bool, progress: Progress,
    begun: _Begun | None = None,
) -> ImageSet:  # fmt: skip
    """The decoded images of a container of files."""
    options = replace(options, mode=encoded.mode)
    if begun is not None:
        images, kept, skipped, turned = begun.decoding.result()
    else:
        images, kept, skipped, turned = decode_all(encoded, options, limit=limit, skip_bad=skip_bad, progress=progress)
    labels = None if encoded.labels is None else encoded.labels[kept]
    sheets = None if options.size is None and not options.center_crop else sheets_of_files(encoded, kept[:8], options)
    notes = encoded.notes if not turned else (*encoded.notes, _turned_note(encoded.description, turned, len(images)))
    return ImageSet(
        images, [encoded.names[index] for index in kept], labels, encoded.description, skipped, notes, sheets
    )


def _turned_note(source: str, turned: int, count: int) -> str:
    return (
        f"{source}: {turned:,} of {count:,} images have an EXIF orientation, which was applied (image viewers and "
        "Hugging Face datasets do so too; torchvision and EDM's dataset tool read the pixels as stored)"
    )


def _encoded(path: Path, key: str | None) -> EncodedImages | None:
    """The container of image files that `path` is, or None where it is an array file."""
    if path.is_dir():
        if is_saved_dataset(path):
            return HuggingFaceDataset(path, key)
        if (database := lmdb_file(path)) is not None:
            return LmdbImages(database, str(path))
        return _packed(path, key) or (None if _slices_in(path) else Folder(path))
    if not path.is_file():
        if (shards := expand_braces(str(path))) is not None:
            return TarShards(shards, str(path), key)
        raise InputError(f"{path}: no such file or folder")
    suffix = path.suffix.lower()
    if suffix == ".zip":
        return ZipArchive(path)
    if suffix == ".tar" and not is_cifar(path):
        return TarShards([path], str(path), key)
    if suffix == ".parquet":
        return ParquetImages([path], str(path), key)
    if (database := lmdb_file(path)) is not None:
        return LmdbImages(database, str(path))
    if suffix in (".tif", ".tiff") and (count := pages(path)) > 1:
        return TiffStack(path, count)
    return Folder(path) if suffix in image_suffixes() else None


def encoded_images(source: str, key: str | None) -> EncodedImages | None:
    """The container of image files that `source`, a path or "hf:PATH?…", is; None where it is an array file."""
    if source.startswith(HF):
        return _hugging_face(source, Path(source.removeprefix(HF).partition("?")[0]).expanduser(), key)
    return _encoded(Path(source).expanduser(), key)


def _hugging_face(source: str, path: Path, key: str | None) -> EncodedImages:
    """The images that `hf:PATH?split=…&column=…&label=…` names: a saved dataset, parquet, or a folder of it."""
    query = source.partition("?")[2]
    try:
        options = dict(parse_qsl(query, strict_parsing=True)) if query else {}
    except ValueError:
        options = {"?": query}
    if unknown := options.keys() - {"split", "column", "label"}:
        raise InputError(f"{source}: no option {min(unknown)}: there are split, column and label")
    if not path.exists():
        raise InputError(
            f"{source}: there is no folder {path}, and nothing is downloaded: download it (`hf download`), and give "
            "its folder"
        )
    split, column, label = options.get("split", key), options.get("column"), options.get("label")
    if is_saved_dataset(path):
        return HuggingFaceDataset(path, split, column, label)
    if path.is_file():
        files = [path] if path.suffix.lower() == ".parquet" else []
    else:
        files = [path / name for name in files_without_images(path) if name.lower().endswith(".parquet")]
    if not files:
        raise InputError(f"{source}: neither a dataset that `save_to_disk` wrote nor parquet files are there")
    if path.is_dir() and split is not None:
        files, rest = parquet_files(files, path, split)
        if rest is not None and rest == split:
            raise InputError(f"{source}: there is no split {split!r}")
        column = rest or column
    elif path.is_dir():
        files, _ = parquet_files(files, path, None)
    return ParquetImages(files, str(path), column, label)


def _slices_in(folder: Path) -> list[Path]:
    """The DICOM and NIfTI files in a folder without image files."""
    return medical_files(folder, files_without_images(folder))


def _packed(folder: Path, key: str | None) -> EncodedImages | None:
    """The shards in a folder without image files, or None where there are none."""
    names = files_without_images(folder)
    if shards := [folder / name for name in names if name.lower().endswith(".tar")]:
        return TarShards(shards, str(folder), key)
    if tables := [folder / name for name in names if name.lower().endswith(".parquet")]:
        files, column = parquet_files(tables, folder, key)
        return ParquetImages(files, str(folder), column)
    return None


def _array_file(path: Path, key: str | None, layout: str | None, progress: Progress) -> Arrays:
    name = path.name.lower()
    if name.endswith((".tar.gz", ".tgz", ".tar")):
        return read_cifar(path, key or "train", progress)
    if name.endswith(".npy"):
        return read_npy(path, layout)
    if name.endswith(HDF5_SUFFIXES):
        return read_hdf5(path, key, layout, progress)
    readers = {".npz": read_npz, ".pt": read_pt, ".pth": read_pt, ".safetensors": read_safetensors}
    if path.suffix.lower() not in readers:
        raise InputError(
            f"{path}: unsupported file type: give a folder, an image, .zip, .tar, .parquet, .npz, .npy, .pt,"
            " .safetensors, .h5 or cifar-10-python.tar.gz"
        )
    return readers[path.suffix.lower()](path, key, layout)


def _image_set(arrays: Arrays, source: str) -> ImageSet:
    return ImageSet(arrays.images, arrays.names, arrays.labels, source, notes=arrays.notes, sheets=arrays.sheets)


def _with_checked_labels(images: ImageSet) -> ImageSet:
    """A caller's own set, its labels in the form that labels of files get."""
    if images.labels is None:
        return images
    labels, notes = or_note(lambda: check_labels(np.asarray(images.labels), len(images), images.source))
    if labels is not None and np.array_equal(labels, images.labels):
        return images
    return replace(images, labels=labels, notes=(*images.notes, *notes))


def _finish(
    images: ImageSet,
    options: PixelOptions,
    limit: int | None,
    value_range: tuple[float, float] | None,
    progress: Progress,
) -> ImageSet:
    """Images from arrays: shortened, checked and brought to the wanted form."""
    if limit is not None and limit < len(images):
        images = images.select(slice(limit))
    if images.images.size == 0:
        raise InputError(f"{images.source}: no images in it (shape {images.images.shape})")
    check_finite(images.images, images.source)
    if value_range is not None and images.images.dtype != np.uint8:
        images = replace(images, images=as_bytes(images.images, value_range, images.source, progress))
    adapted = adapt(images.images, options, images.source, progress)
    if adapted is images.images:
        return images
    sheets = images.sheets
    if sheets is None and adapted.shape[2:] != images.image_shape[1:]:
        sheets = rows_and_columns(images.images)
    return replace(images, images=adapted, sheets=sheets)


def _size(resize: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if resize is None:
        return None
    size = tuple(resize) if isinstance(resize, (tuple, list)) else (resize, resize)
    if len(size) != 2 or not all(isinstance(length, int) and 1 <= length <= 8192 for length in size):
        raise InputError(f"resize must be N or (height, width), each within 1 … 8192, got {resize!r}")
    return size
