"""CIFAR-10's own archive, `cifar-10-python.tar.gz`: pickles read without executing or extracting anything."""

from __future__ import annotations

import pickle
import tarfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.data.arrays import Arrays
from diffmem.data.labels import as_labels
from diffmem.errors import InputError
from diffmem.progress import Progress

_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_PIXELS = 3 * 32 * 32
_MAX_MEMBER_BYTES = 2**27


class _PickledArray:
    """Takes the state of a pickled uint8 array; turned into numpy only after it was looked at."""

    def __init__(self) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, fortran, data = self.state
        if not (isinstance(dtype, _PickledDtype) and dtype.name in ("u1", b"u1") and isinstance(data, (bytes, str))):
            raise pickle.UnpicklingError("an array that is not plain uint8")
        data = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


class _PickledDtype:
    def __init__(self, name: Any, *_: Any):
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which uint8 does not have."""


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


# Everything that such a pickle may name, and what stands in for it. None of these is the real thing, so that a pickle
# can build containers, strings, numbers and these two holders of plain state, and can call nothing else.
_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _PickledDtype,
    ("_codecs", "encode"): _latin1,  # how Python 3 writes bytes in old protocols
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is never loaded") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")


def read_cifar(path: Path, split: str, progress: Progress) -> Arrays:
    """CIFAR-10's images ("train": 50,000, "test": 10,000, "all": both in this order), labels and file names."""
    if split not in (*_BATCHES, "all"):
        raise InputError(f"{path}: key={split!r} is no part of CIFAR-10: take 'train', 'test' or 'all'")
    wanted = _BATCHES["train"] + _BATCHES["test"] if split == "all" else _BATCHES[split]
    found: dict[str, Arrays] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name in wanted and member.isfile():
                    if member.size > _MAX_MEMBER_BYTES:
                        raise InputError(f"{path}: {name} declares {member.size:,} bytes: not a batch of CIFAR-10")
                    found[name] = _read_batch(archive.extractfile(member).read(), f"{path}: {name}")
                    progress("reading images", len(found), len(wanted))
                if len(found) == len(wanted):
                    break
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise InputError(f"{path}: not a whole tar archive (truncated or corrupt: {error}): fetch it anew") from None
    if missing := [name for name in wanted if name not in found]:
        raise InputError(f"{path}: not CIFAR-10's python archive, it lacks {', '.join(missing)}")
    batches = [found[name] for name in wanted]
    return Arrays(
        np.concatenate([batch.images for batch in batches]),
        np.concatenate([batch.labels for batch in batches]),
        [name for batch in batches for name in batch.names],
    )


def _read_batch(data: bytes, where: str) -> Arrays:
    try:
        content = _PlainUnpickler(BytesIO(data), encoding="latin1").load()
        content = {_text(key): value for key, value in content.items()}
        images = content["data"].array()
        names = [_text(name) for name in content["filenames"]]
        if images.ndim != 2 or images.shape[1] != _PIXELS or len(names) != len(images):
            raise ValueError(f"{len(names)} names for images of shape {images.shape}")
        labels = as_labels(content["labels"], names, where)
        if labels.shape != (len(images),):
            raise ValueError(f"labels of shape {labels.shape} for {len(images)} images")
    except InputError:
        raise
    except Exception as error:  # a pickle from elsewhere may be wrong in any way
        raise InputError(f"{where} is not a batch of CIFAR-10: {' '.join(str(error).split())}") from None
    return Arrays(images.reshape(-1, 3, 32, 32), labels, names)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin1")
    if isinstance(value, str):
        return value
    raise ValueError(f"a {type(value).__name__} where a name should be")
