"""Containers of image files, here and in object stores, opened once per process."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from diffmem.data.containers import HF, is_image_name, natural_key, with_slashes
from diffmem.data.decode import MAX_FILE_BYTES
from diffmem.data.decode_pool import EncodedImages
from diffmem.data.depth import BadImage
from diffmem.data.load import encoded_images
from diffmem.data.parquet import ParquetImages
from diffmem.errors import InputError
from diffmem.indexes import remote
from diffmem.inert.boundary import parsing
from diffmem.text import printable

AT_ONCE, AHEAD = 16, 64  # requests for single objects at a time, and objects on their way


class RemotePath:
    """A file elsewhere, with as much of `pathlib.Path` as readers of files use."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._plain = PurePosixPath(remote.without_secrets(url))
        self.name, self.stem = self._plain.name, self._plain.stem

    def __str__(self) -> str:
        return printable(remote.without_secrets(self.url))

    def open(self) -> remote.RemoteFile:
        """The file, to be read by ranges."""
        return remote.RemoteFile(self.url)


class RemoteZip:
    """The image files in a zip archive elsewhere: its directory, and then each entry where it lies."""

    fork_safe = False
    mode: str | None = None
    labels: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, url: str) -> None:
        self.description = printable(remote.without_secrets(url))
        with parsing(self.description, "a complete zip archive", "upload it again"):
            self._file = remote.RemoteFile(url)
            self._zip = zipfile.ZipFile(self._file)
            entries = {with_slashes(entry.filename): entry for entry in self._zip.infolist()}
        found = sorted(filter(is_image_name, entries), key=natural_key)
        if not found:
            raise InputError(f"{self.description}: no images in this archive")
        self._entries = [entries[name] for name in found]
        self.names: Sequence[str] = [printable(name) for name in found]

    def read_little(self, block: int) -> None:
        """Asks for so many bytes at a time from now on: of files here and there, not of all."""
        self._file.block = block

    def read(self, index: int) -> bytes:
        """The bytes of file `index`; raises `BadImage`."""
        entry = self._entries[index]
        if entry.file_size > MAX_FILE_BYTES:
            raise BadImage(f"declares {entry.file_size / 1e6:,.0f} MB, more than any image that is accepted")
        try:
            return self._zip.read(entry)
        except InputError:
            raise
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            raise BadImage(f"cannot be unpacked: {error}") from None


class RemoteFolder:
    """The image files below a URL, each an object."""

    fork_safe = False
    mode: str | None = None
    labels: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, url: str) -> None:
        self.description = printable(remote.without_secrets(url))
        self._url = url
        self._files, path = remote.file_system(url)
        root = path.rstrip("/")
        found = remote.patiently(lambda: self._files.find(root, detail=True), url)
        inside = {name[len(root) + 1 :]: name for name in found}
        names = sorted(filter(is_image_name, inside), key=natural_key)
        if not names:
            raise InputError(f"{self.description}: no images below this URL")
        self._paths = [inside[name] for name in names]
        self.infos = [found[path] for path in self._paths]
        self.names: Sequence[str] = [printable(name) for name in names]

    def read(self, index: int) -> bytes:
        """The bytes of file `index`; raises `BadImage`."""
        size = int(self.infos[index].get("size") or 0)
        if size > MAX_FILE_BYTES:
            raise BadImage(f"is larger ({size / 1e6:,.0f} MB) than any image that is accepted")
        where = f"{self._url.rstrip('/')}/{self.names[index]}"

        def ask() -> bytes:
            data = bytes(remote.call(self._files, "cat_file", self._paths[index]))
            if size and len(data) != size:
                raise OSError(f"{len(data):,} bytes came instead of {size:,}")
            return data

        return remote.patiently(ask, where)

    def identity(self, start: int, stop: int) -> list[str]:
        """What tells the contents of some files from others, without reading them."""
        return [
            remote.identity_of(f"{self._url.rstrip('/')}/{self.names[index]}", self.infos[index])
            for index in range(start, stop)
        ]


def container(file: str, key: str | None, version: str = "") -> EncodedImages | None:
    """The container that a path or URL is, or None where it is an array file; kept, for the next part of it.

    version: what tells the contents of a file elsewhere from others.
    """
    if not remote.is_remote(file):
        path = Path(file.removeprefix(HF).partition("?")[0]).expanduser()
        status = path.stat() if path.exists() else None
        version = "" if status is None else f"{status.st_size} {status.st_mtime_ns}"
    return _container(file, key, version)


@lru_cache(maxsize=2)
def _container(file: str, key: str | None, version: str) -> EncodedImages | None:
    if not remote.is_remote(file):
        return encoded_images(file, key)
    suffix = PurePosixPath(remote.without_secrets(file)).suffix.lower()
    if suffix == ".zip":
        return RemoteZip(file)
    if suffix == ".parquet":
        paths: list[Any] = [RemotePath(file)]
        return ParquetImages(paths, str(paths[0]), key)
    return RemoteFolder(file)


def files_of(encoded: EncodedImages, start: int, stop: int) -> Iterator[tuple[str, bytes | str]]:
    """Names of files, and their bytes, or why these cannot be had. Objects of a store are asked for side by side."""

    def one(index: int) -> tuple[str, bytes | str]:
        try:
            return encoded.names[index], encoded.read(index)
        except BadImage as bad:
            return encoded.names[index], str(bad)

    if not isinstance(encoded, RemoteFolder):
        yield from map(one, range(start, stop))
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        coming = [pool.submit(one, index) for index in range(start, min(stop, start + AHEAD))]
        try:
            for index in range(start + AHEAD, stop + AHEAD):
                if not coming:
                    break
                yield coming.pop(0).result()
                if index < stop:
                    coming.append(pool.submit(one, index))
        finally:
            for future in coming:
                future.cancel()
