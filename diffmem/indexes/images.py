"""Images of one part, decoded block by block: the memory does not depend on how many there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffmem.data import ImageSet, load_images
from diffmem.data.arrays import read_npy
from diffmem.data.containers import natural_key
from diffmem.data.decode import Decoded, PixelOptions, decode_into
from diffmem.data.tar_shards import stream_samples
from diffmem.errors import InputError
from diffmem.indexes.containers import container, files_of
from diffmem.indexes.reading import Reading
from diffmem.indexes.sources import Part
from diffmem.indexes.vectors import open_binary

Skipped = list[tuple[str, str]]


class ImageBlock(NamedTuple):
    """images: [n, C, H, W]; names: n, or None; skipped: names and reasons of files before the last of these."""

    images: np.ndarray
    names: Sequence[str] | None
    skipped: Skipped
    turned: int


def image_blocks(
    part: Part, reading: Reading, rows: int, places: dict[str, tuple[int, int]] | None = None
) -> Iterator[ImageBlock]:
    """The images of a part, in blocks of at most `rows`.

    places: of a tar archive, gets by name where the bytes of each image begin and how many there are.

    Raises:
        InputError: As `load_images` does.
    """
    if part.kind == "images":
        yield from _array_blocks(part, reading, rows)
        return
    if part.kind == "tar":
        with closing(open_binary(part.file)) as stream:
            files = stream_samples(stream, part.where, part.key, places)
            yield from _decoded(files, reading.pixels, reading, rows, part.where)
        return
    encoded = container(part.file, part.key, part.identity)
    assert encoded is not None and part.stop is not None  # noqa: PT018
    if part.stop > len(encoded.names):
        raise InputError(f"{part.where}: holds fewer images than before: run the same command again")
    options = replace(reading.pixels, mode=encoded.mode)
    yield from _decoded(files_of(encoded, part.start, part.stop), options, reading, rows, part.file)


def _array_blocks(part: Part, reading: Reading, rows: int) -> Iterator[ImageBlock]:
    color = "grey" if reading.color == "gray" else reading.color
    if part.stop is not None:  # an array that is mapped: block by block
        mapped = read_npy(Path(part.file), reading.layout).images
        for start in range(part.start, part.stop, rows):
            block = ImageSet(mapped[start : min(start + rows, part.stop)], source=part.where)
            found = load_images(
                block, resize=reading.resize, center_crop=reading.center_crop, color=color, alpha=reading.alpha,
                value_range=reading.value_range,
            )  # fmt: skip
            yield ImageBlock(found.images, None, [], 0)
        return
    images = load_images(
        part.file, resize=reading.resize, center_crop=reading.center_crop, color=color, alpha=reading.alpha,
        skip_bad=reading.skip_bad, key=part.key, layout=reading.layout, value_range=reading.value_range,
    )  # fmt: skip
    skipped = [(each.name, each.reason) for each in images.skipped]
    for start in range(0, len(images), rows):
        stop = min(start + rows, len(images))
        names = None if images.names is None else list(images.names[start:stop])
        yield ImageBlock(images.images[start:stop], names, skipped if start == 0 else [], 0)


def _decoded(
    files: Iterable[tuple[str, bytes | str]], options: PixelOptions, reading: Reading, rows: int, where: str
) -> Iterator[ImageBlock]:
    """Blocks of decoded files; a file is its bytes, or why they cannot be had."""
    shape: tuple[int, int, int] | None = None
    first_name = ""
    probe = np.empty((1, 1, 1, 1), np.uint8)
    waiting: list[tuple[str, bytes]] = []
    skipped: Skipped = []
    yielded = 0

    def refuse(name: str, reason: str) -> None:
        if not reading.skip_bad:
            raise InputError(f"{where}: {name} {reason} — fix or remove it, or pass skip_bad=True to skip such files")
        skipped.append((name, reason))

    def block() -> ImageBlock:
        nonlocal skipped
        assert shape is not None
        images = np.empty((len(waiting), *shape), np.uint8)
        good: list[int] = []
        turned = 0
        for row, outcome in enumerate(decode_into(images, [data for _, data in waiting], options)):
            name = waiting[row][0]
            if isinstance(outcome, str):
                refuse(name, outcome)
                continue
            if outcome[:3] != shape:
                raise InputError(f"{where}: {_mixed(shape, first_name, outcome, name)}")
            good.append(row)
            turned += outcome.turned
        made = ImageBlock(images[good], [waiting[row][0] for row in good], skipped, turned)
        waiting.clear()
        skipped = []
        return made

    for name, data in files:
        if isinstance(data, str):
            refuse(name, data)
            continue
        if shape is None:
            outcome = decode_into(probe, [data], options)[0]
            if isinstance(outcome, str):
                refuse(name, outcome)
                continue
            shape, first_name = outcome[:3], name
        waiting.append((name, data))
        if len(waiting) == rows:
            made = block()
            yielded += len(made.images)
            yield made
    if waiting:
        made = block()
        yielded += len(made.images)
        yield made
    if skipped:
        yield ImageBlock(np.empty((0, *(shape or (1, 1, 1))), np.uint8), [], skipped, 0)


def _mixed(shape: Sequence[int], first: str, other: Decoded, name: str) -> str:
    def size(of: Sequence[Any]) -> str:
        return f"{of[2]}×{of[1]}"

    if tuple(shape[1:]) != tuple(other[1:3]):
        return (
            f"images of mixed sizes, {first} is {size(shape)}, {name} is {size(other)}: pass resize=N to resize them "
            "to one size"
        )
    return f"gray and color images are mixed ({first}, {name}): pass color='rgb' or color='gray' to convert them"


def natural_order(names: Sequence[str]) -> np.ndarray | None:
    """The rows in natural order of their names; None where they are in it."""
    keys = [natural_key(name) for name in names]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    return None if bool((order == np.arange(len(order))).all()) else order
