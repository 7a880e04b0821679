"""Labels: `dataset.json` as EDM writes it, and what counts as labels anywhere.

Labels are class numbers (int64 [N]) or vectors (float32 [N, L]). Exact one-hot vectors are class numbers written at
length, and become these wherever labels are read; so do whole numbers written as text or as floats. Labels of any other
kind do not keep the images from being read: they are left out, and a note says why (`or_note`). What needs labels then
says so (`diffmem.data.classes`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffmem.errors import InputError
from diffmem.inert.boundary import short
from diffmem.text import printable

DATASET_JSON = "dataset.json"
# How the note on labels that were not usable begins.
LEFT_OUT = "labels are ignored: "
_WHOLE = re.compile("-?[0-9]{1,18}")


def or_note(read: Callable[[], np.ndarray | None]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The labels that `read` gives; where it raises `InputError`, None and the note that says why."""
    try:
        return read(), ()
    except InputError as problem:
        return None, (f"{LEFT_OUT}{problem}",)


def parse_dataset_json(data: bytes, names: Sequence[str], where: str) -> np.ndarray | None:
    """The labels of the files `names`, in their order: int64 [N], float32 [N, L], or None for `{"labels": null}`.

    `data` holds `{"labels": [[name, label], …]}`, or an object in place of the list, a label being a whole number or a
    list of numbers. Labels of files that are not among `names` are skipped; a file without a label is an error. `where`
    names the source in messages. Raises `InputError`.
    """
    where = f"{where}: {DATASET_JSON}"
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error})") from None
    if not isinstance(content, dict) or "labels" not in content:
        raise InputError(f'{where} must hold {{"labels": [[name, label], …]}} or {{"labels": null}}')
    entries = content["labels"]
    if entries is None:
        return None
    if isinstance(entries, dict):
        entries = list(map(list, entries.items()))
    if not isinstance(entries, list):
        raise InputError(f'{where}: "labels" must be a list of [name, label] pairs or null, not {_kind(entries)}')
    by_name: dict[str, Any] = {}
    for position, entry in enumerate(entries):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise InputError(f'{where}: entry {position} of "labels" is not a [name, label] pair: {_short(entry)}')
        name, label = printable(entry[0].replace("\\", "/")), entry[1]
        if by_name.setdefault(name, label) != label:
            raise InputError(f"{where} gives {name} two labels: {_short(by_name[name])} and {_short(label)}")
    missing = [name for name in names if name not in by_name]
    if missing:
        raise InputError(
            f"{where} has no label for {len(missing):,} of {len(names):,} images; the first is {missing[0]}"
        )
    return as_labels([by_name[name] for name in names], names, where)


def as_labels(values: Sequence[Any], names: Sequence[str], where: str) -> np.ndarray:
    """Plain Python labels as int64 [N] or float32 [N, L]; raises `InputError` naming the first that is neither.

    Whole numbers written as text ("3") or floats (3.0) are whole numbers.
    """
    if all(isinstance(value, str) and _WHOLE.fullmatch(value) for value in values) or all(
        type(value) in (int, float) and value == value // 1 for value in values
    ):
        values = [int(value) for value in values]
    if all(type(value) is int and -(2**63) <= value < 2**63 for value in values):
        return np.array(values, dtype=np.int64)
    length = len(values[0]) if isinstance(values[0], list) else None
    for name, value in zip(names, values, strict=True):
        vector = isinstance(value, list) and all(type(number) in (int, float) for number in value)
        if not (vector if length is not None else type(value) is int and -(2**63) <= value < 2**63):
            raise InputError(
                f"{where}: the label of {name} is {_short(value)}: labels must all be whole numbers, or all be vectors"
            )
        if length is not None and len(value) != length:
            raise InputError(f"{where}: the label of {name} has {len(value)} entries, that of {names[0]} has {length}")
    try:
        with np.errstate(over="ignore"):
            labels = (
                np.array(values, dtype=np.float64)
                .reshape(len(values), -1 if length is None else length)
                .astype(np.float32)
            )
    except OverflowError:
        raise InputError(f"{where}: a label is a whole number too large for a float") from None
    return _class_numbers(_finite(labels, names, where))


def check_labels(labels: np.ndarray, count: int, where: str) -> np.ndarray:
    """An array of labels as int64 [N] or float32 [N, L]; exact one-hots as int64 [N], other vectors as they are."""
    if labels.ndim == 2 and labels.shape[1:] == (1,) and labels.dtype.kind in "iu":
        labels = labels[:, 0]
    if labels.shape[:1] != (count,):
        raise InputError(f"{where}: {count:,} images, but labels of shape {labels.shape}")
    if labels.ndim == 1 and labels.dtype.kind in "OSUT":
        values = np.char.decode(labels, "latin-1") if labels.dtype.kind == "S" else labels
        return as_labels(values.tolist(), [f"image {index}" for index in range(count)], where)
    if labels.ndim == 1 and labels.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            if np.all((labels % 1 == 0) & (np.abs(labels) < 2**53)):
                return labels.astype(np.int64)
    if labels.ndim == 1 and labels.dtype.kind in "iub":
        if labels.dtype == np.uint64 and (labels >> np.uint64(63)).any():
            raise InputError(f"{where}: labels do not fit 64-bit signed integers")
        return labels.astype(np.int64)
    if labels.ndim == 2 and labels.dtype.kind in "iubf":
        if labels.shape[1] == 0:
            raise InputError(f"{where}: labels are vectors without entries")
        with np.errstate(over="ignore"):
            return _class_numbers(_finite(labels.astype(np.float32), None, where))
    raise InputError(
        f"{where}: labels must be whole numbers [N] or vectors [N, L], got {labels.dtype} of shape {labels.shape}"
    )


def _class_numbers(labels: np.ndarray) -> np.ndarray:
    """Exact one-hot vectors as the class numbers they stand for; other vectors as they are."""
    if labels.ndim != 2 or labels.shape[1] < 2 or np.count_nonzero(labels) != len(labels):
        return labels
    return labels.argmax(axis=1) if np.all(labels.max(axis=1) == 1) else labels


def _finite(labels: np.ndarray, names: Sequence[str] | None, where: str) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(labels).all(axis=1))
    if len(bad):
        which = f"image {bad[0]}" if names is None else names[bad[0]]
        raise InputError(f"{where}: {len(bad):,} labels are not finite, the first is that of {which}")
    return labels


def _kind(value: Any) -> str:
    return {dict: "an object", str: "a string", bool: "true or false"}.get(type(value), "a number")


def _short(value: Any) -> str:
    return short(value, 60)
