"""What `torch.save` and `pickle.dump` write of tensors, read by the rules of `inert_pickle`.

Three containers: a bare pickle whose storages are nested `torch.save` streams; torch's legacy stream (five pickles,
then the storages' bytes); torch's zip archive (`data.pkl` beside one entry per storage). Tensors stay views of the
file until they are asked for.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from diffmem.errors import InputError
from diffmem.models.inert_pickle import (
    Budget,
    Damaged,
    Name,
    Record,
    Refused,
    input_error,
    plain_names,
    read_pickle,
)

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


@dataclass(eq=False)
class Storage:
    """`count` elements of `dtype`, whose bytes may come later in the stream than their mention."""

    dtype: torch.dtype
    count: int
    data: memoryview | None = None


@dataclass(eq=False)
class TensorRecord:
    """A tensor not yet built: a strided window on a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def to_tensor(self) -> torch.Tensor:
        """A tensor of its own memory; raises Damaged where the window leaves the storage."""
        storage, last = (
            self.storage,
            self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)),
        )
        empty = 0 in self.shape
        if not empty and (last >= storage.count or math.prod(self.shape) > storage.count):
            raise Damaged(f"a tensor of shape {self.shape} that does not fit its {storage.count} elements")
        if storage.data is None or len(storage.data) != storage.count * storage.dtype.itemsize:
            raise Damaged("a tensor whose data is missing or cut short")
        if empty:
            return torch.empty(self.shape, dtype=storage.dtype)
        flat = torch.frombuffer(bytearray(storage.data), dtype=storage.dtype)
        return flat.as_strided(self.shape, self.strides, self.offset)


def read_torch_file(path: str | Path) -> Any:
    """The value stored in a `.pkl` or `.pt` file, tensors as TensorRecord, objects as Record; nothing in it is
    executed.

    Raises InputError, one line that names the file and what was refused or how it is damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size == 0:
                raise InputError(f"{path}: the file is empty")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return _read_stream(memoryview(data), Budget(size), nested=False)
    except (Refused, Damaged) as error:
        raise input_error(path, error) from None


def _read_stream(data: memoryview, budget: Budget, nested: bool) -> Any:
    if data[:4] == b"PK\x03\x04":
        return _read_zip(data, budget, nested)
    stream = _Stream(data)
    storages: dict[str, Storage] = {}
    names = _names(budget, nested)
    value = read_pickle(stream, names)
    if value != _LEGACY_MAGIC or isinstance(value, Record | TensorRecord):
        return value
    if read_pickle(stream, names) != _LEGACY_PROTOCOL:
        raise Damaged("a torch.save stream of an unknown protocol")
    system = read_pickle(stream, names)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Damaged("a torch.save stream that is not little-endian")

    def persistent(identity: Any) -> Storage | Name:
        # Classes of modules come with their source, which is as inert as their name.
        if (
            isinstance(identity, tuple)
            and len(identity) == 4
            and identity[0] == "module"
            and isinstance(identity[1], Name)
        ):
            return identity[1]
        return _mentioned_storage(identity, storages)

    value = read_pickle(stream, names, persistent)
    keys = read_pickle(stream, names)
    if not isinstance(keys, list) or set(map(str, keys)) != set(storages):
        raise Damaged("a torch.save stream whose list of storages does not match")
    for key in map(str, keys):
        storage = storages[key]
        claimed = struct.unpack("<q", stream.read_exactly(8))[0]
        if claimed != storage.count:
            raise Damaged(f"a storage of {claimed} elements where {storage.count} were announced")
        storage.data = stream.read_exactly(claimed * storage.dtype.itemsize)
    return value


def _read_zip(data: memoryview, budget: Budget, nested: bool) -> Any:
    try:
        with zipfile.ZipFile(_Stream(data)) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise Damaged("a zip archive that torch.save did not write (no data.pkl)")
            root = pickles[0][: -len("data.pkl")]

            def entry(name: str) -> memoryview:
                info = entries.get(root + name)
                # torch.save stores without compression, so nothing can be larger than the file.
                if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data):
                    raise Damaged(f"a torch.save archive without a plain entry {name}")
                budget.charge(0 if nested else info.file_size)
                return memoryview(archive.read(info))

            if root + "byteorder" in entries and bytes(entry("byteorder")) != b"little":
                raise Damaged("a torch.save archive that is not little-endian")
            storages: dict[str, Storage] = {}

            def persistent(identity: Any) -> Storage:
                known = len(storages)
                storage = _mentioned_storage(identity, storages)
                if len(storages) > known:
                    storage.data = entry(f"data/{identity[2]}")
                return storage

            return read_pickle(_Stream(entry("data.pkl")), _names(budget, nested), persistent)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise Damaged(f"a broken zip archive: {error}") from None


def _mentioned_storage(identity: Any, storages: dict[str, Storage]) -> Storage:
    """The storage of a persistent id ("storage", type, key, location, count[, view])."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise Refused(f"a persistent id {str(identity)[:80]}")
    _, kind, key, _, count = identity[:5]
    if len(identity) == 6 and identity[5] is not None:
        raise Refused("a view of a storage")
    if not isinstance(kind, Name) or kind.name not in _STORAGE_TYPES or not isinstance(key, str) or not _is_size(count):
        raise Damaged("a storage of unknown type or size")
    storage = storages.setdefault(key, Storage(_STORAGE_TYPES[kind.name], count))
    if (storage.dtype, storage.count) != (_STORAGE_TYPES[kind.name], count):
        raise Damaged("one storage announced in two ways")
    return storage


def _names(budget: Budget, nested: bool) -> dict[tuple[str, str], Name]:
    """Everything a snapshot may mention: plain values, tensors, and records of EDM's objects."""

    def tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorRecord:
        whole = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
        if not isinstance(storage, Storage) or not whole or not all(map(_is_size, (offset, *shape, *strides))):
            raise Damaged("a tensor without a storage, or of an odd shape")
        return TensorRecord(storage, offset, shape, strides)

    def parameter(data: Any, *_: Any) -> TensorRecord:
        if not isinstance(data, TensorRecord):
            raise Damaged("a parameter that is no tensor")
        return data

    def nested_stream(content: Any) -> Storage:
        if not isinstance(content, bytes):
            raise Damaged("a nested torch.save stream that is not bytes")
        if nested:
            raise Refused("a torch.save stream nested in another")
        budget.charge(len(content))
        storage = _read_stream(memoryview(content), budget, nested=True)
        if not isinstance(storage, Storage):
            raise Refused("a nested torch.save stream of something else than a storage")
        return storage

    def persistent_object(meta: Any) -> Record:
        if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
            raise Refused("a persistent object that is not an instance of a class")
        return Record(meta["class_name"], meta.get("state"))

    def size(values: Any = ()) -> tuple[int, ...]:
        if not isinstance(values, list | tuple) or not all(map(_is_size, values)):
            raise Damaged("a torch.Size of something else than sizes")
        return tuple(values)

    names = plain_names(budget)
    easy_dict = names["collections", "OrderedDict"].build
    for module, attribute, build in (
        ("torch._utils", "_rebuild_tensor_v2", tensor),
        ("torch._utils", "_rebuild_parameter", parameter),
        ("torch.storage", "_load_from_bytes", nested_stream),
        ("torch", "Size", size),
        ("torch_utils.persistence", "_reconstruct_persistent_obj", persistent_object),
        ("dnnlib.util", "EasyDict", easy_dict),
        ("torch.nn.modules.container", "ModuleDict", lambda: Record("ModuleDict")),
    ):
        names[module, attribute] = Name(f"{module}.{attribute}", build)
    for kind in _STORAGE_TYPES:
        for module in ("torch", "torch.storage"):
            names[module, kind] = Name(kind)
    return names


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


class _Stream(io.RawIOBase, BinaryIO):
    """A memoryview as a seekable file whose reads never claim more memory than is left."""

    def __init__(self, data: memoryview):
        super().__init__()
        self._data, self._position = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        if start + offset < 0:
            raise OSError("negative seek position")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = len(self._data) if size is None or size < 0 else min(len(self._data), self._position + size)
        content = bytes(self._data[self._position : end])
        self._position = max(self._position, end)
        return content

    def readline(self, size: int = -1) -> bytes:
        # Only for pickle's text opcodes, whose lines are short: look for the end in growing steps.
        start, step = self._position, 256
        while True:
            content = bytes(self._data[start : start + step])
            end = content.find(b"\n")
            if end >= 0 or start + step >= len(self._data):
                self._position = start + (end + 1 if end >= 0 else len(content))
                return content[: end + 1] if end >= 0 else content
            step *= 4

    def read_exactly(self, size: int) -> memoryview:
        """The next `size` bytes without a copy; raises Damaged where the stream ends before."""
        content = self._data[self._position : self._position + size]
        if size < 0 or len(content) != size:
            raise Damaged(f"{size} bytes are announced and {len(content)} are left")
        self._position += size
        return content
