"""Sources taken apart: which files there are, in which order, and which of their rows a shard is made from."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffmem.atomic_io import atomic_write
from diffmem.data import builtin
from diffmem.data.arrays import map_npy
from diffmem.data.cifar import is_cifar
from diffmem.data.containers import HF, Folder, files_without_images, is_image_name, is_saved_dataset, natural_key
from diffmem.data.parquet import parquet_files
from diffmem.errors import InputError
from diffmem.indexes import remote
from diffmem.indexes.containers import RemoteFolder, container
from diffmem.indexes.reading import Reading
from diffmem.integrity import file_sha256, read_sealed, sealed
from diffmem.progress import Progress
from diffmem.text import printable

IDENTITIES = "sources.json"
FEWEST_ROWS, MOST_ROWS, PARTS = 2**12, 2**20, 64
_BRACES = re.compile(r"\{([0-9]{1,12})\.\.([0-9]{1,12})\}")
_MOST_FILES = 1_000_000
_VECTORS = (".npy", ".npz", ".safetensors", ".pt", ".pth", ".parquet")
_STAGE = "identifying sources"


@dataclass(frozen=True)
class Part:
    """What one shard is made from: rows of one file, or of one folder of image files.

    Attributes:
        source: Which of the sources, counted from 0.
        file: Path or URL.
        kind: "tar" (read from its beginning to its end), "folder" (of image files), "files" (image files in an archive
            or a table), "images" (arrays and all else that `load_images` reads), "rows" (vectors).
        label: What the names of the rows begin with, in reports.
        start, stop: Which of the file's rows; stop is None for all.
        key: As for `load_images` and `load_features`, of this file.
        names: Path or URL of the file that names the rows, where it is another one.
        bytes: Size of the file, for the plan; of a part of it, its share.
        identity: A hash of the contents, or of what an object store says of them.
    """

    source: int
    file: str
    kind: str
    label: str = ""
    start: int = 0
    stop: int | None = None
    key: str | None = None
    names: str | None = None
    bytes: int = 0
    identity: str = ""

    @property
    def where(self) -> str:
        """What to call it in messages."""
        rows = "" if self.stop is None else f" ({self.start:,} to {self.stop - 1:,})"
        return f"{printable(remote.without_secrets(self.file))}{rows}"

    def made_from(self) -> dict[str, Any]:
        """What decides its contents, whatever the file is called."""
        return {"identity": self.identity, "kind": self.kind, "rows": [self.start, self.stop], "key": self.key}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "file": remote.without_secrets(self.file)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Part:
        return cls(**values)


def rows_per_shard(rows: int) -> int:
    """How many rows of a file of so many go into a shard: it depends on nothing else, so that addresses last."""
    return min(MOST_ROWS, max(FEWEST_ROWS, 1 << max(0, math.ceil(rows / PARTS) - 1).bit_length()))


def parts_of(source: str, number: int, reading: Reading, vectors: bool, rows: int | None) -> list[Part]:
    """The parts of a source, in the order of its files and of their rows.

    Args:
        source: Path, URL, brace pattern or glob.
        number: Which of the sources it is.
        reading: How it is read.
        vectors: Whether it holds vectors that were computed elsewhere.
        rows: Rows per shard of files that can be divided; None: by their size.

    Raises:
        InputError: Nothing there can be read.
    """
    files = _expanded(source)
    several = len(files) > 1
    parts: list[Part] = []
    for file in files:
        take = _vector_parts if vectors else _image_parts
        parts += take(file, number, reading, several)
    if not parts:
        raise InputError(f"{source}: nothing to index in it")
    return [piece for part in parts for piece in _divided(part, rows)]


def _divided(part: Part, rows: int | None) -> list[Part]:
    """A part whose `stop` is known, cut into shards."""
    if part.stop is None:
        return [part]
    total = part.stop
    size = rows or rows_per_shard(total)
    return [
        replace(
            part, start=start, stop=min(total, start + size),
            bytes=part.bytes * (min(total, start + size) - start) // max(1, total),
        )
        for start in range(0, total, size)
    ]  # fmt: skip


def _expanded(source: str) -> list[str]:
    """The files and folders that a brace pattern or glob stands for; the source itself where it is neither."""
    if _is_named(source):
        return [source]
    names = [source]
    if (match := _BRACES.search(source)) is not None:
        first, last, width = int(match[1]), int(match[2]), len(match[1])
        if not 0 <= last - first < _MOST_FILES or _BRACES.search(source, match.end()):
            raise InputError(f"{source}: one range {{first..last}} that ascends is understood")
        names = [f"{source[: match.start()]}{n:0{width}d}{source[match.end() :]}" for n in range(first, last + 1)]
    found: list[str] = []
    for name in names:
        away = remote.is_remote(name)
        if not any(sign in name for sign in "*[") or (not away and os.path.exists(name)):
            found.append(name)
            continue
        if away:
            files, path = remote.file_system(name)
            matches = [files.unstrip_protocol(each) for each in remote.patiently(lambda: files.glob(path), name)]  # noqa: B023
        else:
            matches = glob.glob(os.path.expanduser(name), recursive=True)
        if not matches:
            raise InputError(f"{name}: no file matches")
        found += sorted(matches, key=natural_key)
    missing = [name for name in found if not remote.is_remote(name) and not Path(name).expanduser().exists()]
    if missing:
        which = f"{len(missing):,} of {len(found):,} files are missing, the first being {missing[0]}"
        raise InputError(f"{source}: {which}" if len(found) > 1 else f"{source}: no such file or folder")
    return found


def _is_named(source: str) -> bool:
    """Whether `load_images` knows it by its name: a built-in set, or a dataset of Hugging Face's library on this "
    "disk."""
    return source.startswith((builtin.PREFIX, HF)) and not source.startswith(f"{HF}//")


def _image_parts(file: str, number: int, reading: Reading, several: bool) -> list[Part]:
    label = _stem(file) + "/" if several else ""
    if remote.is_remote(file):
        return _remote_image_parts(file, number, label, reading.key)
    if file.startswith(builtin.PREFIX):
        return [Part(number, file, "images", label, key=reading.key)]
    path = Path(file).expanduser()
    if _is_named(file):
        return [_files_part(file, number, label, reading.key)]
    if path.is_dir() and not is_saved_dataset(path):
        packed = _packed(path, number, label, reading.key)
        if packed:
            return packed
    elif path.suffix.lower() == ".tar" and not is_cifar(path):
        return [Part(number, str(path), "tar", label, key=reading.key, bytes=path.stat().st_size)]
    return [_files_part(str(path), number, label, reading.key)]


def _files_part(file: str, number: int, label: str, key: str | None) -> Part:
    encoded = container(file, key)
    if encoded is None:
        path = Path(file)
        size = path.stat().st_size if path.is_file() else 0
        rows = len(map_npy(path)) if path.suffix.lower() == ".npy" else None
        return Part(number, file, "images", label, stop=rows, key=key, bytes=size)
    path = Path(file.removeprefix(HF).partition("?")[0])
    size = path.stat().st_size if path.is_file() else 0
    kind = "folder" if isinstance(encoded, Folder) and path.is_dir() else "files"
    return Part(number, file, kind, label, stop=len(encoded.names), key=key, bytes=size)


def _packed(folder: Path, number: int, label: str, key: str | None) -> list[Part]:
    """The shards of webdataset, or the parquet files, in a folder without image files."""
    names = files_without_images(folder)
    tars = [folder / name for name in names if name.lower().endswith(".tar")]
    if tars:
        some = len(tars) > 1
        return [
            Part(
                number, str(path), "tar", f"{label}{path.stem}/" if some else label, key=key, bytes=path.stat().st_size
            )
            for path in tars
        ]
    tables = [folder / name for name in names if name.lower().endswith(".parquet")]
    if not tables:
        return []
    files, column = parquet_files(tables, folder, key)
    some = len(files) > 1
    return [_files_part(str(path), number, f"{label}{path.stem}/" if some else label, column) for path in files]


def _vector_parts(file: str, number: int, reading: Reading, several: bool) -> list[Part]:
    label = _stem(file) + "/" if several else ""
    away = remote.is_remote(file)
    inside = _listed(file) if away else _inside(Path(file).expanduser())
    if inside is None:
        if not file.lower().endswith(_VECTORS):
            raise InputError(
                f"{file}: not a file of vectors: give {', '.join(_VECTORS)} or a folder of them, or choose other "
                "features"
                " than features='precomputed'"
            )
        return [_rows_part(file, number, label, reading.key, None)]
    return _vector_folder(file, inside, number, label, reading.key)


def _vector_folder(folder: str, names: Sequence[str], number: int, label: str, key: str | None) -> list[Part]:
    """clip-retrieval's folders, and parts in the order of their numbers."""
    base = folder.rstrip("/")
    embeddings = [name for name in names if name.startswith("img_emb/")]
    direct = [name for name in (embeddings or names) if name.count("/") == bool(embeddings)]
    chosen = [name for name in direct if name.endswith(".npy")] or [
        name for name in direct if name.endswith(".parquet")
    ]
    if not chosen:
        raise InputError(f"{folder}: no vectors in this folder: .npy or .parquet parts, or clip-retrieval's img_emb")
    chosen.sort(key=natural_key)
    metadata = sorted(
        (name for name in names if name.startswith("metadata/") and name.endswith(".parquet")), key=natural_key
    )
    if metadata and len(metadata) != len(chosen):
        raise InputError(f"{folder}: {len(metadata):,} files of metadata for {len(chosen):,} of vectors")
    several = len(chosen) > 1
    beside_each: list[str | None] = [*metadata] or [None] * len(chosen)
    return [
        _rows_part(
            f"{base}/{name}", number, f"{label}{_stem(name)}/" if several and not metadata else label, key,
            f"{base}/{beside}" if beside else None,
        )
        for name, beside in zip(chosen, beside_each, strict=True)
    ]  # fmt: skip


def _rows_part(file: str, number: int, label: str, key: str | None, names: str | None) -> Part:
    from diffmem.indexes.vectors import count_rows

    size = remote.file_info(file)["size"] if remote.is_remote(file) else Path(file).expanduser().stat().st_size
    return Part(number, file, "rows", label, stop=count_rows(file, key), key=key, names=names, bytes=size)


def _remote_image_parts(file: str, number: int, label: str, key: str | None) -> list[Part]:
    """The parts of a file or folder of an object store."""
    names = _listed(file)
    if names is None:
        return [_remote_file(file, number, label, key)]
    packed = [name for name in names if name.lower().endswith(".tar")]
    packed = packed or [name for name in names if name.lower().endswith(".parquet")]
    if any(is_image_name(name) for name in names) or not packed:
        encoded = container(file, key)
        assert encoded is not None
        size = sum(int(each.get("size") or 0) for each in getattr(encoded, "infos", ()))
        return [Part(number, file, "folder", label, stop=len(encoded.names), bytes=size)]
    packed.sort(key=natural_key)
    base = file.rstrip("/")
    return [
        _remote_file(f"{base}/{name}", number, f"{label}{_stem(name)}/" if len(packed) > 1 else label, key)
        for name in packed
    ]


def _remote_file(file: str, number: int, label: str, key: str | None) -> Part:
    size = int(remote.file_info(file)["size"])
    suffix = Path(remote.without_secrets(file)).suffix.lower()
    if suffix == ".tar":
        return Part(number, file, "tar", label, key=key, bytes=size)
    if suffix in (".zip", ".parquet"):
        encoded = container(file, key)
        assert encoded is not None
        return Part(number, file, "files", label, stop=len(encoded.names), key=key, bytes=size)
    raise InputError(
        f"{printable(remote.without_secrets(file))}: cannot be read in parts: download it, or pack the images as .tar, "
        ".zip or .parquet"
    )


def _listed(url: str) -> list[str] | None:
    """The files below a URL that is a folder, relative to it; None where it is a file."""
    if url.lower().partition("?")[0].endswith((*_VECTORS, ".tar", ".zip")):
        return None
    files, path = remote.file_system(url)
    if url.lower().startswith(("http://", "https://")):
        return None
    found = remote.patiently(lambda: files.find(path), url)
    inside = [each[len(path.rstrip("/")) + 1 :] for each in found if each != path]
    return inside or None


def _inside(folder: Path) -> list[str] | None:
    if not folder.is_dir():
        return None
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def _stem(file: str) -> str:
    return printable(Path(remote.without_secrets(file)).stem)


class Identities:
    """What the contents of source files are told by, kept so that a file is hashed once while it stays the same.

    Args:
        folder: Of the index.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / IDENTITIES
        self._known: dict[str, str] = {}
        try:
            self._known = dict(read_sealed(self._path, "it is made again")["identities"])
        except (InputError, KeyError, TypeError, ValueError):
            self._known = {}
        self._used: dict[str, str] = {}
        self._folders: dict[str, Sequence[str]] = {}

    def identify(self, parts: Sequence[Part], progress: Progress) -> list[Part]:
        """The parts with their identities; each file is read once, unless it is known."""
        found: list[Part] = []
        total = sum(part.bytes for part in parts)
        done, last = 0, ("", "")
        for part in parts:
            if part.kind != "folder":
                if last[0] != part.file:
                    last = part.file, self._of(part.file)
                identity = last[1]
                if part.names is not None:
                    identity = _joined([identity, self._of(part.names)])
            else:
                identity = self._of_folder(part)
            done += part.bytes
            progress(_STAGE, done, max(total, done))
            found.append(replace(part, identity=identity))
        return found

    def save(self) -> None:
        """Writes what was asked for since."""
        if self._used != self._known:
            document = sealed({"identities": self._used})
            atomic_write(self._path, json.dumps(document, indent=1) + "\n", durable=False)

    def _of(self, file: str) -> str:
        if remote.is_remote(file):
            return remote.identity_of(file, remote.file_info(file))
        if file.startswith(builtin.PREFIX):
            return file
        path = Path(file.removeprefix(HF).partition("?")[0]).expanduser()
        query = file.partition("?")[2] if file.startswith(HF) else ""
        if path.is_dir():
            names = [each for each in sorted(path.rglob("*")) if each.is_file()]
            return _joined([query, *(self._remembered([each], each.relative_to(path).as_posix()) for each in names)])
        return self._remembered([path], query)

    def _of_folder(self, part: Part) -> str:
        if remote.is_remote(part.file):
            return _joined(folder_identity(part))
        folder = Path(part.file)
        if part.file not in self._folders:
            self._folders[part.file] = Folder(folder).files
        names = self._folders[part.file][part.start : part.stop]
        return self._remembered([folder / name for name in names], "\n".join(names))

    def _remembered(self, paths: Sequence[Path], what: str) -> str:
        """A hash of `what` and of the files' contents; these are read only where size or time changed."""
        digest = hashlib.sha256(what.encode("utf-8", "backslashreplace"))
        for path in paths:
            status = path.stat()
            digest.update(json.dumps([os.fsdecode(path.absolute()), status.st_size, status.st_mtime_ns]).encode())
        key = digest.hexdigest()
        if key not in self._used:
            self._used[key] = self._known.get(key) or _joined([what, *map(file_sha256, paths)])
        return self._used[key]


def folder_identity(part: Part) -> list[str]:
    """What tells the files of a part of a folder elsewhere from others."""
    encoded = container(part.file, part.key, part.identity)
    assert isinstance(encoded, RemoteFolder) and part.stop is not None  # noqa: PT018
    return encoded.identity(part.start, part.stop)


def check_unchanged(part: Part) -> None:
    """Raises InputError where a file elsewhere is another one than when the build was planned."""
    if not remote.is_remote(part.file) or part.names is not None:
        return
    found = _joined(folder_identity(part)) if part.kind == "folder" else None
    if (found or remote.identity_of(part.file, remote.file_info(part.file))) != part.identity:
        raise InputError(f"{part.where}: has changed since the build began: run the same command again")


def _joined(texts: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
