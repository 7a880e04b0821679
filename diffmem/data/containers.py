"""Containers of image files: folders, zip archives (read in place, never extracted), saved Hugging Face datasets.

Each offers `description`, `names`, `labels`, `notes` (on labels that it has and cannot use), `mode` and `read(index)`;
`decode_pool` turns them into pixels. Files come in natural order of their names (`img2.png` before `img10.png`; folder
by folder), which for zero-padded names is the plain order.

Names follow the same rules in folders and archives. A backslash separates folders, as a slash does (some Windows tools
write such archives). Skipped are hidden files and folders (their name begins with a dot: `.ipynb_checkpoints`,
`.thumbnails`, `._img.png`), and folders in which systems keep copies of their own (`__MACOSX`, `@eaDir`, …: see
`SYSTEM_FOLDERS`).
"""

from __future__ import annotations

import os
import re
import stat
import struct
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from diffmem import system
from diffmem.data.decode import MAX_FILE_BYTES, image_suffixes
from diffmem.data.depth import BadImage
from diffmem.data.labels import DATASET_JSON, as_labels, or_note, parse_dataset_json
from diffmem.errors import InputError, MissingExtraError
from diffmem.text import printable

# Where macOS, network drives and Windows keep thumbnails, forks and deleted files, in lower case.
SYSTEM_FOLDERS = frozenset(
    {
        "__macosx",
        "@eadir",
        "@recycle",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "lost+found",
        "system volume information",
    }
)

# Pictures and films that are not read, so that nobody thinks they were.
UNREAD_PICTURES = frozenset(
    {
        *(".heic", ".heif", ".hif", ".jxl", ".svg", ".exr", ".hdr", ".eps", ".ai", ".pdf", ".dcm", ".nii"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".raw"),
        *(".mp4", ".mov", ".avi", ".webm", ".mkv", ".tar"),
    }
)

# Of dataset.json: a label of many entries takes some kilobytes.
_MOST_JSON_BYTES, _MOST_JSON_BYTES_PER_IMAGE = 2**24, 2**16
_NO_DIGITS = str.maketrans("123456789", "0" * 9)
_PIECES = re.compile(r"[0-9]+|[^0-9]+")
# A zip entry's own header, of which only the lengths of its name and its extra field are needed.
_METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
_LOCAL_HEADER = struct.Struct("<26xHH")
_BAD_ENTRY = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError)


def natural_key(name: str) -> list[list[tuple[Any, ...]]]:
    """Sorts path names folder by folder, runs of digits by their value."""
    *folders, base = name.split("/")
    return [*map(_folder_key, folders), _component_key(base)]


def _component_key(component: str) -> list[tuple[Any, ...]]:
    return [
        (0, len(value := piece.lstrip("0")), value, piece) if "0" <= piece[0] <= "9" else (1, piece)
        for piece in _PIECES.findall(component)
    ]


_folder_key = lru_cache(maxsize=1024)(_component_key)


def in_natural_order(names: Iterable[str]) -> list[str]:
    """The names by `natural_key`, a backslash counting as a slash. The plain order is the same where all names have
    their digits in the same places."""
    names = list(names)
    alike = len({name.translate(_NO_DIGITS) for name in names}) == 1 and "\\" not in names[0]
    return sorted(names, key=None if alike else lambda name: natural_key(with_slashes(name)))


def with_slashes(name: str) -> str:
    """The path `name` with "/" between its folders."""
    return name.replace("\\", "/")


def is_skipped(name: str) -> bool:
    """Whether the path `name`, relative to its source, is hidden or lies in a folder that a system keeps for itself.

    name: with "/" or "\\" between its folders.
    """
    folders, _, base = with_slashes(name).removeprefix("./").rpartition("/")
    return base.startswith(".") or _is_skipped_path(folders)


@lru_cache(maxsize=1024)
def _is_skipped_path(folders: str) -> bool:
    return any(_is_skipped_folder(folder) for folder in folders.split("/"))


def _is_skipped_folder(name: str) -> bool:
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in SYSTEM_FOLDERS


def is_image_name(name: str) -> bool:
    """Whether the file `name`, a path relative to its source, is read as an image; an upper-case suffix counts too."""
    stem, dot, suffix = name.rpartition(".")
    return bool(stem) and f"{dot}{suffix.lower()}" in image_suffixes() and not is_skipped(name)


def contents(names: Sequence[str]) -> str:
    """What lies there instead of images: how many files of which endings, in how many folders."""
    if not names:
        return "it holds no visible files"
    folders = {with_slashes(name).rpartition("/")[0] for name in names} - {""}
    inside = f" in {len(folders):,} folder{'s' if len(folders) > 1 else ''}" if folders else ""
    return f"it holds {len(names):,} file{'s' if len(names) > 1 else ''}{inside}: {_endings(names)}"


def _endings(names: Sequence[str]) -> str:
    counts = Counter(PurePosixPath(with_slashes(name)).suffix.lower() or "without extension" for name in names)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{printable(suffix)} ×{count:,}" for suffix, count in ordered[:6]]
    return ", ".join(shown) + (f" and {len(counts) - 6} other extensions" if len(counts) > 6 else "")


def _unread_note(path: Path, others: Sequence[str]) -> tuple[str, ...]:
    """A note on pictures and films of kinds that are not read, which would else be missed without a word."""
    unread = [name for name in others if PurePosixPath(with_slashes(name)).suffix.lower() in UNREAD_PICTURES]
    if not unread:
        return ()
    return (f"{path}: {len(unread):,} files of unsupported types were skipped ({_endings(unread)})",)


def files_without_images(folder: Path) -> list[str]:
    """The names of the files in `folder` and its subfolders in natural order; none where any is an image."""
    names = []
    for name in _walk(folder, "", set()):
        if is_image_name(name):
            return []
        names.append(name)
    return sorted(names, key=lambda name: natural_key(with_slashes(name)))


def _check_json_size(size: int, images: int) -> None:
    """Raises ValueError where dataset.json is larger than labels of so many images can be."""
    if size > _MOST_JSON_BYTES + images * _MOST_JSON_BYTES_PER_IMAGE:
        raise ValueError(f"it has {size / 1e6:,.0f} MB, too large for the labels of {images:,} images")


def is_index_folder(path: Path) -> bool:
    """Whether a folder holds an index (`diffmem.indexes`), not images."""
    return (path / "index.json").is_file() and (path / "shards").is_dir()


class Folder:
    """The image files in a folder and its subfolders (links are followed), or a single image file."""

    def __init__(self, path: Path) -> None:
        self.description = str(path)
        self._root = path if path.is_dir() else path.parent
        found = [path.name]
        if path.is_dir():
            files = list(_walk(self._root, "", set()))
            found = in_natural_order(name for name in files if is_image_name(name))
            others = [name for name in files if not is_image_name(name)]
        if not found:
            if is_index_folder(path):
                raise InputError(
                    f"{path}: an index of training images, not the images, which are needed here: give what `diffmem "
                    f"index info {path}` names as its sources"
                )
            raise InputError(f"{path}: no images in this folder or its subfolders; {contents(others)}")
        self.files: Sequence[str] = found  # as the system names them
        self.fork_safe = True
        self.mode: str | None = None
        self.names: Sequence[str] = [printable(name) for name in found]
        self.labels, self.notes = or_note(self._read_labels) if path.is_dir() else (None, ())
        self.notes += _unread_note(path, others) if path.is_dir() else ()

    def _read_labels(self) -> np.ndarray | None:
        path = self._root / DATASET_JSON
        if not path.is_file():
            return None
        try:
            _check_json_size(path.stat().st_size, len(self.names))
            data = path.read_bytes()
        except ValueError as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        return parse_dataset_json(data, [printable(with_slashes(name)) for name in self.files], self.description)

    def read(self, index: int) -> bytes:
        """The bytes of file `index`; raises `BadImage`."""
        try:
            with open(self._root / self.files[index], "rb", opener=_open_without_waiting) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise BadImage("is not a regular file")
                if status.st_size > MAX_FILE_BYTES:
                    raise BadImage(f"is larger ({status.st_size / 1e6:,.0f} MB) than any image that is accepted")
                return file.read()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from None


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a named pipe would otherwise wait for a writer


def _walk(folder: Path, prefix: str, above: set[tuple[int, int]]) -> Iterator[str]:
    try:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:  # a link to a folder that holds it
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    if not _is_skipped_folder(entry.name):
                        yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", above | {identity})
                elif not is_skipped(entry.name):
                    yield prefix + entry.name
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror}") from None


class ZipArchive:
    """The image files in a zip archive. Nothing is extracted: a name in it is never used as a path."""

    def __init__(self, path: Path) -> None:
        self.description = str(path)
        self._zip = open_zip(path)
        entries: dict[str, zipfile.ZipInfo] = {}
        others: list[str] = []
        for entry in self._zip.infolist():
            name = with_slashes(entry.filename)
            if not is_image_name(name) and name != DATASET_JSON:
                if not is_skipped(name) and not name.endswith("/"):
                    others.append(name)
                continue
            if name in entries:
                raise InputError(f"{path}: two entries are named {printable(name)}: create the archive again")
            entries[name] = entry
        found = in_natural_order(name for name in entries if name != DATASET_JSON)
        if not found:
            raise InputError(f"{path}: no images in this archive; {contents(others)}")
        self._entries = [entries[name] for name in found]
        # Other methods are unpacked by `ZipFile.read`, which moves the one position that processes would share.
        self.fork_safe = all(entry.compress_type in _METHODS for entry in self._entries)
        self.mode: str | None = None
        self.names: Sequence[str] = [printable(name) for name in found]
        self.labels, self.notes = or_note(lambda: self._read_labels(entries.get(DATASET_JSON)))
        self.notes += _unread_note(path, others)

    def _read_labels(self, entry: zipfile.ZipInfo | None) -> np.ndarray | None:
        if entry is None:
            return None
        try:
            _check_json_size(entry.file_size, len(self.names))
            data = self._zip.read(entry)
        except _BAD_ENTRY as error:
            raise InputError(f"{self.description}: {DATASET_JSON} cannot be read: {error}") from None
        return parse_dataset_json(data, self.names, self.description)

    def read(self, index: int) -> bytes:
        """The bytes of file `index`, its checksum verified; raises `BadImage`."""
        entry = self._entries[index]
        if reason := _unsafe(entry.orig_filename):
            raise BadImage(f"has an unsafe name ({reason})")
        if entry.flag_bits & 1:
            raise BadImage("is encrypted: decrypt the archive first")
        if entry.file_size > MAX_FILE_BYTES:
            raise BadImage(f"declares {entry.file_size / 1e6:,.0f} MB, more than any image that is accepted")
        try:
            return self._unpacked(entry)
        except _BAD_ENTRY as error:
            raise BadImage(f"cannot be unpacked: {error}") from None

    def _unpacked(self, entry: zipfile.ZipInfo) -> bytes:
        """What `ZipFile.read` gives, at a fifth of its cost and without its lock, for the usual two methods."""
        if entry.compress_type not in _METHODS:
            return self._zip.read(entry)
        assert self._zip.fp is not None
        descriptor = self._zip.fp.fileno()
        header = system.read_at(descriptor, _LOCAL_HEADER.size, entry.header_offset)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
            raise zipfile.BadZipFile("its header is damaged")
        start = entry.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header))
        data = system.read_at(descriptor, entry.compress_size, start)
        if entry.compress_type == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, entry.file_size + 1)
        if len(data) != entry.file_size or zlib.crc32(data) != entry.CRC:
            raise zipfile.BadZipFile("its contents do not match their checksum")
        return data


def open_zip(path: Path) -> zipfile.ZipFile:
    """The archive, whose entries have been seen not to overlap (as they do in zip bombs); raises `InputError`."""
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise InputError(
            f"{path}: not a complete zip archive (truncated or corrupt: {error}): download it or create it again"
        ) from None
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    ends = [entry.header_offset + entry.compress_size for entry in entries]
    if entries and (entries[0].header_offset < 0 or max(ends) > path.stat().st_size):
        raise InputError(
            f"{path}: not a complete zip archive (its entries reach beyond its end): download it or create it again"
        )
    for entry, end, following in zip(entries, ends, entries[1:], strict=False):
        if end > following.header_offset:
            names = f"{printable(entry.filename)} and {printable(following.filename)}"
            raise InputError(f"{path}: the entries {names} overlap, as in a zip bomb: create the archive again")
    return archive


def _unsafe(name: str) -> str | None:
    """Why nobody should use `name` as a path. We never do, but reports hand names on."""
    parts = re.split(r"[/\\]", name)
    if ".." in parts:
        return "it points outside its folder"
    if parts[0] == "" or re.match(r"[A-Za-z]:", name):
        return "it is absolute"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "it holds control characters"
    return None


HF = "hf:"  # how the name of a dataset of Hugging Face's library begins, of which only what is on this disk is read


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets` saved a dataset, or a dictionary of them, in the folder `path`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def is_hugging_face(source: Any) -> bool:
    """Whether `source` is a dataset of Hugging Face's library that is read by index, or a dictionary of such; does not
    import it."""
    datasets = sys.modules.get("datasets")
    kinds = tuple(getattr(datasets, name, ()) for name in ("Dataset", "DatasetDict"))
    return datasets is not None and isinstance(source, kinds)


class HuggingFaceDataset:
    """A dataset of Hugging Face's library, in memory or as `save_to_disk` wrote it: a column of images and the labels.

    Args:
        source: The folder, or the dataset.
        key: The split, where there are several; of a dataset in memory that has none, the column of images.
        column: Of the images; None takes `image`, or the first one.
        label: Column of the labels; None takes `label`, `labels`, or the first of class labels.
    """

    def __init__(self, source: Any, key: str | None, column: str | None = None, label: str | None = None) -> None:
        path = source if isinstance(source, Path) else type(source).__name__
        try:
            import datasets
        except ImportError:
            raise MissingExtraError("datasets", "datasets", f"reading {path}, a saved Hugging Face dataset,") from None
        self.description = str(path)
        self._in_memory = not isinstance(source, Path)
        dataset = source
        if not self._in_memory:
            try:
                dataset = datasets.load_from_disk(str(path))
            except Exception as error:  # pyarrow and datasets raise many kinds
                words = " ".join(str(error).split())
                raise InputError(f"{path}: not a complete Hugging Face dataset: {words}") from None
        if isinstance(dataset, datasets.DatasetDict):
            key, _, rest = (key or "").partition(":")
            dataset, column = self._pick("split", dataset, list(dataset), key or None), rest or column
        elif self._in_memory:
            column = column or key
        features = dataset.features
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        if not images:
            raise InputError(f"{path}: no image column among {', '.join(features)}")
        if column is not None and column not in images:
            raise InputError(f"{path}: no column {column!r} of images; there are {', '.join(images)}")
        if label is not None and label not in features:
            raise InputError(f"{path}: no label column {label!r} among {', '.join(features)}")
        picked = column is not None
        column = column or ("image" if "image" in images else images[0])
        # The mode to which `datasets` converts what it decodes, where the feature names one that images can have here.
        self.fork_safe = False  # Arrow has threads
        self.mode: str | None = features[column].mode if features[column].mode in ("L", "RGB") else None
        self._rows = dataset.select_columns(column).cast_column(column, datasets.Image(decode=False))
        self._column = column
        self.names: Sequence[str] = [f"{column}-{index:08d}" for index in range(len(dataset))]
        classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        labels = label or next((name for name in ("label", "labels", *classes) if name in features), None)
        self.labels: np.ndarray | None = None
        self.notes: tuple[str, ...] = ()
        if labels is not None:
            read = lambda: as_labels(dataset[labels][:], self.names, f"{path}: column {labels}")  # noqa: E731
            self.labels, self.notes = or_note(read)
        if len(images) > 1 and column != "image" and not picked:
            self.notes += (f"{path}: of its image columns, {', '.join(images)}, the first one was used",)

    def _pick(self, what: str, mapping: Any, names: Sequence[str], key: str | None) -> Any:
        if key is None and len(names) == 1:
            key = names[0]
        if key not in names:
            raise InputError(f"{self.description}: pick one {what} with key=…: {', '.join(names)}")
        return mapping[key]

    def read(self, index: int) -> bytes:
        """The bytes of image `index`; raises `BadImage`."""
        item = self._rows[index][self._column]
        if self._in_memory and item is not None and item["bytes"] is None and os.path.isfile(item["path"] or ""):
            with open(item["path"], "rb") as file:  # the caller's own, which Hugging Face's library would open too
                return file.read(MAX_FILE_BYTES)
        if item is None or item["bytes"] is None:  # a path on somebody's disk, perhaps not even this machine's
            raise BadImage("is not stored in the dataset itself: save it again with its images embedded")
        return item["bytes"]
