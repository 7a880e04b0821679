"""Parquet files with columns of encoded images, as Hugging Face's hub and img2dataset hold them.

A column of images holds the bytes of an image file per row (binary), Hugging Face's `{"bytes", "path"}`, or a list of
either, each of which is an image of its own. Rows are read some at a time: a file may be larger than the memory. Paths
in a file are names, and never opened.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.data.depth import BadImage
from diffmem.data.labels import as_labels, or_note
from diffmem.errors import InputError, MissingExtraError
from diffmem.inert.boundary import parsing
from diffmem.text import printable

_ROWS = 32  # of a batch
_MOST_BATCHES = 512  # kept, since several threads read blocks that lie near each other
_LARGEST_BATCHES = 2**28  # bytes
_USUAL_NAMES = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
_LABEL_NAMES = ("label", "labels", "cls")
_NAME_COLUMNS = ("file_name", "filename", "__key__", "key")
_SPLIT = re.compile(r"(?:.*/)?([A-Za-z][A-Za-z0-9_]*)-[0-9]+-of-[0-9]+(?:-[0-9a-f]+)?\.parquet")
_ADVICE = "download or write it again"


def split_of(name: str) -> str | None:
    """The split that the name of a file of the hub's says: "train" of `data/train-00000-of-00002.parquet`."""
    match = _SPLIT.fullmatch(name)
    return match[1] if match else None


class ParquetImages:
    """The images in a column of one parquet file, or of several with the same columns.

    Args:
        files: In order.
        description: What they are called.
        column: Of the images; None takes the only one, or the one with the usual name.
        label: Column of the labels; None takes `label`, `labels`, `cls` or one of Hugging Face's ClassLabel.
    """

    def __init__(self, files: Sequence[Path], description: str, column: str | None, label: str | None = None) -> None:
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise MissingExtraError("pyarrow", "parquet", f"reading {description}, parquet,") from None
        self.description = description
        self._lock = threading.Lock()
        self._files = list(files)
        opened = [_open(path) for path in self._files]
        schema = opened[0].schema_arrow
        for path, file in zip(self._files, opened, strict=True):
            if not schema.equals(file.schema_arrow):
                raise InputError(f"{description}: the columns of {path.name} are not those of {self._files[0].name}")
        self._column, several = _image_column(schema, column, description)
        features = _features(schema)
        mode = features.get(self._column, {}).get("mode")
        self.fork_safe = False  # Arrow has threads
        self.mode: str | None = mode if mode in ("L", "RGB") else None
        self._find_images(opened, _name_column(schema))
        if not self.names:
            raise InputError(f"{description}: no images in its column {printable(self._column)}")
        self.notes: tuple[str, ...] = ()
        self.labels: np.ndarray | None = None
        classes = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
        if label is not None and label not in schema.names:
            raise InputError(f"{description}: no label column {label!r} among {_listed(schema.names)}")
        chosen = label or next((name for name in (*_LABEL_NAMES, *classes) if name in schema.names), None)
        if chosen is not None:
            self.labels, self.notes = or_note(lambda: self._read_labels(opened, chosen))
        if several:
            self.notes += (f"{description}: of its image columns, {', '.join(several)}, the first one was used",)
        self._opened = opened
        self._batches: dict[tuple[int, int], list[Any]] = {}
        self._kept_bytes = 0
        self._coming: Iterator[Any] = iter(())
        self._next: tuple[int, int] | None = None

    def _find_images(self, opened: list[Any], named_by: str | None) -> None:
        """Names, and where each image lies: file, row, and place in the row's list."""
        places, names = [], []
        nested = _is_list(opened[0].schema_arrow.field(self._column).type)
        for number, (path, file) in enumerate(zip(self._files, opened, strict=True)):
            prefix = f"{path.stem}/" if len(opened) > 1 else ""
            rows = file.metadata.num_rows
            titles: list[Any] = [None] * rows
            counts = np.ones(rows, np.int64)
            with parsing(path, "a complete parquet file", _ADVICE):
                if named_by is not None:
                    titles = file.read([named_by]).column(0).to_pylist()
                if nested:
                    lengths = [
                        len(each) if each.is_valid else 0
                        for batch in file.iter_batches(_ROWS, columns=[self._column], use_threads=False)
                        for each in batch.column(0)
                    ]
                    counts = np.array(lengths, np.int64)
                if len(titles) != rows or len(counts) != rows:
                    raise ValueError(f"{rows:,} rows are declared, others are there")
            total = int(counts.sum())
            row = np.repeat(np.arange(rows), counts)
            place = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
            places.append(np.stack([np.full(total, number), row, place], axis=1))
            for index, position in zip(row.tolist(), place.tolist(), strict=True):
                title = f"row-{index:08d}" if titles[index] is None else printable(str(titles[index]))
                names.append(f"{prefix}{title}" + (f"#{position}" if nested else ""))
        self._nested = nested
        self._places = np.concatenate(places)
        self.names: Sequence[str] = names

    def _read_labels(self, opened: list[Any], column: str) -> np.ndarray:
        values = []
        for path, file in zip(self._files, opened, strict=True):
            with parsing(path, "a complete parquet file", _ADVICE):
                values.append(file.read([column]).column(0).to_pylist())
        chosen = [values[number][row] for number, row, _ in self._places.tolist()]
        return as_labels(chosen, self.names, f"{self.description}: column {printable(column)}")

    def read(self, index: int) -> bytes:
        """The bytes of image `index`; raises `BadImage`."""
        number, row, place = self._places[index].tolist()
        with self._lock:
            try:
                with parsing(self._files[number], "a complete parquet file", _ADVICE):
                    value = self._batch(number, row // _ROWS)[row % _ROWS].as_py()
            except InputError as error:
                raise BadImage(f"cannot be read: {error}") from None
        value = value[place] if self._nested and value is not None else value
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                raise BadImage("is not stored in the file itself, which holds its path: write it with its bytes")
            value = value.get("bytes")
        if not value:
            raise BadImage("is missing: its row holds no bytes")
        return bytes(value)

    def _batch(self, number: int, batch: int) -> Any:
        """Batch `batch` of file `number`, reading on from the one read last where that is possible."""
        wanted = (number, batch)
        while wanted not in self._batches:
            if self._next is None or self._next[0] != number or not self._next[1] <= batch:
                self._restart(number, batch)
            assert self._next is not None
            rows = next(self._coming).column(0)
            self._batches[self._next] = rows
            self._kept_bytes += rows.nbytes
            self._next = (number, self._next[1] + 1)
            while len(self._batches) > 1 and (
                len(self._batches) > _MOST_BATCHES or self._kept_bytes > _LARGEST_BATCHES
            ):
                self._kept_bytes -= self._batches.pop(next(iter(self._batches))).nbytes  # type: ignore[attr-defined]
        return self._batches[wanted]

    def _restart(self, number: int, batch: int) -> None:
        """Begin at the last row group whose first row begins a batch at or before `batch`."""
        file = self._opened[number]
        first, start, begin = 0, 0, 0
        for group in range(file.num_row_groups):
            if start % _ROWS == 0 and start // _ROWS <= batch:
                first, begin = group, start // _ROWS
            start += file.metadata.row_group(group).num_rows
        groups = list(range(first, file.num_row_groups))
        self._coming = file.iter_batches(_ROWS, row_groups=groups, columns=[self._column], use_threads=False)
        self._next = (number, begin)


def _open(path: Any) -> Any:
    import pyarrow.parquet

    with parsing(path, "a complete parquet file", _ADVICE):
        if isinstance(path, Path):
            return pyarrow.parquet.ParquetFile(path)
        # Elsewhere: some pages at a time, rather than whole row groups.
        return pyarrow.parquet.ParquetFile(path.open(), buffer_size=2**20, pre_buffer=False)


def _image_column(schema: Any, wanted: str | None, where: str) -> tuple[str, list[str]]:
    """The column of images, and all candidates where it was one of several by order alone."""
    found = [field.name for field in schema if _holds_images(field.type)]
    if wanted is not None:
        if wanted not in found:
            kinds = "bytes of image files" if wanted in schema.names else "that name"
            raise InputError(f"{where}: no column {wanted!r} of {kinds}; columns: {_listed(schema.names)}")
        return wanted, []
    if not found:
        raise InputError(f"{where}: no column of image files' bytes among {_listed(schema.names)}")
    usual = [name for name in _USUAL_NAMES if name in found]
    if not usual and len(found) > 1:
        raise InputError(f"{where}: pick the column of images with key=…: {_listed(found)}")
    chosen = (usual or found)[0]
    return chosen, [chosen, *(name for name in found if name != chosen)] if len(found) > 1 else []


def _holds_images(kind: Any) -> bool:
    import pyarrow.types as types

    if _is_list(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        fields = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
        return "bytes" in fields and _is_bytes(fields["bytes"])
    return _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_list(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _name_column(schema: Any) -> str | None:
    import pyarrow.types as types

    return next((n for n in _NAME_COLUMNS if n in schema.names and types.is_string(schema.field(n).type)), None)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What Hugging Face's library says of the columns, in the file's metadata."""
    with suppress(KeyError, TypeError, ValueError, RecursionError, AttributeError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    return {}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def parquet_files(files: Sequence[Path], folder: Path, key: str | None) -> tuple[list[Path], str | None]:
    """Those of `files` that hold the split `key`, and what is left of `key` (a column); raises `InputError`.

    Where names of files say several splits, `key` must pick one, alone or with a column: "train" or "train:image".
    """
    splits: dict[str, list[Path]] = {}
    for path in files:
        split = split_of(path.relative_to(folder).as_posix())
        if split is None:
            return list(files), key
        splits.setdefault(split, []).append(path)
    wanted, _, column = (key or "").partition(":")
    if wanted in splits:
        return splits[wanted], column or None
    if len(splits) == 1:
        return list(files), key
    raise InputError(f"{folder}: pick one split with key=…: {', '.join(map(printable, splits))}")
