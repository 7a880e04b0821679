"""Images of an index of features, read one by one from the sources that it was built from.

The index holds no pixels of them, but knows where each lies. What is read is compared with the digest that was stored
when the index was built: an image that has changed since is not taken for the one that was indexed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from diffmem.data import ImageSet, load_images
from diffmem.data.arrays import read_npy
from diffmem.data.decode import MAX_FILE_BYTES, PixelOptions, decode_into
from diffmem.data.decode_pool import EncodedImages
from diffmem.data.depth import BadImage
from diffmem.errors import InputError
from diffmem.indexes import remote
from diffmem.indexes.containers import AT_ONCE, RemoteFolder, RemoteZip, container
from diffmem.indexes.folder import IndexFolder, Shard
from diffmem.indexes.images import image_blocks
from diffmem.indexes.shards import content_digests
from diffmem.indexes.sources import Part
from diffmem.inert.boundary import one_line
from diffmem.integrity import read_sealed
from diffmem.text import printable

SECONDS = 60.0  # after which nothing more is read for pictures
TOO_LATE = f"its sources are slow, and were read for {SECONDS:.0f} s"
KEPT_BYTES = 2**27  # of images that are asked for again
ONE_PIECE_BYTES = 2**30  # of images in a file that can only be read in one piece
_TOGETHER = 64  # files whose bytes are held at once
_LITTLE = 2**16  # bytes of a request where little is read of a file
_ROWS = 1024  # of a block of a file that is read in one piece

Place = tuple[int, bytes | np.ndarray | str]  # a row of a shard, and its file, its pixels, or why there are none


class Originals:
    """Reads images of an index of features by their rows.

    Args:
        folder: The index.

    Attributes:
        problems: How many images could not be had, by source and reason.
    """

    def __init__(self, folder: IndexFolder) -> None:
        self.folder = folder
        self.problems: Counter[tuple[str, str]] = Counter()
        self._parts: dict[str, tuple[Part, dict[str, Any]]] = {
            entry["address"]: (Part.from_json(entry["part"]), entry)
            for entry in folder.description["shards"]
            if entry["rows"]
        }
        self._kept: dict[int, np.ndarray] = {}
        self._kept_bytes = 0
        self._missing: set[int] = set()
        self._closed: dict[str, str] = {}  # why nothing more is asked of a file or a server

    @property
    def available(self) -> bool:
        """Whether the rows are features of images, which lie somewhere."""
        return not self.folder.features.precomputed and self.folder.features.name != "pixels"

    def read(self, rows: Sequence[int] | np.ndarray, ends: float | None = None) -> dict[int, np.ndarray]:
        """Images by their rows, uint8 [C, H, W]; those that cannot be had are missing, and `problems` says why.

        Each source is opened once. The images asked for are held together: ask for some at a time.

        Args:
            rows: Which, in any order.
            ends: When `time.monotonic` has this value, nothing more is read.
        """
        wanted = sorted({int(row) for row in rows} - self._missing)
        found = {row: self._kept[row] for row in wanted if row in self._kept}
        by_shard: dict[int, list[int]] = {}
        for row in wanted:
            if row not in found:
                number, local = self.folder.locate(row)
                by_shard.setdefault(number, []).append(local)
        for number, some in by_shard.items():
            shard = self.folder.shards[number]
            part, entry = self._parts[shard.address]
            left, late = set(some), _late(ends)
            with closing(self._of_shard(shard, part, entry, np.array(some))) as images:
                for local, image in () if late else images:
                    left.discard(local)
                    if isinstance(image, str):
                        self._lost(shard, [local], (printable(remote.without_secrets(part.file)), image))
                    else:
                        found[shard.start + local] = image
                    if late := _late(ends):
                        break
            why = (str(self.folder.path), TOO_LATE) if late else (part.where, "holds fewer images than before")
            self._lost(shard, sorted(left), why)
        for row, image in found.items():
            if row not in self._kept and self._kept_bytes + image.nbytes <= KEPT_BYTES:
                self._kept[row] = image
                self._kept_bytes += image.nbytes
        return found

    def reachable(self, rows: np.ndarray, most_bytes: float) -> np.ndarray:
        """bool [n], which of some rows can be read where they lie: not those in tables and arrays that are read piece
        by piece, where these pieces have more than `most_bytes` together.

        Args:
            rows: int64 [n].
            most_bytes: Of the pieces that these rows need.
        """
        shards = np.array([self.folder.locate(int(row))[0] for row in rows], np.int64)
        sizes = {number: self._piece_bytes(number) for number in np.unique(shards).tolist()}
        within = sum(sizes.values()) <= most_bytes
        return np.array([within or sizes[number] == 0 for number in shards.tolist()], bool)

    def said(self) -> str:
        """Which images could not be read and why, as one sentence; empty where all could."""
        total = self.problems.total()
        if not total:
            return ""
        # The message of an error often begins with its file.
        reasons = [reason if reason.startswith(source) else f"{source}: {reason}" for (source, reason) in self.problems]
        first = "; ".join(reasons[:2])
        more = f"; and {len(reasons) - 2:,} more reasons" if len(reasons) > 2 else ""
        which = "1 training image" if total == 1 else f"{total:,} training images"
        return f"{which} could not be read from the sources of the index ({first}{more})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_kept_bytes": 0}

    def _lost(self, shard: Shard, locals_: Sequence[int], why: tuple[str, str]) -> None:
        if locals_:
            self.problems[why] += len(locals_)
            self._missing.update(shard.start + local for local in locals_)

    def _piece_bytes(self, number: int) -> int:
        part, _ = self._parts[self.folder.shards[number].address]
        direct = part.kind in ("tar", "folder") or part.file.lower().endswith(".zip")
        return 0 if direct or (part.kind == "images" and part.stop is not None) else max(part.bytes, 1)

    def _of_shard(
        self, shard: Shard, part: Part, entry: dict[str, Any], rows: np.ndarray
    ) -> Generator[tuple[int, np.ndarray | str]]:
        """Rows of a shard with their pixels, or why there are none."""
        place = urlsplit(part.file).netloc if remote.is_remote(part.file) else part.file
        if (reason := self._closed.get(place)) is not None:
            yield from ((int(local), reason) for local in rows)
            return
        shape = tuple(entry["image_shape"])
        digests, seen = shard.image_digests, set()
        try:
            for local, found in _decoded(self._found(shard, part, entry, rows), shape, self._options(part)):
                seen.add(local)
                if isinstance(found, np.ndarray) and digests is not None:
                    same = content_digests(found.reshape(1, -1))[0].tobytes() == digests[local].tobytes()
                    found = found if same else "has changed since the index was built"
                yield local, found
        except Exception as error:  # pictures must not end an audit, whatever a driver or a reader raises
            said = one_line(error) if str(error) else type(error).__name__
            # A way out such as "download it again" is for those who need the file.
            self._closed[place] = said.partition(": check ")[0]
            yield from ((int(local), self._closed[place]) for local in rows if local not in seen)

    def _options(self, part: Part) -> PixelOptions:
        """How files are decoded, as they were for the index."""
        options = self.folder.reading.pixels
        if part.kind not in ("folder", "files"):
            return options
        encoded = container(part.file, part.key, part.identity)
        return options if encoded is None else replace(options, mode=encoded.mode)

    def _found(self, shard: Shard, part: Part, entry: dict[str, Any], rows: np.ndarray) -> Iterator[Place]:
        if part.kind == "images":
            yield from _of_array(part, self.folder, entry, rows)
        elif part.kind == "tar" and shard.places is not None:
            yield from _of_tar(part, shard.places[rows], rows)
        elif part.kind == "tar" and remote.is_remote(part.file):
            raise InputError("was indexed by a version that did not store where images lie in it")
        else:
            encoded = container(part.file, part.key, part.identity)
            if encoded is None:
                raise InputError("is not what it was when the index was built")
            yield from _of_container(encoded, _positions(shard, part, entry, encoded, rows), rows)


def _late(ends: float | None) -> bool:
    return ends is not None and time.monotonic() > ends


def _positions(
    shard: Shard, part: Part, entry: dict[str, Any], encoded: EncodedImages, rows: np.ndarray
) -> list[int | None]:
    """Where rows lie among the files of a container: where they were, else by their names; None: nowhere."""
    names = [shard.names(local, local + 1)[0].removeprefix(shard.label) for local in rows.tolist()]

    @cache
    def by_name() -> dict[str, int]:
        return {name: at for at, name in reversed(list(enumerate(encoded.names)))}

    skipped: list[int] = []
    if entry["skipped"]:
        left_out = read_sealed(shard.folder / "skipped.json", "verify the index")["skipped"]
        skipped = sorted(by_name().get(name, -1) for name, _ in left_out)
    found: list[int | None] = []
    for local, name in zip(rows.tolist(), names, strict=True):
        at = part.start + local
        for each in skipped:
            at += part.start <= each <= at
        there = at < len(encoded.names) and encoded.names[at] == name
        found.append(at if there else by_name().get(name))  # files came, or went
    return found


def _of_container(encoded: EncodedImages, positions: Sequence[int | None], rows: np.ndarray) -> Iterator[Place]:
    """Files in an archive, a folder or a table; objects of a store are asked for side by side."""
    if isinstance(encoded, RemoteZip):
        encoded.read_little(_LITTLE)

    def one(pair: tuple[int, int | None]) -> Place:
        local, at = pair
        if at is None:
            return local, "is no longer there"
        try:
            return local, encoded.read(at)
        except BadImage as bad:
            return local, str(bad)

    # In the order in which they lie, since tables are read on from row to row.
    pairs = sorted(zip(rows.tolist(), positions, strict=True), key=lambda pair: -1 if pair[1] is None else pair[1])
    if isinstance(encoded, RemoteFolder):
        yield from _side_by_side(one, pairs)
    else:
        yield from map(one, pairs)


def _side_by_side(one: Any, asked: Sequence[Any]) -> Iterator[Place]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for start in range(0, len(asked), _TOGETHER):
            yield from pool.map(one, asked[start : start + _TOGETHER])


def _of_tar(part: Part, places: np.ndarray, rows: np.ndarray) -> Iterator[Place]:
    """Members of a tar archive, each read where it lies."""
    asked = [(local, start, size) for local, (start, size) in zip(rows.tolist(), places.tolist(), strict=True)]
    if remote.is_remote(part.file):
        file = remote.RemoteFile(part.file)

        def one(each: tuple[int, int, int]) -> Place:
            local, start, size = each
            within = start >= 0 and size <= MAX_FILE_BYTES and start + size <= file.size
            return local, file.fetch(start, start + size) if within else "is cut short"

        yield from _side_by_side(one, asked)
        return
    with open(Path(part.file).expanduser(), "rb", buffering=0) as stream:
        for local, start, size in sorted(asked, key=lambda each: each[1]):
            stream.seek(start)
            data = stream.read(min(size, MAX_FILE_BYTES))
            yield local, data if len(data) == size else "is cut short"


def _of_array(part: Part, folder: IndexFolder, entry: dict[str, Any], rows: np.ndarray) -> Iterator[Place]:
    """Rows of an array: those of a mapped one alone, others in one piece."""
    reading = folder.reading
    if part.stop is not None:
        mapped = read_npy(Path(part.file), reading.layout).images
        rows = rows[rows + part.start < len(mapped)]
        for start in range(0, len(rows), _TOGETHER):
            some = rows[start : start + _TOGETHER]
            color = "grey" if reading.color == "gray" else reading.color
            images = load_images(
                ImageSet(mapped[part.start + some], source=part.where), resize=reading.resize, color=color,
                center_crop=reading.center_crop, alpha=reading.alpha, value_range=reading.value_range,
            ).images  # fmt: skip
            yield from zip(some.tolist(), images, strict=True)
        return
    size = entry["rows"] * int(np.prod(entry["image_shape"]))
    if size > ONE_PIECE_BYTES:
        raise InputError(f"can only be read in one piece, of {size / 1e9:,.1f} GB")
    wanted, start = set(rows.tolist()), 0
    for block in image_blocks(part, reading, _ROWS):
        for local in range(start, start + len(block.images)):
            if local in wanted:
                yield local, np.array(block.images[local - start])
        start += len(block.images)


def _decoded(found: Iterator[Place], shape: tuple[int, ...], options: PixelOptions) -> Iterator[tuple[int, Any]]:
    """The pixels of files, some of which are held at a time."""
    waiting: list[tuple[int, bytes]] = []

    def decoded() -> Iterator[tuple[int, Any]]:
        images = np.empty((len(waiting), *shape), np.uint8)
        for at, outcome in enumerate(decode_into(images, [data for _, data in waiting], options)):
            local = waiting[at][0]
            if isinstance(outcome, str):
                yield local, outcome
            else:
                yield local, images[at].copy() if outcome[:3] == shape else "has changed since the index was built"
        waiting.clear()

    with closing(found):  # type: ignore[type-var] # a generator
        for local, data in found:
            if isinstance(data, bytes):
                waiting.append((local, data))
                if len(waiting) == _TOGETHER:
                    yield from decoded()
            else:
                yield local, data
        yield from decoded()
