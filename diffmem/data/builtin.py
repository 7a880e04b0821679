"""Real images that come with scikit-learn: `builtin:digits` and `builtin:patches`."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from diffmem.data.arrays import Arrays
from diffmem.data.storage import allocate
from diffmem.errors import InputError, MissingExtraError

PREFIX = "builtin:"
PATCH_SIZE = 32
PATCH_COUNT = 10_000


def read_builtin(source: str, limit: int | None) -> Arrays:
    """The built-in set that `source` names, e.g. `builtin:digits` or `builtin:patches?n=20000&seed=3`."""
    name, _, query = source.removeprefix(PREFIX).partition("?")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True)) if query else {}
        numbers = {key: int(value) for key, value in options.items()}
    except ValueError:
        raise InputError(f"{source}: options are whole numbers, as in builtin:patches?n=20000&seed=3") from None
    known = {"digits": (), "patches": ("n", "seed")}
    if name not in known:
        raise InputError(f"{source}: no such built-in set; the built-in sets are builtin:digits and builtin:patches")
    if unknown := [key for key in numbers if key not in known[name]]:
        allowed = " and ".join(known[name]) or "none"
        raise InputError(f"{source}: no option {unknown[0]} (builtin:{name} has {allowed})")
    if name == "digits":
        return digits()
    count = numbers.get("n", PATCH_COUNT)
    return patches(count if limit is None else min(count, limit), numbers.get("seed", 0), source)


def digits() -> Arrays:
    """scikit-learn's 1,797 handwritten digits, [1797, 1, 8, 8]; level v of 0–16 becomes round(255·v/16), 8: 128."""
    datasets = _sklearn_datasets("builtin:digits")
    bunch = datasets.load_digits()
    images = np.rint(bunch.images * 255 / 16).astype(np.uint8)[:, None]
    return Arrays(images, bunch.target.astype(np.int64), [f"digit-{index:04d}" for index in range(len(images))])


def patches(count: int, seed: int, source: str = "builtin:patches") -> Arrays:
    """`count` 32×32 color patches of scikit-learn's two photographs; the label says which (0 china.jpg, 1 flower.jpg).

    The two photographs (427×640) have 2·396·609 = 482,328 places for a patch, no two of them alike (neighbors overlap,
    of course). Each is used once, in an order that `seed` decides, before any is used again; the patches of a smaller
    `count` are the first ones of a larger. The order is that of SplitMix64 hashes of seed and place: the same on every
    machine and with every version of numpy.
    """
    if count < 1 or not 0 <= seed < 2**32:
        raise InputError(f"{source}: n must be at least 1 and seed within 0 … 2³² − 1")
    bunch = _sklearn_datasets("builtin:patches").load_sample_images()
    file_names = [name.replace("\\", "/").rpartition("/")[2] for name in bunch.filenames]
    photographs = np.stack(bunch.images)  # [2, 427, 640, 3]
    windows = np.lib.stride_tricks.sliding_window_view(photographs, (PATCH_SIZE, PATCH_SIZE), axis=(1, 2))
    places = windows.shape[:3]
    total = int(np.prod(places))
    turns = [_order(total, seed, turn)[: count - turn * total] for turn in range(-(-count // total))]
    photograph, top, left = np.unravel_index(np.concatenate(turns), places)
    images = allocate((count, 3, PATCH_SIZE, PATCH_SIZE))
    for start in range(0, count, 4096):
        block = slice(start, start + 4096)
        images[block] = windows[photograph[block], top[block], left[block]]
    names = [
        f"{file_names[p]}@{y},{x}" for p, y, x in zip(photograph.tolist(), top.tolist(), left.tolist(), strict=True)
    ]
    return Arrays(images, photograph.astype(np.int64), names)


def _order(total: int, seed: int, turn: int) -> np.ndarray:
    """The numbers below `total` in an order that (seed, turn) decides."""
    with np.errstate(over="ignore"):
        stream = _splitmix64(np.array([(seed << 32) + turn], dtype=np.uint64))
        return np.argsort(_splitmix64(stream + np.arange(total, dtype=np.uint64)), kind="stable")


def _splitmix64(state: np.ndarray) -> np.ndarray:
    """Output function of SplitMix64 (Steele, Lea, Flood 2014), a bijection of 64-bit words."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _sklearn_datasets(what: str) -> Any:
    try:
        from sklearn import datasets
    except ImportError:
        raise MissingExtraError("scikit-learn", "demo", what) from None
    return datasets
