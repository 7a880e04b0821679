"""Checksums over what diffmem writes and later reads back: one bit that turned over must not become another result.

A JSON document is sealed with the SHA-256 of the rest of it; a file of arrays carries one over their names, shapes,
dtypes and values; other files are named, with theirs, in a sealed document beside them.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from diffmem.errors import InputError
from diffmem.inert.boundary import parsing
from diffmem.inert.documents import read_json

SEAL = "sha256"
_BLOCK = 2**24  # bytes hashed at a time


class NoChecksumError(InputError):
    """A file without a checksum: of an older version of diffmem, or made by hand."""


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values (JSON types, text as keys) with the SHA-256 of all of them as `sha256`."""
    plain = json.loads(json.dumps({name: value for name, value in values.items() if name != SEAL}))
    return {**plain, SEAL: _document_sha256(plain)}


def unsealed(values: Any, where: object, advice: str) -> dict[str, Any]:
    """What `sealed` was given.

    Args:
        values: The document as it was read.
        where: The file, for messages.
        advice: The way out, for messages: "delete it, and …".

    Raises:
        NoChecksumError: It has no checksum.
        InputError: It is not a document, or not the one that was sealed.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where}: damaged (it is not a JSON object): {advice}")
    if SEAL not in values:
        raise NoChecksumError(
            f"{where}: has no checksum (written by an older version of diffmem, or by hand): {advice}"
        )
    rest = {name: value for name, value in values.items() if name != SEAL}
    with parsing(where, "a JSON document", advice):
        found = _document_sha256(rest)
    if values[SEAL] != found:
        raise InputError(f"{where}: damaged or edited (its checksum differs): {advice}")
    return rest


def read_sealed(path: Path, advice: str) -> dict[str, Any]:
    """The sealed document in `path`; raises as `unsealed`, and InputError where it cannot be read."""
    return unsealed(read_json(path, advice), path, advice)


def read_checked(path: Path, advice: str) -> Any:
    """The JSON document in `path`, what `sealed` was given where it is sealed; one without a checksum as it is.

    For descriptions that people may write or correct, and that older versions wrote. Raises InputError where it cannot
    be read, and where it is sealed and was changed.
    """
    values = read_json(path, advice)
    return unsealed(values, path, advice) if isinstance(values, dict) and SEAL in values else values


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_file(path: Path, expected: Any, advice: str) -> None:
    """Raises InputError where the bytes of `path` are not those with the SHA-256 `expected`."""
    with parsing(path, "a readable file", advice):
        found = file_sha256(path)
    if expected != found:
        raise InputError(f"{path}: damaged (its checksum differs): {advice}")


def arrays_sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the names, shapes, dtypes and values of arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        values = np.asarray(arrays[name])
        digest.update(json.dumps([name, list(values.shape), values.dtype.str]).encode())
        if values.ndim == 0:
            digest.update(values.tobytes())
            continue
        rows = max(1, _BLOCK // max(1, values[:1].nbytes))
        for start in range(0, len(values), rows):
            digest.update(np.ascontiguousarray(values[start : start + rows]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def save_arrays(stream: BinaryIO, arrays: Mapping[str, np.ndarray], *, compress: bool = False) -> None:
    """Writes arrays as an `.npz` with their checksum; `load_arrays` reads it."""
    (np.savez_compressed if compress else np.savez)(
        stream, **cast(Any, {SEAL: np.array(arrays_sha256(arrays)), **arrays})
    )


def load_arrays(path: Path, advice: str) -> dict[str, np.ndarray]:
    """The arrays that `save_arrays` wrote.

    Raises:
        NoChecksumError: They have no checksum.
        InputError: The file cannot be read, or holds other arrays than were written.
    """
    with parsing(path, "a complete .npz file", advice):
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        expected = arrays.pop(SEAL, None)
        if expected is None:
            raise NoChecksumError(f"{path}: has no checksum (written by an older version of diffmem): {advice}")
        if str(expected) != arrays_sha256(arrays):
            raise InputError(f"{path}: damaged (its checksum differs): {advice}")
        return arrays


def save_tensors(path: Path, tensors: Mapping[str, Any]) -> str:
    """Writes torch tensors as a safetensors file and returns the file's SHA-256; raises OSError for a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        # The library's own exception hides the system's; its words are all that is left of it.
        text = str(error)
        code = next((code for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) if f"code: {code}," in text), errno.EIO)
        raise OSError(code, " ".join(text.split())) from error
    return file_sha256(path)


def _document_sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
