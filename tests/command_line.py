"""Command lines of diffmem in the process of the tests: what `python -m diffmem …` says and its exit status, without
the seconds that a new process takes to import PyTorch. Tests of signals, pipes and full disks start processes."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from subprocess import CompletedProcess

from diffmem.cli import main


def run(*arguments) -> CompletedProcess:
    """`diffmem *arguments`: `returncode`, and as text `stdout` and `stderr`, which are valid UTF-8."""
    words = [str(argument) for argument in arguments]
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            main(words)
        except SystemExit as end:
            status = end.code
    return CompletedProcess(words, status, *(stream.buffer.getvalue().decode() for stream in streams))
