"""What a command shares with the shell around it: signals that end it, and output that somebody may have stopped to
read."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TextIO

from diffmem.text import printable

_ENDING = ("SIGTERM", "SIGHUP")
_DELIVERIES = 2.0  # seconds in which the same signal may come from several senders
_COLOR = re.compile(r"(\x1b\[[0-9;]*m)")


class TerminatedError(KeyboardInterrupt):
    """A signal asks the process to end. What an interrupt from the keyboard saves, this saves too."""


class Ending:
    """number: of the signal that asked the command to end; None while there was none."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.asked = -_DELIVERIES

    def __call__(self, number: int, frame: object) -> None:
        now, before = time.monotonic(), self.asked
        self.number, self.asked = number, now
        # A second delivery must not interrupt the saving that the first one began.
        if now - before >= _DELIVERIES:
            raise TerminatedError


@contextmanager
def signals() -> Iterator[Ending]:
    """SIGTERM and SIGHUP end the command as an interrupt from the keyboard does, unless they are ignored (nohup)."""
    ending, before = Ending(), {}
    if threading.current_thread() is threading.main_thread():
        for name in _ENDING:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, ending)
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Output(io.TextIOWrapper):
    """Standard output or standard error: nothing in a name can hide or rearrange what is printed, letters that the
    encoding lacks are escaped, and a reader that goes away (`| head`) does not end the work."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(
            stream.buffer, encoding=stream.encoding or "utf-8", errors="backslashreplace",
            line_buffering=bool(stream.line_buffering),
        )  # fmt: skip
        self.stream = stream

    @property
    def rich_proxied_file(self) -> TextIO:
        """What rich writes to, whose progress bars move the cursor."""
        return self.stream

    def write(self, text: str) -> int:
        if not text.isascii() or not text.isprintable():
            pieces = _COLOR.split(text) if self.isatty() else [text]
            text = "".join(piece if place % 2 else printable(piece, "\n\t") for place, piece in enumerate(pieces))
        with self._reader_may_go():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._reader_may_go():
            super().flush()

    @contextmanager
    def _reader_may_go(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self.discard()

    def discard(self) -> None:
        """What is still to be written goes nowhere, and Python has nothing to complain about at exit."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


@contextmanager
def output() -> Iterator[None]:
    """Standard output and error as `Output`."""
    with ExitStack() as stack:
        for name in ("stdout", "stderr"):
            if hasattr(getattr(sys, name), "buffer"):  # None where it is closed
                stack.enter_context(_replaced(name))
        yield


@contextmanager
def _replaced(name: str) -> Iterator[None]:
    stream: Any = getattr(sys, name)
    stream.flush()
    replacement = Output(stream)
    setattr(sys, name, replacement)
    try:
        yield
    finally:
        setattr(sys, name, stream)
        try:
            replacement.flush()
        except OSError:
            # The command has said by now that it could not write.
            with suppress(OSError):
                replacement.discard()
        replacement.detach()
