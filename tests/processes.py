"""Processes of their own for tests of signals, pipes, kills and ranks, without the seconds that each would take to
import PyTorch: forks of one server per process of pytest, which has imported it.

What must be seen from a fresh interpreter (imports, hash seeds, memory, preloaded libraries) is started by subprocess.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import IO

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([
    "diffmem.cli", "diffmem.optimum", "diffmem.training", "diffmem.studies", "diffmem.memorization.report",
    "torch.distributed", "sklearn.datasets", "matplotlib.figure", "tests.frozen",
])  # fmt: skip


class Started:
    """A process that runs `function(*arguments)`, and is killed at the end of its `with`.

    What it writes to its streams is kept in files, or goes to the file descriptor that is given. Its exit status is
    Python's, or minus a signal's number.

    Args:
        function: Of a module, so that it can be pickled.
        arguments: Of the function.
        env: Added to this process's environment; OMP_NUM_THREADS is obeyed though PyTorch is loaded by then.
        cwd: Where it runs.
        stdout: A file descriptor in place of a file that is read afterwards.
    """

    def __init__(
        self,
        function: Callable[..., object],
        arguments: Sequence[object] = (),
        env: Mapping[str, str] = {},
        cwd: str | Path | None = None,
        stdout: int | None = None,
    ):
        self._files = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115 (closed at exit)
        streams = [_Sent(file.fileno()) for file in self._files]
        if stdout is not None:
            streams[0] = _Sent(stdout)
        work = (function, arguments, {**os.environ, **env}, str(cwd or os.getcwd()), *streams)
        self._process = _CONTEXT.Process(target=_child, args=work)
        self._process.start()
        self.pid = self._process.pid

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_) -> None:
        if self.poll() is None:
            self._process.kill()
        self._process.join()
        for file in self._files:
            file.close()

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Standard output and error, once it has ended."""
        self._process.join(timeout)
        if self.poll() is None:
            self._process.kill()
            raise TimeoutExpired(str(self._process), timeout, *map(_read, self._files))
        out, err = map(_read, self._files)
        return out, err


class _Sent:
    """A file descriptor that a process gets with its arguments: a number of its own there."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self) -> tuple:
        return _received, (DupFd(self.number),)


def _received(sent) -> int:
    return sent.detach()


def _read(file: IO[bytes]) -> str:
    return Path(file.name).read_text(encoding="utf-8")


def _child(
    function: Callable, arguments: Sequence, environment: Mapping[str, str], cwd: str, stdout: int, stderr: int
) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    for number, received in ((1, stdout), (2, stderr)):
        os.dup2(received, number)
        os.close(received)
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115 (until it ends)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    function(*arguments)


def _command(*words: str) -> None:
    from diffmem.cli import main

    sys.argv = ["diffmem", *words]
    main()


def _script(code: str, *words: str) -> None:
    sys.argv = ["-c", *words]
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})


def start_command(*words, **options) -> Started:
    """`diffmem *words`."""
    return Started(_command, [str(word) for word in words], **options)


def start_script(code: str, *words, **options) -> Started:
    """`python -c code *words`."""
    return Started(_script, [code, *map(str, words)], **options)


def finished(process: Started, timeout: float = 120) -> CompletedProcess:
    """What became of a process, once it has ended."""
    with process:
        out, err = process.communicate(timeout)
    return CompletedProcess([], process.returncode, out, err)


def free_port() -> int:
    """A port of this machine at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def as_ranks(count: int, start: Callable[..., Started], *words, timeout: float = 240, **options) -> CompletedProcess:
    """`start(*words)` in `count` processes that know each other as those of torchrun do: the first rank's output, all
    ranks' errors, and the first exit status that is not 0."""
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}  # fmt: skip
    ranks = [
        start(*words, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **options) for rank in range(count)
    ]
    done = [finished(each, timeout) for each in ranks]
    status = next((each.returncode for each in done if each.returncode), 0)
    return CompletedProcess([], status, done[0].stdout, "".join(each.stderr for each in done))
