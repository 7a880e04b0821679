"""CIFAR-10's own archive, `cifar-10-python.tar.gz`: pickles read without executing or extracting anything."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.data.arrays import Arrays
from diffmem.data.labels import as_labels
from diffmem.errors import InputError
from diffmem.inert.archives import TarReader
from diffmem.inert.boundary import parsing, short
from diffmem.inert.pickles import Budget, Damaged, Name, Record, Refused, Source, plain_names, read_pickle
from diffmem.progress import Progress

_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_PIXELS = 3 * 32 * 32
_MAX_MEMBER_BYTES = 2**27


def is_cifar(path: Path) -> bool:
    """Whether the tar archive `path` begins as CIFAR-10's does."""
    try:
        with parsing(path, "a complete tar archive"), open(path, "rb") as file:
            members = itertools.islice(TarReader(file, path), 8)
            return any(member.name.rpartition("/")[2] in (*_BATCHES["train"], *_BATCHES["test"]) for member in members)
    except InputError:
        return False


def read_cifar(path: Path, split: str, progress: Progress) -> Arrays:
    """CIFAR-10's images ("train": 50,000, "test": 10,000, "all": both in this order), labels and file names."""
    if split not in (*_BATCHES, "all"):
        raise InputError(f"{path}: key={split!r} is not a part of CIFAR-10: pass key='train', key='test' or key='all'")
    wanted = _BATCHES["train"] + _BATCHES["test"] if split == "all" else _BATCHES[split]
    found: dict[str, Arrays] = {}
    with parsing(path, "a complete tar archive", "download it again"), open(path, "rb") as file:
        archive = TarReader(file, path)
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name in wanted and member.is_file:
                if member.size > _MAX_MEMBER_BYTES:
                    raise InputError(f"{path}: {name} declares {member.size:,} bytes: not a batch of CIFAR-10")
                found[name] = _read_batch(archive.read(), f"{path}: {name}")
                progress("reading images", len(found), len(wanted))
            if len(found) == len(wanted):
                break
    if missing := [name for name in wanted if name not in found]:
        raise InputError(f"{path}: not CIFAR-10's python archive, it lacks {', '.join(missing)}")
    batches = [found[name] for name in wanted]
    return Arrays(
        np.concatenate([batch.images for batch in batches]),
        np.concatenate([batch.labels for batch in batches]),
        [name for batch in batches for name in batch.names or ()],
    )


def _read_batch(data: bytes, where: str) -> Arrays:
    with parsing(where, "a batch of CIFAR-10", "download the archive again"):
        budget = Budget(len(data))
        known = plain_names(budget) | _ARRAYS
        try:
            content = read_pickle(Source(memoryview(data)), known, budget)
        except Refused as error:
            raise InputError(
                f"{where} is not a batch of CIFAR-10: it contains {error}, which is never loaded"
            ) from None
        if not isinstance(content, dict):
            raise Damaged(f"it holds {short(content)}, not a dictionary")
        content = {_text(key): value for key, value in content.items()}
        images = _pixels(content["data"])
        names = [_text(name) for name in content["filenames"]]
        if len(names) != len(images):
            raise Damaged(f"{len(names)} names for {len(images)} images")
        labels = as_labels(content["labels"], names, where)
        if labels.shape != (len(images),):
            raise Damaged(f"labels of shape {labels.shape} for {len(images)} images")
        return Arrays(images, labels, names)


# How a pickled array begins: an empty one, whose shape, dtype and bytes follow as its state.
_ARRAYS = {
    (module, "_reconstruct"): Name(f"{module}._reconstruct", lambda *_: Record("ndarray"))
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
} | {("numpy", "ndarray"): Name("numpy.ndarray")}


def _pixels(value: Any) -> np.ndarray:
    """The images of a pickled array of uint8, [N, 3, 32, 32]."""
    if not isinstance(value, Record) or not isinstance(value.state, tuple) or len(value.state) != 5:
        raise Damaged("its data is not an array")
    _, shape, dtype, fortran, data = value.state
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(dtype, np.dtype) or dtype != np.uint8 or not isinstance(data, bytes | memoryview):
        raise Damaged("an array that is not plain uint8")
    if not isinstance(shape, tuple) or len(shape) != 2 or type(shape[0]) is not int or shape[1] != _PIXELS:
        raise Damaged(f"images of shape {short(shape)}")
    if shape[0] * _PIXELS != len(data):
        raise Damaged(f"{len(data)} bytes for images of shape {short(shape)}")
    flat = np.frombuffer(data, np.uint8)
    return flat.reshape(shape, order="F" if fortran is True else "C").reshape(-1, 3, 32, 32)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin1")
    if isinstance(value, str):
        return value
    raise Damaged(f"{short(value)} in place of a name")
