"""What `torch.save` and `pickle.dump` write of tensors, read by the rules of `pickles`.

Three containers: a bare pickle whose storages are nested `torch.save` streams; torch's legacy stream (five pickles,
then the storages' bytes); torch's zip archive (`data.pkl` beside one entry per storage). Tensors stay views of the
file until they are asked for.
"""

from __future__ import annotations

import math
import mmap
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffmem.errors import InputError
from diffmem.inert.archives import zip_content, zip_entries
from diffmem.inert.boundary import parsing, short
from diffmem.inert.pickles import (
    Budget,
    Damaged,
    Name,
    Record,
    Refused,
    Source,
    input_error,
    plain_names,
    read_pickle,
)

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MOST_AXES = 64  # as torch allows
_NESTED = 100  # operations that opening a nested stream counts as

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
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
# Dtypes without a storage type of their own: their tensors view untyped storages.
_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)  # by torch's version
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
    viewed_as: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype if self.viewed_as is None else self.viewed_as

    @property
    def size(self) -> int:
        """Bytes that the tensor takes once it is built."""
        return math.prod(self.shape) * self.dtype.itemsize

    def to_tensor(self) -> torch.Tensor:
        """The tensor, a read-only view of the file; raises Damaged where the window leaves the storage."""
        storage, size = self.storage, self.dtype.itemsize
        count = storage.count * storage.dtype.itemsize // size
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        empty = 0 in self.shape
        if not empty and (last >= count or math.prod(self.shape) > count):
            raise Damaged(f"a tensor of shape {short(self.shape)} that does not match its {count} elements")
        if storage.data is None or len(storage.data) != storage.count * storage.dtype.itemsize:
            raise Damaged("a tensor whose data is missing or truncated")
        if len(self.shape) > _MOST_AXES:
            raise Damaged(f"a tensor of {len(self.shape)} axes")
        if empty:
            if math.prod(max(n, 1) for n in self.shape) >= 2**62:
                raise Damaged(f"a tensor of shape {short(self.shape)}")
            return torch.empty(self.shape, dtype=self.dtype)
        with warnings.catch_warnings():  # nobody writes to what comes out of a file
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(storage.data, dtype=torch.uint8)
        window = flat[self.offset * size : (last + 1) * size]
        if window.data_ptr() % size:  # entries of an archive start anywhere
            window = window.clone()
        return window.view(self.dtype).as_strided(self.shape, self.strides)


def read_torch_file(path: str | Path, kind: str = "snapshot", advice: str = "download or export it again") -> Any:
    """The value stored in a `.pkl` or `.pt` file, tensors as TensorRecord, objects as Record; nothing in it is
    executed.

    `kind` is what the file should be and `advice` the way out, for messages. Raises InputError, one line that names the
    file and what was refused or how it is damaged.
    """
    path = Path(path)
    with parsing(path, f"a complete {kind}", advice):
        with path.open("rb") as file:
            size = path.stat().st_size
            if size == 0:
                raise InputError(f"{path}: the file is empty")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            return _read_stream(memoryview(data), Budget(size), nested=False)
        except (Refused, Damaged) as error:
            raise input_error(path, error, kind, advice) from None


def _read_stream(data: memoryview, budget: Budget, nested: bool) -> Any:
    if bytes(data[:4]) == b"PK\x03\x04":
        return _read_zip(data, budget, nested)
    source = Source(data)
    storages: dict[str, Storage] = {}
    names = _names(budget, nested)
    value = read_pickle(source, names, budget)
    if type(value) is not int or value != _LEGACY_MAGIC:
        return value
    protocol = read_pickle(source, names, budget)
    if type(protocol) is not int or protocol != _LEGACY_PROTOCOL:
        raise Damaged("a torch.save stream of an unknown protocol")
    system = read_pickle(source, names, budget)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Damaged("a torch.save stream that is not little-endian")

    def persistent(identity: Any) -> Storage | Name:
        # Classes of modules come with their source, which is as inert as their name.
        if (
            isinstance(identity, tuple)
            and len(identity) == 4
            and type(identity[0]) is str
            and identity[0] == "module"
            and isinstance(identity[1], Name)
        ):
            return identity[1]
        return _mentioned_storage(identity, storages)

    value = read_pickle(source, names, budget, persistent)
    keys = read_pickle(source, names, budget)
    if not isinstance(keys, list) or not all(type(key) in (str, int) for key in keys):
        raise Damaged("a torch.save stream without its list of storages")
    if len(keys) != len(storages) or {str(key) for key in keys} != set(storages):
        raise Damaged("a torch.save stream whose list of storages does not match")
    for key in map(str, keys):
        storage = storages[key]
        claimed = struct.unpack("<q", source.take(8))[0]
        if claimed != storage.count:
            raise Damaged(f"a storage of {claimed} elements instead of the {storage.count} announced")
        storage.data = source.take(claimed * storage.dtype.itemsize)
    return value


def _read_zip(data: memoryview, budget: Budget, nested: bool) -> Any:
    entries = zip_entries(data)
    budget.charge_operations(len(entries))
    pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise Damaged("a zip archive that torch.save did not write (no data.pkl)")
    root = pickles[0][: -len("data.pkl")]

    def entry(name: str) -> memoryview:
        if root + name not in entries:
            raise Damaged(f"a torch.save archive without a plain entry {short(name)}")
        budget.charge(entries[root + name].size)  # entries may lie on top of each other
        return zip_content(data, entries[root + name])

    if root + "byteorder" in entries and bytes(entry("byteorder")[:16]) != b"little":
        raise Damaged("a torch.save archive that is not little-endian")
    storages: dict[str, Storage] = {}

    def persistent(identity: Any) -> Storage:
        known = len(storages)
        storage = _mentioned_storage(identity, storages)
        if len(storages) > known:
            storage.data = entry(f"data/{identity[2]}")
        return storage

    return read_pickle(Source(entry("data.pkl")), _names(budget, nested), budget, persistent)


def _mentioned_storage(identity: Any, storages: dict[str, Storage]) -> Storage:
    """The storage of a persistent id ("storage", type, key, location, count[, view])."""
    known = isinstance(identity, tuple) and len(identity) in (5, 6) and type(identity[0]) is str
    if not known or identity[0] != "storage":
        raise Refused(f"a persistent id {short(identity)}")
    _, kind, key, _, count = identity[:5]
    if len(identity) == 6 and identity[5] is not None:
        raise Refused("a view of a storage")
    if not isinstance(kind, Name) or kind.name not in _STORAGE_TYPES or not isinstance(key, str) or not _is_size(count):
        raise Damaged("a storage of unknown type or size")
    storage = storages.setdefault(key, Storage(_STORAGE_TYPES[kind.name], count))
    if (storage.dtype, storage.count) != (_STORAGE_TYPES[kind.name], count):
        raise Damaged("a storage announced in two different ways")
    return storage


def _names(budget: Budget, nested: bool) -> dict[tuple[str, str], Name]:
    """Everything a snapshot may mention: plain values, tensors, and records of EDM's objects."""

    def tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorRecord:
        matching = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
        if not isinstance(storage, Storage) or not matching or not all(map(_is_size, (offset, *shape, *strides))):
            raise Damaged("a tensor without a storage, or of an invalid shape")
        return TensorRecord(storage, offset, shape, strides)

    def viewed(
        storage: Any, offset: Any, shape: Any, strides: Any, gradient: Any, hooks: Any, kind: Any, *_: Any
    ) -> Any:
        if not isinstance(kind, Name) or kind.name not in _DTYPES:
            raise Refused(f"a tensor of dtype {kind.name if isinstance(kind, Name) else short(kind)}")
        record = tensor(storage, offset, shape, strides)
        record.viewed_as = _DTYPES[kind.name]
        return record

    def parameter(data: Any, *_: Any) -> TensorRecord:
        if not isinstance(data, TensorRecord):
            raise Damaged("a parameter that is not a tensor")
        return data

    def nested_stream(content: Any) -> Storage:
        if not isinstance(content, bytes | memoryview):
            raise Damaged("a nested torch.save stream that is not bytes")
        if nested:
            raise Refused("a torch.save stream nested in another")
        budget.charge(len(content))
        budget.charge_operations(_NESTED)
        storage = _read_stream(memoryview(content), budget, nested=True)
        if not isinstance(storage, Storage):
            raise Refused("a nested torch.save stream that is not a storage")
        return storage

    def persistent_object(meta: Any) -> Record:
        kind = meta.get("type") if isinstance(meta, dict) else None
        if type(kind) is not str or kind != "class" or type(meta.get("class_name")) is not str:
            raise Refused("a persistent object that is not an instance of a class")
        return Record(meta["class_name"], meta.get("state"))

    def size(values: Any = ()) -> tuple[int, ...]:
        if not isinstance(values, list | tuple) or not all(map(_is_size, values)):
            raise Damaged("a torch.Size that does not hold sizes")
        return tuple(values)

    names = plain_names(budget)
    easy_dict = names["collections", "OrderedDict"].build
    for module, attribute, build in (
        ("torch._utils", "_rebuild_tensor_v2", tensor),
        ("torch._utils", "_rebuild_tensor_v3", viewed),
        ("torch._utils", "_rebuild_parameter", parameter),
        ("torch.storage", "_load_from_bytes", nested_stream),
        ("torch", "Size", size),
        ("torch", "device", lambda *_: Record("device")),
        ("torch_utils.persistence", "_reconstruct_persistent_obj", persistent_object),
        ("dnnlib.util", "EasyDict", easy_dict),
        ("torch.nn.modules.container", "ModuleDict", lambda: Record("ModuleDict")),
    ):
        names[module, attribute] = Name(f"{module}.{attribute}", build)
    for kind in _DTYPES:
        names["torch", kind.removeprefix("torch.")] = Name(kind)
    for kind in _STORAGE_TYPES:
        for module in ("torch", "torch.storage"):
            names[module, kind] = Name(kind)
    return names


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62
