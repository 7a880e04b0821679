"""Decoding a source in forked processes, while this one goes on with something else.

A command spends its first second on importing PyTorch, on one core. Processes that are forked before that cost a few
milliseconds, hold the opened source already, and write pixels where this process finds them: nothing is sent but what
became of each block. Forking a process in which a library has started threads or a GPU is no good idea, so it is done
only where the command line allows it (`allowed`), before PyTorch is there; `decode_pool` starts plain processes else.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import selectors
import signal
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np

from diffmem.data.decode import Decoded, Outcome

_JOB = struct.Struct("<qq")  # start and stop of a block
_REPLY = struct.Struct("<qqq")  # of a block, and the length of what follows: nothing where all images are alike
_allowed = False

Work = Callable[[range], tuple[dict[int, str], Sequence[Outcome]]]


@contextmanager
def allowed() -> Iterator[None]:
    """Lets sources be decoded in forked processes within this block."""
    global _allowed
    before, _allowed = _allowed, True
    try:
        yield
    finally:
        _allowed = before


def can_fork() -> bool:
    """Whether sources are decoded in forked processes here and now."""
    return _allowed and sys.platform == "linux" and "torch" not in sys.modules


def shared_array(shape: tuple[int, ...]) -> np.ndarray:
    """A uint8 array of zeros that forked processes write to for this one."""
    size = int(np.prod(shape, dtype=object))
    return np.frombuffer(mmap.mmap(-1, max(1, size)), np.uint8, size).reshape(shape)


class Reply(NamedTuple):
    """What became of a block: the files that could not be read, and why; what came out of each."""

    block: range
    unread: dict[int, str]
    outcomes: Sequence[Outcome]


class Forks:
    """Processes that work through blocks.

    Args:
        work: What is done with a block, in such a process: pixels go to a `shared_array` or a mapped file. Returns the
            files that could not be read, and the outcomes.
        blocks: What there is to do.
        count: How many processes.
        expected: The outcome of most images.
    """

    def __init__(self, work: Work, blocks: Sequence[range], count: int, expected: Decoded) -> None:
        self._left = {block.start: block for block in blocks}
        self._expected = expected
        self._pipes: dict[int, bytearray] = {}
        self._processes: list[int] = []
        parent = os.getpid()
        with tempfile.TemporaryFile(prefix="diffmem-", buffering=0) as jobs:
            # All processes read on at the same place in this file: each block is taken by one of them.
            jobs.write(b"".join(_JOB.pack(block.start, block.stop) for block in blocks))
            jobs.seek(0)
            for _ in range(count):
                here, there = os.pipe()
                with warnings.catch_warnings():  # Python 3.12 and later warn where a library has started threads
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process = os.fork()
                if process == 0:
                    _serve(work, jobs.fileno(), there, parent, expected)
                os.close(there)
                self._pipes[here] = bytearray()
                self._processes.append(process)

    def replies(self) -> Iterator[Reply]:
        """What became of the blocks, as it is known. Ends early where a process died: `left` is then not empty."""
        with selectors.DefaultSelector() as selector:
            for pipe in self._pipes:
                selector.register(pipe, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    chunk = os.read(key.fd, 2**16)
                    if not chunk:
                        selector.unregister(key.fd)
                    self._pipes[key.fd] += chunk
                    yield from self._complete(self._pipes[key.fd])

    @property
    def left(self) -> range | None:
        """The first block that nothing is known of."""
        return min(self._left.values(), key=lambda block: block.start, default=None)

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(process, 0)
        for pipe in self._pipes:
            os.close(pipe)
        self._processes, self._pipes = [], {}

    def _complete(self, received: bytearray) -> Iterator[Reply]:
        while len(received) >= _REPLY.size:
            start, stop, length = _REPLY.unpack_from(received)
            if len(received) < _REPLY.size + length:
                return
            text = bytes(received[_REPLY.size : _REPLY.size + length])
            del received[: _REPLY.size + length]
            block = self._left.pop(start)
            if not length:
                yield Reply(block, {}, [self._expected] * (stop - start))
                continue
            unread, outcomes = json.loads(text)
            yield Reply(
                block,
                {int(index): reason for index, reason in unread.items()},
                [each if isinstance(each, str) else Decoded(*each) for each in outcomes],
            )


def _serve(work: Work, jobs: int, pipe: int, parent: int, expected: Decoded) -> None:
    """What a forked process does; it does not return."""
    status = 1
    try:
        gc.disable()  # objects of the parent's are none of its business
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then ends its processes
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        while (job := os.read(jobs, _JOB.size)) and os.getppid() == parent:
            start, stop = _JOB.unpack(job)
            unread, outcomes = work(range(start, stop))
            text = b""
            if unread or any(outcome != expected for outcome in outcomes):
                text = json.dumps([unread, outcomes]).encode()
            reply = memoryview(_REPLY.pack(start, stop, len(text)) + text)
            while reply:
                reply = reply[os.write(pipe, reply) :]
        status = 0
    finally:
        os._exit(status)
