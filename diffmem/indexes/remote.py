"""Files in object stores and on web servers, through fsspec: listed, told apart, and read by ranges.

A file is never copied as a whole. Every range is asked for by a request of its own, whose length is checked, so that a
connection may break anywhere: what fails in a way that may pass is tried again, with growing pauses.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from diffmem.errors import InputError, MissingExtraError
from diffmem.inert.boundary import one_line
from diffmem.logs import logger
from diffmem.text import printable

_log = logger(__name__)
T = TypeVar("T")
ATTEMPTS = 5
PAUSE = 0.5  # seconds before the second attempt; twice as long before each further one
TIMEOUT = 60.0  # seconds that one request may take
BLOCK = 2**22  # bytes of a request; a file holds two of them: the one that is read, and the one that is coming
_URL = re.compile(r"([a-z][a-z0-9+.-]*)(?:://|::)", re.IGNORECASE)
_LASTING = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ImportError,
    TypeError, InputError,
)  # fmt: skip
# What stores say of an object that changes with its contents.
_VERSIONS = ("ETag", "etag", "md5Hash", "checksum", "content_md5", "blob_id", "sha256", "ino")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created", "last_commit")


def is_remote(name: str) -> bool:
    """Whether `name` is a URL that fsspec opens, rather than a path on this disk."""
    return _URL.match(name) is not None and not name.lower().startswith("file://")


def without_secrets(url: str) -> str:
    """A URL without the password and the signature that it may hold: fit for reports and for files."""
    url = re.sub(r"(://)[^/@]*@", r"\1", url)
    return url.partition("?")[0] if url.lower().startswith(("http://", "https://")) else url


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises:
        MissingExtraError: fsspec, or the driver for this kind of URL, is not installed.
        InputError: No driver of fsspec knows such URLs.
    """
    protocol = url.partition(":")[0]
    purpose = f"{printable(without_secrets(url))}: reading {protocol}:// URLs"
    try:
        import fsspec
        from fsspec.core import url_to_fs
    except ImportError:
        raise MissingExtraError("fsspec", "remote", purpose) from None
    try:
        return url_to_fs(url)
    except ImportError as error:
        driver = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
        package = driver.get(protocol.lower(), "aiohttp" if protocol.startswith("http") else one_line(error))
        raise MissingExtraError(package, "remote", purpose) from None
    except (ValueError, KeyError) as error:
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "hf", "https") if name in fsspec.available_protocols())
        raise InputError(
            f"{printable(without_secrets(url))}: cannot be opened ({one_line(error)}): give a path, or a URL such as "
            f"{known}"
        ) from None


def protocols(files: Any) -> tuple[str, ...]:
    """By which protocols fsspec knows a file system."""
    known = files.protocol
    return (known,) if isinstance(known, str) else tuple(known)


def patiently(ask: Callable[[], T], url: str) -> T:
    """What `ask()` returns, tried several times where it fails in a way that may pass.

    Raises:
        InputError: It failed each time, or in a way that lasts.
    """
    where = printable(without_secrets(url))
    for attempt in range(ATTEMPTS):
        try:
            return ask()
        except InputError:
            raise
        except _LASTING as error:
            kind = "no such file or folder" if isinstance(error, FileNotFoundError) else one_line(error)
            raise InputError(f"{where}: cannot be read ({kind}): check its name and your credentials") from None
        except Exception as error:  # each driver has exceptions of its own
            reason = one_line(error)
        if attempt + 1 < ATTEMPTS:
            pause = PAUSE * 2**attempt * random.uniform(0.75, 1.25)
            _log.info("%s: %s; tried again in %.1f s", where, reason, pause)
            time.sleep(pause)
    raise InputError(
        f"{where}: cannot be read, {ATTEMPTS} attempts failed (the last: {reason}): check the connection, then run the "
        "same command again; what is finished is kept"
    )


def call(file_system: Any, method: str, *arguments: Any, **options: Any) -> Any:
    """`file_system.method(…)`, ended after `TIMEOUT` seconds where the file system is asynchronous."""
    if getattr(file_system, "async_impl", False) and hasattr(file_system, f"_{method}"):
        from fsspec.asyn import sync

        function = getattr(file_system, f"_{method}")
        return sync(file_system.loop, function, *arguments, timeout=TIMEOUT, **options)
    return getattr(file_system, method)(*arguments, **options)


def file_info(url: str) -> dict[str, Any]:
    """What the store says of a file: `size`, and its version (`ETag` or the like)."""
    files, path = file_system(url)
    found = patiently(lambda: call(files, "info", path), url)
    if found.get("size") is None:
        raise InputError(
            f"{printable(without_secrets(url))}: the server does not say how large it is, so that it cannot be read in "
            "parts: download it"
        )
    return dict(found)


def identity_of(url: str, info: Mapping[str, Any]) -> str:
    """What tells these contents from others: URL, size, and the version that the store names, or else the time."""
    version = {name: str(info[name]) for name in _VERSIONS if info.get(name) not in (None, "")}
    if not version:
        version = {name: str(info[name]) for name in _TIMES if info.get(name) not in (None, "")}
    text = json.dumps([without_secrets(url), int(info["size"]), version], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class RemoteFile(io.RawIOBase):
    """A file that is read by ranges; seekable. The block after the one that is read is on its way meanwhile.

    Args:
        url: Of the file.
        size: In bytes.
    """

    def __init__(self, url: str, size: int | None = None) -> None:
        super().__init__()
        self.url, self.name = url, printable(without_secrets(url))
        self._files, self._path = file_system(url)
        # The Hub's driver opens the file each time, and would read ahead for nothing.
        self._options = {"cache_type": "none"} if "hf" in protocols(self._files) else {}
        self.size: int = file_info(url)["size"] if size is None else size
        self._position = 0
        self._start, self._block = 0, b""
        self.block = BLOCK  # bytes of a request; fewer where little is read here and there
        self._coming: tuple[int, Future[bytes]] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        wanted = self.size - self._position if size is None or size < 0 else size
        wanted = max(0, min(wanted, self.size - self._position))
        pieces = []
        while wanted:
            piece = self._some(wanted)
            pieces.append(piece)
            wanted -= len(piece)
            self._position += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def _some(self, wanted: int) -> bytes:
        """At least one byte, at most `wanted`, from the current position."""
        offset = self._position - self._start
        if not 0 <= offset < len(self._block):
            sequential = self._block != b"" and offset == len(self._block)
            self._load(self._position, sequential)
            offset = self._position - self._start
        return self._block[offset : offset + wanted]

    def _load(self, start: int, sequential: bool) -> None:
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == start:
            self._block = coming[1].result()
        else:
            if coming is not None:
                coming[1].cancel()
            self._block = self.fetch(start, min(self.size, start + self.block))
        self._start, following = start, start + len(self._block)
        if sequential and following < self.size:
            self._thread = self._thread or ThreadPoolExecutor(1)
            stop = min(self.size, following + self.block)
            self._coming = following, self._thread.submit(self.fetch, following, stop)

    def fetch(self, start: int, stop: int) -> bytes:
        """The bytes from start up to stop."""

        def ask() -> bytes:
            data = bytes(call(self._files, "cat_file", self._path, start=start, end=stop, **self._options))
            if len(data) > stop - start:
                raise InputError(f"{self.name}: the server does not answer requests for parts of a file: download it")
            if len(data) < stop - start:
                raise OSError(f"{len(data):,} bytes came instead of {stop - start:,}")
            return data

        return patiently(ask, self.url)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None
        self._block, self._coming = b"", None
        super().close()
