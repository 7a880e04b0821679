"""Archives from elsewhere: the entries of a zip as views of the file, the members of a tar one after another.

`zipfile` and `tarfile` believe sizes, and build an object per entry or follow links before anyone can look; here every
claim is held against the file and against a limit first.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from diffmem.errors import InputError
from diffmem.inert.boundary import parsing
from diffmem.inert.pickles import Damaged

MOST_ENTRIES = 2**17  # of a zip: torch.save writes one per storage
MOST_MEMBERS = 10_000  # of a tar
MOST_UNPACKED = 2**30  # bytes of a tar, unpacked: CIFAR-10 has 186 MB, CIFAR-100 the same
_MOST_METADATA = 2**20  # bytes of a tar's extended header

_END, _CENTRAL, _LOCAL = b"PK\x05\x06", b"PK\x01\x02", b"PK\x03\x04"
_END_64, _LOCATOR_64 = b"PK\x06\x06", b"PK\x06\x07"


class ZipEntry(NamedTuple):
    """An entry of a zip that is stored without compression: where its header lies, its bytes and their checksum."""

    header: int
    size: int
    crc: int


def zip_entries(data: memoryview) -> dict[str, ZipEntry]:
    """The stored (not compressed) entries of the zip `data`, by name; raises Damaged where it is none."""
    try:
        return _zip_entries(data)
    except struct.error:
        raise Damaged("a truncated zip archive") from None


def _zip_entries(data: memoryview) -> dict[str, ZipEntry]:
    tail_start = max(0, len(data) - 65557)  # the end record, and the longest comment
    end = bytes(data[tail_start:]).rfind(_END)
    if end < 0:
        raise Damaged("a zip archive without an end record")
    end += tail_start
    count, size, start = struct.unpack_from("<HII", data, end + 10)
    if (end >= 20 and data[end - 20 : end - 16] == _LOCATOR_64 and 0xFFFF_FFFF in (size, start)) or count == 0xFFFF:
        (record,) = struct.unpack_from("<Q", data, end - 12)
        if data[record : record + 4] != _END_64:
            raise Damaged("a zip archive whose end record is damaged")
        count, size, start = struct.unpack_from("<QQQ", data, record + 32)
    if count > MOST_ENTRIES or start + size > len(data):
        raise Damaged(f"a zip archive of {count} entries")
    entries: dict[str, ZipEntry] = {}
    position = start
    for _ in range(count):
        if data[position : position + 4] != _CENTRAL:
            raise Damaged("a zip archive whose directory is damaged")
        method, crc, packed, unpacked = struct.unpack_from("<10xH4xIII", data, position)
        name_size, extra_size, comment_size = struct.unpack_from("<HHH", data, position + 28)
        (header,) = struct.unpack_from("<I", data, position + 42)
        name = str(data[position + 46 : position + 46 + name_size], "utf-8", "replace")
        extra = bytes(data[position + 46 + name_size : position + 46 + name_size + extra_size])
        if 0xFFFF_FFFF in (packed, unpacked, header):
            unpacked, packed, header = _sizes_64(extra, unpacked, packed, header)
        if method == 0 and packed == unpacked and name not in entries:
            entries[name] = ZipEntry(header, unpacked, crc)
        position += 46 + name_size + extra_size + comment_size
    return entries


def _sizes_64(extra: bytes, *sizes: int) -> list[int]:
    """Unpacked size, packed size and place of an entry: those that do not fit 32 bits come from its extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
            return [next(values, -1) if size == 0xFFFF_FFFF else size for size in sizes]
        position += 4 + length
    raise Damaged("a zip archive whose sizes are missing")


def zip_content(data: memoryview, entry: ZipEntry) -> memoryview:
    """The bytes of an entry, without a copy; raises Damaged where they are not there, or not those of the checksum."""
    if not 0 <= entry.header <= len(data) - 30 or data[entry.header : entry.header + 4] != _LOCAL:
        raise Damaged("a zip archive whose directory does not match its entries")
    name_size, extra_size = struct.unpack_from("<HH", data, entry.header + 26)
    start = entry.header + 30 + name_size + extra_size
    if entry.size < 0 or start + entry.size > len(data):
        raise Damaged("a zip archive with truncated entries")
    content = data[start : start + entry.size]
    if zlib.crc32(content) != entry.crc:
        raise Damaged("a zip archive with a wrong checksum")
    return content


class TarMember(NamedTuple):
    """A member of a tar: its name, whether it is a plain file, how many bytes it declares."""

    name: str
    is_file: bool
    size: int


class TarReader:
    """The tar archive in `file`, member after member; plain, or packed by gzip, bzip2 or xz.

    Iterate over it, and `read` the member that came last. Links are not followed, nothing is written anywhere.
    """

    def __init__(self, file: BinaryIO, where: Path) -> None:
        self.where = where
        magic = file.read(6)
        file.seek(0)
        if magic[:2] == b"\x1f\x8b":
            self._stream: gzip.GzipFile | bz2.BZ2File | _Xz | BinaryIO = gzip.GzipFile(fileobj=file)
        elif magic[:3] == b"BZh":
            self._stream = bz2.BZ2File(file)
        elif magic == b"\xfd7zXZ\x00":
            self._stream = _Xz(file)
        else:
            self._stream = file
        self._position = 0  # unpacked bytes
        self._end = 0  # of the member that came last, padding included
        self._size = 0

    def __iter__(self) -> Iterator[TarMember]:
        for _ in range(MOST_MEMBERS):
            self._skip_to(self._end)
            block = self._stream.read(512)
            self._position += len(block)
            if not block or block == bytes(512):
                return
            with parsing(self.where, "a complete tar archive", "download it again"):
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if header.size < 0 or self._position + header.size > MOST_UNPACKED:
                raise InputError(
                    f"{self.where}: not a complete tar archive: a member declares {header.size:,} bytes: download it"
                    " again"
                )
            has_data = header.type not in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE)
            self._size = header.size if has_data else 0
            # Longer names, owners, times: nothing that is read here has any.
            metadata = header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE)
            if metadata and header.size > _MOST_METADATA:
                raise InputError(f"{self.where}: a header of {header.size:,} bytes: not a tar archive of images")
            self._end = self._position + -(-self._size // 512) * 512
            yield TarMember(header.name, header.type in (tarfile.REGTYPE, tarfile.AREGTYPE), self._size)
        raise InputError(f"{self.where}: more than {MOST_MEMBERS:,} members: not an archive of CIFAR")

    def read(self) -> bytes:
        """The bytes of the member that came last; raises InputError where the archive ends before."""
        content = self._stream.read(self._size)
        self._position += len(content)
        if len(content) != self._size:
            raise InputError(f"{self.where}: not a complete tar archive (it ends too early): download it again")
        return content

    def _skip_to(self, end: int) -> None:
        while self._position < end:
            block = self._stream.read(min(2**20, end - self._position))
            self._position += len(block)
            if not block:
                raise InputError(f"{self.where}: not a complete tar archive (it ends too early): download it again")


class _Xz:
    """An xz stream with a limit on what its decoder may allocate, which `lzma.open` does not offer."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._decoder = file, lzma.LZMADecompressor(memlimit=2**27)

    def read(self, size: int) -> bytes:
        parts = []
        while size > 0 and not self._decoder.eof:
            packed = self._file.read(2**16) if self._decoder.needs_input else b""
            if self._decoder.needs_input and not packed:
                break
            part = self._decoder.decompress(packed, max_length=size)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
