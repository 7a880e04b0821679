"""Decoding a whole source of encoded images on all cores, into one array.

Images are decoded by processes, not threads: a 32×32 JPEG spends more time in Pillow's Python than in libjpeg, and
threads would wait for each other there (measured on two cores: no gain at all). Each process runs `serve` below: blocks
of encoded images come in on its standard input, pixels go out on its standard output; it opens no file. They are plain
Python processes, so that neither a script without a main guard nor a running CUDA context is disturbed, and start only
where the first block, decoded in this process, shows that the work is worth it. A command that has not imported PyTorch
yet forks processes instead (`decode_forks`).
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

from diffmem import system
from diffmem.data import decode_forks
from diffmem.data.decode import Decoded, Outcome, PixelOptions, decode_into
from diffmem.data.depth import BadImage
from diffmem.data.image_set import SkippedFile
from diffmem.data.storage import allocate, crowds_memory, discard_rows
from diffmem.errors import InputError
from diffmem.progress import Progress

STAGE = "reading images"
# Work that is over sooner than this is done here: processes take a quarter of a second to start.
IN_PROCESS_SECONDS = 0.6
IN_FORKS_SECONDS = 0.02  # forked ones in milliseconds
_BLOCK_BYTES = 2**20
_BLOCK_IMAGES = 256


class EncodedImages(Protocol):
    """Image files in some container: `names`, what the container is called, the Pillow mode ("L", "RGB" or None) that
    it prescribes for them, their labels, what else is to be said, and the bytes of each file."""

    description: str
    names: Sequence[str]
    mode: str | None
    labels: np.ndarray | None
    notes: tuple[str, ...]
    fork_safe: bool  # whether a forked process may read on, beside this one

    def read(self, index: int) -> bytes:
        """The bytes of file `index`; raises `BadImage`, and may be called from several threads."""
        ...


class DecodedImages(NamedTuple):
    """What a source holds: images uint8 [n, C, H, W], the index in the source's `names` of each, the files skipped, and
    how many images an EXIF orientation turned."""

    images: np.ndarray
    kept: np.ndarray
    skipped: tuple[SkippedFile, ...]
    turned: int


def decode_all(
    source: EncodedImages, options: PixelOptions, *, limit: int | None, skip_bad: bool, progress: Progress
) -> DecodedImages:
    """All images of `source`, or the first `limit`.

    Raises `InputError` at the first file that cannot be used (unless `skip_bad`), where sizes or channels are mixed,
    and where no image is left.
    """
    with closing(Decoding(source, options, limit=limit, skip_bad=skip_bad, progress=progress)) as decoding:
        return decoding.result()


class Decoding:
    """A source that is being decoded: small ones are done when this has been made, large ones go on meanwhile where
    processes may be forked, and begin in `result` where not. See `decode_all`.

    Close it: that ends its processes.
    """

    def __init__(
        self, source: EncodedImages, options: PixelOptions, *, limit: int | None, skip_bad: bool, progress: Progress
    ) -> None:
        self._source, self._options, self._progress = source, options, progress
        self._total = total = len(source.names) if limit is None else min(limit, len(source.names))
        if total == 0:
            raise InputError(f"{source.description}: no images in it")
        self._tally = tally = _Tally(source, skip_bad, progress, total)
        first, shape = _first_good(source, options, tally, total)
        forks = decode_forks.can_fork() and source.fork_safe
        self._images = _shared((total, *shape)) if forks else allocate((total, *shape))
        tally.shape = shape
        size = min(_BLOCK_IMAGES, max(1, _BLOCK_BYTES // (shape[0] * shape[1] * shape[2])))
        self._blocks = iter([range(start, min(start + size, total)) for start in range(first, total, size)])
        self._workers = 0
        self._forks: decode_forks.Forks | None = None

        progress(STAGE, 0, total)
        started = time.monotonic()
        for block in self._blocks:
            tally.add(block, *self._decode(block))
            workers = min(_cores(), -(-(total - block.stop) // size))
            seconds_left = (time.monotonic() - started) / (block.stop - first) * (total - block.stop)
            if workers > 1 and seconds_left > (IN_FORKS_SECONDS if forks else IN_PROCESS_SECONDS) and sys.executable:
                self._workers = workers
                break
        if self._workers and forks:
            self._forks = decode_forks.Forks(self._decode, list(self._blocks), self._workers, Decoded(*shape, False))

    def result(self) -> DecodedImages:
        """The images; waits until all are decoded."""
        if self._forks is not None:
            for reply in self._forks.replies():
                self._tally.add(*reply)
            if (lost := self._forks.left) is not None:
                raise _died(self._source, lost)
        elif self._workers:
            _decode_in_processes(self._source, self._options, self._images, self._blocks, self._workers, self._tally)
        self._progress(STAGE, self._total, self._total)
        tally = self._tally
        bad = np.array(sorted(tally.bad), dtype=np.int64)
        skipped = tuple(SkippedFile(self._source.names[index], tally.bad[index]) for index in bad)
        kept = np.setdiff1d(np.arange(self._total), bad)
        return DecodedImages(discard_rows(self._images, bad), kept, skipped, tally.turned)

    def close(self) -> None:
        """Ends what is still going on."""
        if self._forks is not None:
            self._forks.close()

    def _decode(self, block: range) -> tuple[dict[int, str], Sequence[Outcome]]:
        """Pixels of a block into their rows; which files could not be read, and what came out of each."""
        data, unread = _read_block(self._source, block)
        return unread, decode_into(self._images[block.start : block.stop], data, self._options)


def _shared(shape: tuple[int, ...]) -> np.ndarray:
    """An array that forked processes write to for this one."""
    crowding = crowds_memory(int(np.prod(shape, dtype=object)))
    return allocate(shape) if crowding else decode_forks.shared_array(shape)


def _died(source: EncodedImages, block: range) -> InputError:
    return InputError(
        f"{source.description}: a decoding process died somewhere between {source.names[block.start]} and "
        f"{source.names[block.stop - 1]} (out of memory, or a file that crashes its decoder)"
    )


class _Tally:
    """Outcomes as they come in: raises for the first one that ends the reading, and reports progress."""

    def __init__(self, source: EncodedImages, skip_bad: bool, progress: Progress, total: int) -> None:
        self.source, self.skip_bad, self.progress, self.total = source, skip_bad, progress, total
        self.shape: tuple[int, int, int] | None = None
        self.bad: dict[int, str] = {}
        self.shapes: dict[tuple[int, int, int], list[int]] = {}
        self.turned = 0
        self.done = 0
        self.last_report = time.monotonic()

    def refuse(self, index: int, reason: str) -> None:
        if not self.skip_bad:
            raise InputError(
                f"{self.source.description}: {self.source.names[index]} {reason}"
                " — fix or remove it, or pass skip_bad=True to skip such files"
            )
        self.bad[index] = reason

    def add(self, block: range, unread: dict[int, str], outcomes: Sequence[Outcome]) -> None:
        for index, outcome in zip(block, outcomes, strict=True):
            if isinstance(outcome, str):
                self.refuse(index, unread.get(index, outcome))
            else:
                self.shapes.setdefault((outcome[0], outcome[1], outcome[2]), []).append(index)
                self.turned += outcome[3]
        if any(shape != self.shape for shape in self.shapes):
            raise InputError(f"{self.source.description}: {_mixed(self.shapes, self.source.names)}")
        self.done += len(block)
        if time.monotonic() - self.last_report > 0.1:
            self.progress(STAGE, self.done, self.total)
            self.last_report = time.monotonic()


def _mixed(shapes: dict[tuple[int, int, int], list[int]], names: Sequence[str]) -> str:
    """One line for images that do not fit together, from the indices seen for each shape."""
    by_size: dict[tuple[int, int], list[int]] = {}
    by_channels: dict[int, list[int]] = {}
    for (channels, height, width), indices in shapes.items():
        by_size.setdefault((height, width), []).extend(indices)
        by_channels.setdefault(channels, []).extend(indices)

    def listing(groups: Mapping[Any, Sequence[int]], label: Callable[..., str]) -> str:
        ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[1][0]))
        shown = [f"{len(indices):,} of {label(what)} ({names[min(indices)]})" for what, indices in ordered[:4]]
        return ", ".join(shown) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")

    seen = f"among the first {sum(map(len, shapes.values())):,} images read"
    if len(by_size) > 1:
        sizes = listing(by_size, lambda size: f"{size[1]}×{size[0]}")
        return f"images of mixed sizes, {seen} {sizes}: pass resize=N to resize them to one size"
    colors = listing(by_channels, lambda channels: "gray" if channels == 1 else "color")
    return f"gray and color images are mixed, {seen} {colors}: pass color='rgb' or color='gray' to convert them"


def _first_good(
    source: EncodedImages, options: PixelOptions, tally: _Tally, total: int
) -> tuple[int, tuple[int, int, int]]:
    """Index and shape of the first image that can be decoded: it decides what the others must look like."""
    probe = np.empty((1, 1, 1, 1), dtype=np.uint8)
    for index in range(total):
        try:
            outcome = decode_into(probe, [source.read(index)], options)[0]
        except BadImage as bad:
            outcome = str(bad)
        if not isinstance(outcome, str):
            return index, outcome[:3]
        tally.refuse(index, outcome)
        tally.done += 1
    name, reason = source.names[0], tally.bad[0]
    raise InputError(
        f"{source.description}: none of its {total:,} files is a usable image; the first one, {name}, {reason}"
    )


def _read_block(source: EncodedImages, block: range) -> tuple[list[bytes], dict[int, str]]:
    """The files' bytes (empty where a file cannot be read) and why those could not be read."""
    data, unread = [], {}
    for index in block:
        try:
            data.append(source.read(index))
        except BadImage as bad:
            data.append(b"")
            unread[index] = str(bad)
    return data, unread


def _cores() -> int:
    return system.usable_cores()


def _decode_in_processes(
    source: EncodedImages,
    options: PixelOptions,
    images: np.ndarray,
    blocks: Iterator[range],
    workers: int,
    tally: _Tally,
) -> None:
    """Decode the remaining `blocks` into `images`; a thread per process feeds it, this thread counts and reports."""
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    lock, stop = threading.Lock(), threading.Event()
    waiting = list(blocks)
    expected = len(waiting)
    waiting.reverse()

    def take() -> tuple[range, list[bytes], dict[int, str]] | None:
        with lock:
            block = waiting.pop() if waiting and not stop.is_set() else None
        return None if block is None else (block, *_read_block(source, block))

    def feed(process: subprocess.Popen[bytes]) -> None:
        block = range(0, 1)
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018
        try:
            coming = take()
            while coming is not None:
                block, data, unread = coming
                rows = images[block.start : block.stop]
                _send(process.stdin, data, rows.shape[1:], options)
                coming = take()  # while the process decodes
                results.put((block, unread, _receive(process.stdout, rows)))
        except Exception as error:
            results.put((block, error, None))

    with ExitStack() as cleanup:
        threads: list[threading.Thread] = []

        def end(processes: list[subprocess.Popen[bytes]]) -> None:
            stop.set()
            for process in processes:
                process.kill()
            for thread in threads:
                thread.join()
            for process in processes:
                process.wait()
                for pipe in filter(None, (process.stdin, process.stdout)):
                    with suppress(OSError):  # what was left in the pipe's buffer has nowhere to go
                        pipe.close()

        processes: list[subprocess.Popen[bytes]] = []
        cleanup.callback(end, processes)
        for _ in range(workers):
            processes.append(_start())
            threads.append(threading.Thread(target=feed, args=(processes[-1],), daemon=True))
            threads[-1].start()
        for _ in range(expected):
            block, unread, outcomes = results.get()
            if isinstance(unread, (EOFError, OSError)):
                raise _died(source, block)
            if isinstance(unread, Exception):
                raise unread
            tally.add(block, unread, outcomes)


def _start() -> subprocess.Popen[bytes]:
    program = f"import sys; sys.path[:] = {sys.path!r}; from diffmem.data.decode_pool import serve; serve()"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=2**20,
        **system.OWN_SESSION,  # Ctrl-C reaches the parent only, which then ends its processes
    )


def _send(stdin: IO[bytes], data: Sequence[bytes], shape: tuple[int, ...], options: PixelOptions) -> None:
    """Ask a process for the pixels of one block. Raises `OSError` if the process is gone."""
    lengths = [len(item) for item in data]
    request = {"lengths": lengths, "shape": shape, "options": asdict(options)}
    stdin.write(json.dumps(request).encode() + b"\n")
    stdin.writelines(data)
    stdin.flush()


def _receive(stdout: Any, rows: np.ndarray) -> list[Outcome]:
    """The outcomes of the block last sent; its pixels land in `rows`. Raises `EOFError` if the process is gone."""
    reply = stdout.readline()
    if not reply.endswith(b"\n") or stdout.readinto(rows.data.cast("B")) != rows.nbytes:
        raise EOFError
    return [outcome if isinstance(outcome, str) else Decoded(*outcome) for outcome in json.loads(reply)]


def serve() -> None:
    """What a decoding process does: blocks from standard input to pixels on standard output, until the input ends."""
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # a plugin that prints must not talk into the pixels
    while line := stdin.readline():
        request = json.loads(line)
        options = PixelOptions(**request["options"])
        data = [stdin.read(length) for length in request["lengths"]]
        rows = np.empty((len(data), *request["shape"]), dtype=np.uint8)
        outcomes = decode_into(rows, data, options)
        stdout.write(json.dumps(outcomes).encode() + b"\n")
        stdout.write(rows.data.cast("B"))
        stdout.flush()
