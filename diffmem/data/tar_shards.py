"""Tar archives of samples, as webdataset and img2dataset write them: read in place, never extracted.

A sample is the members that share a key, the name up to the first dot behind its last slash: `000017.jpg`,
`000017.cls`, `000017.json`. Read are its image and its label, a class number in `.cls` or under `label` (or `cls`) in
`.json`. All other members, pickles among them, stay closed.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from diffmem.data.containers import contents, is_image_name, is_skipped, natural_key
from diffmem.data.decode import MAX_FILE_BYTES
from diffmem.data.depth import BadImage
from diffmem.data.labels import as_labels, or_note
from diffmem.errors import InputError
from diffmem.inert.boundary import parsing, short
from diffmem.text import printable

_LABELS = ("cls", "json")
_MOST_LABEL_BYTES = {"cls": 2**10, "json": 2**20}
_BRACES = re.compile(r"\{([0-9]{1,12})\.\.([0-9]{1,12})\}")
_LOOKED_AT = 8  # samples at the beginning that show where labels are
_MOST_SHARDS = 1_000_000
_ADVICE = "download or pack it again"


class Member(NamedTuple):
    """A plain file in a tar: which shard, where its bytes begin, how many there are."""

    shard: int
    start: int
    size: int


def expand_braces(name: str) -> list[Path] | None:
    """The shards that `name`, such as "train-{000..127}.tar", stands for; None where it holds no such range."""
    match = _BRACES.search(name)
    if match is None:
        return None
    first, last, width = int(match[1]), int(match[2]), len(match[1])
    if not 0 <= last - first < _MOST_SHARDS or _BRACES.search(name, match.end()):
        raise InputError(f"{name}: one range {{first..last}} that ascends is understood")
    names = [f"{name[: match.start()]}{number:0{width}d}{name[match.end() :]}" for number in range(first, last + 1)]
    shards = [Path(name).expanduser() for name in names]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise InputError(f"{name}: {len(missing):,} of {len(shards):,} files are missing, the first being {missing[0]}")
    return shards


class TarShards:
    """The images of one tar archive or of several, in the order of the shards and of the samples in each."""

    def __init__(self, shards: Sequence[Path], description: str, key: str | None) -> None:
        self.description = description
        self.fork_safe = True
        self.mode: str | None = None
        self._shards = list(shards)
        self._images: list[Member] = []
        names: list[str] = []
        labels: dict[str, list[Member | None]] = {kind: [] for kind in _LABELS}
        others: list[str] = []
        for number, path in enumerate(self._shards):
            prefix = f"{path.stem}/" if len(self._shards) > 1 else ""
            for sample, files in _samples(number, path).items():
                image = _choose_image(files, key, f"{path}: sample {printable(sample)}")
                if image is None:
                    others += [f"{sample}.{ending}" for ending in files]
                    continue
                self._images.append(files[image])
                names.append(printable(f"{prefix}{sample}.{image}"))
                for kind in _LABELS:
                    labels[kind].append(files.get(kind))
        if not names:
            wanted = "no images" if key is None else f"no images {key!r} (key=…)"
            raise InputError(f"{description}: {wanted} in {self._called()}; {contents(others)}")
        self.names: Sequence[str] = names
        self.labels, self.notes = or_note(lambda: self._read_labels(labels))
        if others:
            self.notes += (f"{description}: samples without an image were skipped; {contents(others)}",)

    def _called(self) -> str:
        return "this archive" if len(self._shards) == 1 else f"these {len(self._shards):,} archives"

    def _read_labels(self, members: dict[str, list[Member | None]]) -> np.ndarray | None:
        for kind in _LABELS:
            values = self._values(kind, members[kind][:_LOOKED_AT])
            if all(value is None for value in values):  # no such members, or descriptions that name no class
                continue
            values += self._values(kind, members[kind][_LOOKED_AT:])
            if None in values:
                name = self.names[values.index(None)]
                raise InputError(f"{self.description}: {name} has no label in .{kind}, others have")
            return as_labels(values, self.names, f"{self.description}: .{kind}")
        return None

    def _values(self, kind: str, members: Sequence[Member | None]) -> list[Any]:
        return [None if member is None else self._label(kind, member) for member in members]

    def _label(self, kind: str, member: Member) -> Any:
        where = f"{self._shards[member.shard]}: a .{kind}"
        if member.size > _MOST_LABEL_BYTES[kind]:
            raise InputError(f"{where}: {member.size:,} bytes are no label")
        try:
            text = self._bytes(member).decode().strip()
            if kind == "cls":
                return text
            content = json.loads(text)
        except (ValueError, RecursionError, BadImage) as error:
            raise InputError(f"{where} cannot be read ({short(str(error))})") from None
        fields = content if isinstance(content, dict) else {}
        return next((fields[name] for name in ("label", "cls") if name in fields), None)

    def read(self, index: int) -> bytes:
        """The bytes of image `index`; raises `BadImage`."""
        member = self._images[index]
        if member.size > MAX_FILE_BYTES:
            raise BadImage(f"declares {member.size / 1e6:,.0f} MB, more than any image that is read")
        return self._bytes(member)

    def _bytes(self, member: Member) -> bytes:
        try:
            with open(self._shards[member.shard], "rb", buffering=0) as file:
                file.seek(member.start)
                data = file.read(member.size)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from None
        if len(data) != member.size:
            raise BadImage("is cut short: its archive has changed")
        return data


def _samples(number: int, path: Path) -> dict[str, dict[str, Member]]:
    """The members of each sample by their endings, in order of the samples."""
    samples: dict[str, dict[str, Member]] = {}
    with parsing(path, "a complete tar archive", _ADVICE):
        for name, member in _members(number, path):
            folder, slash, base = name.rpartition("/")
            stem, dot, ending = base.partition(".")
            if not stem or not dot or is_skipped(name):
                continue
            files = samples.setdefault(f"{folder}{slash}{stem}", {})
            if files.setdefault(ending.lower(), member) is not member:
                raise InputError(f"{path}: two members are named {printable(name)}: pack the archive again")
    return {sample: samples[sample] for sample in sorted(samples, key=natural_key)}


def _members(number: int, path: Path) -> Iterator[tuple[str, Member]]:
    with open(path, "rb") as file:
        yield from _members_of(file, number, path, path.stat().st_size)


def _members_of(file: IO[bytes], number: int, path: object, size: int) -> Iterator[tuple[str, Member]]:
    if file.read(3)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5"):
        raise InputError(f"{path}: is packed as a whole, so that nothing in it can be found: unpack it to a .tar")
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (entry := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined] # it keeps them all
            if entry.isreg() and not entry.issparse():
                if entry.size < 0 or entry.offset_data + entry.size > size:
                    raise ValueError(f"{printable(entry.name)} reaches beyond its end")
                yield entry.name.removeprefix("./"), Member(number, entry.offset_data, entry.size)
        # tarfile takes a header that is damaged or cut short for the end.
        file.seek(archive.offset)
        if file.read(512) != bytes(512):
            raise ValueError("damaged or cut short behind its last readable member")


def stream_samples(
    file: IO[bytes], where: str, key: str | None, places: dict[str, tuple[int, int]] | None = None
) -> Iterator[tuple[str, bytes | str]]:
    """The images of one archive as they come, in one pass from its beginning: name, and bytes or why there are none.

    Names are as `TarShards` has them. The members of a sample must lie together, as webdataset wants it.

    Args:
        file: Open at its beginning, seekable; read from its beginning to its end, members without images skipped.
        where: What to call it.
        key: The ending of the images, where samples hold several.
        places: Gets, by name, where the bytes of each image begin and how many there are.
    """
    seen: set[str] = set()
    sample, files, found = "", dict[str, Member](), False
    data: dict[str, bytes | str] = {}
    size = file.seek(0, 2)
    file.seek(0)

    def ended() -> Iterator[tuple[str, bytes | str]]:
        image = _choose_image(files, key, f"{where}: sample {printable(sample)}")
        if image is not None:
            name = printable(f"{sample}.{image}")
            if places is not None:
                places[name] = files[image].start, files[image].size
            yield name, data[image]

    with parsing(where, "a complete tar archive", _ADVICE):
        for name, member in _members_of(file, 0, where, size):
            folder, slash, base = name.rpartition("/")
            stem, dot, ending = base.partition(".")
            if not stem or not dot or is_skipped(name):
                continue
            if f"{folder}{slash}{stem}" != sample:
                for each in ended():
                    found = True
                    yield each
                seen.add(sample)
                sample, files, data = f"{folder}{slash}{stem}", {}, {}
                if sample in seen:
                    raise InputError(
                        f"{where}: the members of sample {printable(sample)} do not lie together: pack the archive "
                        "again"
                    )
            if files.setdefault(ending.lower(), member) is not member:
                raise InputError(f"{where}: two members are named {printable(name)}: pack the archive again")
            if is_image_name(f"x.{ending.lower()}"):
                if member.size > MAX_FILE_BYTES:
                    data[ending.lower()] = f"declares {member.size / 1e6:,.0f} MB, more than any image that is read"
                else:
                    place = file.tell()
                    file.seek(member.start)
                    data[ending.lower()] = file.read(member.size)
                    file.seek(place)
        for each in ended():
            found = True
            yield each
    if not found:
        wanted = "no images" if key is None else f"no images {key!r} (key=…)"
        raise InputError(f"{where}: {wanted} in this archive")


def _choose_image(files: dict[str, Member], key: str | None, where: str) -> str | None:
    """The ending of a sample's image; None where it has none."""
    if key is not None:
        key = key.lower().removeprefix(".")
        return key if key in files and is_image_name(f"x.{key}") else None
    images = [ending for ending in files if is_image_name(f"x.{ending}")]
    plain = [ending for ending in images if "." not in ending] or images  # .jpg rather than .seg.png
    if len(plain) > 1:
        raise InputError(f"{where} has several images: pick one with key=…: {', '.join(map(printable, plain))}")
    return plain[0] if plain else None
