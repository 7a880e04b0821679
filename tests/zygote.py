"""`python -m module …` in forks of one process that has its imports behind it, for tests of programs that start many.

    python tests/zygote.py serve SOCKET module …                 imports the modules, and forks for each call
    python tests/zygote.py call SOCKET EXECUTABLE -m module …    the call: as `python -m module …`

`Zygote` starts the server, and writes an executable that stands for Python: it makes such calls, and is what
`sys.executable` names in them, so that what they start is forked too. What is no `-m` is left to Python itself.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


class Zygote:
    """The server, and `executable`, which stands for Python. A context manager."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]):
        self.folder = tempfile.TemporaryDirectory()  # whose name is short enough for a socket's
        self.socket, self.executable = (Path(self.folder.name, name) for name in ("socket", "python"))
        call = f'exec {sys.executable} -S -E {__file__} call {self.socket} {self.executable} "$@"'
        self.executable.write_text(f"#!/bin/sh\n{call}\n")
        self.executable.chmod(0o755)
        command = [sys.executable, __file__, "serve", str(self.socket), *modules]
        self.server = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)

    def __enter__(self) -> Zygote:
        while not self.socket.exists():
            assert self.server.poll() is None, "the server has ended"
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self.server.pid, signal.SIGKILL)  # and what it forked
        self.server.wait()
        self.folder.cleanup()


def serve(address: str, modules: list[str]) -> None:
    gc.disable()
    for module in modules:
        __import__(module)
    gc.freeze()  # what is imported is searched for garbage in no fork
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{address}.new")
        listening.listen(64)
        os.rename(f"{address}.new", address)
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                run(connection)
            connection.close()


def run(connection: socket.socket) -> None:
    """In a fork: the call that comes by `connection`, which is told the exit status."""
    import runpy
    import traceback

    text, (out, err), *_ = socket.recv_fds(connection, 2**20, 2)
    words, cwd, environment, executable = json.loads(text)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, received in ((1, out), (2, err)):
        os.dup2(received, number)
        os.close(received)
    sys.executable = executable
    sys.path[:0] = [cwd, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = ["-m", *words[1:]]

    def watch() -> None:
        connection.recv(1)  # whoever called is gone
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    status = 0
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(b"%d" % status)
    os._exit(status)


def call(address: str, executable: str, words: list[str]) -> int:
    if not words or words[0] != "-m":
        os.execv(sys.executable, [sys.executable, *words])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        text = json.dumps([words[1:], os.getcwd(), dict(os.environ), executable]).encode()
        socket.send_fds(connection, [text], [1, 2])
        return int(connection.recv(16) or b"139")  # nothing: it was killed


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], sys.argv[3:])
    sys.exit(call(sys.argv[2], sys.argv[3], sys.argv[4:]))
