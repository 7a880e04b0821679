"""The cached copy of a folder or archive of image files: one memory-mappable file beside the source.

`train.zip` gets `train.zip.diffmem-<settings>.safetensors` next to it (one per combination of the settings that change
the pixels). Neither name nor date make it trusted: it holds the SHA-256 of the source's contents (an archive's bytes; a
folder's file names and bytes) and of its own pixels, labels, names and all else that it says, and is used only where
both are what they should be.
Anything else is decoded again and replaces it. Where it cannot be written, the images are returned anyway, with a
line in `ImageSet.notes` that says so.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from diffmem.atomic_io import atomic_file
from diffmem.data.decode_pool import EncodedImages
from diffmem.data.depth import BadImage
from diffmem.data.image_set import ImageSet, SkippedFile
from diffmem.errors import InputError
from diffmem.inert.boundary import parsing
from diffmem.integrity import sealed, unsealed
from diffmem.logs import logger
from diffmem.progress import Progress

# Part of the settings: raise it when the same source would decode to other pixels.
_VERSION = 2
_STAGE = "checking the cached copy"
_log = logger(__name__)
_copies: WeakKeyDictionary[ImageSet, Path] = WeakKeyDictionary()
_DTYPES = {"U8": np.uint8, "I64": np.int64, "F32": np.float32}


class CachedCopy:
    """The cached copy of the source at `path`.

    Args:
        path: Of the source.
        settings: Everything (JSON types) besides the contents of `path` that its images depend on.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self._text = json.dumps({"version": _VERSION, **settings}, sort_keys=True)
        digest = hashlib.sha256(self._text.encode()).hexdigest()[:12]
        self._target = path.resolve().parent / f"{path.resolve().name}.diffmem-{digest}.safetensors"
        self._key: dict[str, Any] | None = None

    @property
    def exists(self) -> bool:
        """Whether there is one, perhaps of other contents."""
        return self._target.exists()

    def examine(self, encoded: EncodedImages | None, progress: Progress) -> None:
        """Takes down the contents of the source. Call it first: what is decoded later may be something else by then.

        Args:
            encoded: The opened source; None: it is one file.
            progress: A callback.
        """
        if self._key is None:
            self._key = {"settings": self._text, "source": source_fingerprint(self._path, encoded, progress)}

    def read(self) -> ImageSet | None:
        """The images, where there is a copy and it is one of these contents."""
        assert self._key is not None
        cached = _read(self._target, self._key, str(self._path))
        if cached is not None:
            _log.debug("%s: read from its cached copy, %s", self._path, self._target.name)
            _copies[cached] = self._target
        elif self.exists:
            _log.info(
                "%s: the cached copy %s is damaged or belongs to other contents; it is rebuilt",
                self._path,
                self._target.name,
            )
        return cached

    def write(self, images: ImageSet) -> ImageSet:
        """Makes the copy of these images; returns them, with a note where it cannot be written."""
        assert self._key is not None
        try:
            # root could write there anyway, against the owner's will
            if not self._target.parent.stat().st_mode & 0o222:
                raise InputError(f"{self._target.parent} is marked read-only")
            _write(self._target, self._key, images)
            _copies[images] = self._target
        except InputError as error:
            return replace(images, notes=(*images.notes, f"no cached copy was written: {error}"))
        return images


def beside_copy(images: ImageSet, suffix: str) -> Path | None:
    """The file beside the cached copy of images for what is computed from them; None where they have no copy.

    Args:
        images: As `load_images` returned them.
        suffix: What the file's name ends in: ".index.npz".
    """
    copy = _copies.get(images)
    return None if copy is None else copy.with_name(copy.name.removesuffix(".safetensors") + suffix)


def source_fingerprint(path: Path, encoded: EncodedImages | None, progress: Progress) -> str:
    """SHA-256 of the bytes of the file `path`, or of names, bytes and labels of the files in a folder."""
    digest = hashlib.sha256()
    if path.is_file():
        total, done = path.stat().st_size, 0
        with open(path, "rb") as file:
            while block := file.read(2**24):
                digest.update(block)
                done += len(block)
                progress(_STAGE, done, total)
        return digest.hexdigest()
    assert encoded is not None
    for index, name in enumerate(encoded.names):
        try:
            data = hashlib.sha256(encoded.read(index)).digest()
        except BadImage as bad:
            data = str(bad).encode()
        digest.update(json.dumps(name).encode() + data)
        if index % 1000 == 0:
            progress(_STAGE, index, len(encoded.names))
    if encoded.labels is not None:
        digest.update(repr((encoded.labels.shape, encoded.labels.dtype.str)).encode() + encoded.labels.tobytes())
    return digest.hexdigest()


def _write(target: Path, key: dict[str, Any], images: ImageSet) -> None:
    """The file is a safetensors file, written block by block since the images may exceed the memory."""
    about = {
        "key": key,
        "contents": images.fingerprint,
        "names": list(images.names or ()),
        "notes": list(images.notes),
        "skipped": [[item.name, item.reason] for item in images.skipped],
        "sheets": images.sheets,
    }
    tensors = {"images": images.images} | ({} if images.labels is None else {"labels": images.labels})
    header: dict[str, Any] = {}
    end = 0
    for name, array in tensors.items():
        dtype = next(code for code, kind in _DTYPES.items() if kind == array.dtype)
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    # Names, order and sizes are covered as the pixels are.
    about["tensors"] = header
    text = json.dumps({"__metadata__": {"diffmem": json.dumps(sealed(about))}, **header}).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with atomic_file(target, durable=False) as partial, open(partial, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            for start in range(0, len(array), 4096):
                file.write(np.ascontiguousarray(array[start : start + 4096]).data)


def _read(target: Path, key: dict[str, Any], source: str) -> ImageSet | None:
    """The cached copy, its images memory-mapped, or None where it is absent, damaged or of something else."""
    try:
        with parsing(target, "a cached copy"), open(target, "rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), target.stat().st_size
            if length > size:
                return None
            header = json.loads(file.read(length))
            about = unsealed(json.loads(header["__metadata__"]["diffmem"]), target, "it is rebuilt")
            tensors, end = about["tensors"], 8 + length
            if about["key"] != key or {name: header[name] for name in header if name != "__metadata__"} != tensors:
                return None
            if size != end + max(entry["data_offsets"][1] for entry in tensors.values()):
                return None

            def tensor(name: str) -> np.ndarray:
                entry = tensors[name]
                return np.memmap(
                    target, _DTYPES[entry["dtype"]], "r", end + entry["data_offsets"][0], tuple(entry["shape"])
                )

            labels = np.array(tensor("labels")) if "labels" in tensors else None
            skipped = tuple(SkippedFile(name, reason) for name, reason in about["skipped"])
            sheets = about.get("sheets")
            images = ImageSet(
                tensor("images"), about["names"], labels, source, skipped, tuple(about["notes"]),
                None if sheets is None else tuple(sheets),
            )  # fmt: skip
            return images if images.fingerprint == about["contents"] else None
    except InputError:
        return None
