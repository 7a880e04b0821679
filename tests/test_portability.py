"""No call that only POSIX systems have outside of `diffmem.system`, unguarded; and what Windows gets instead."""

import ast
import ctypes
import os
import types
from pathlib import Path

import pytest

from diffmem import system

ROOT = Path(__file__).parents[1]
POSIX_MODULES = {"crypt", "fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
POSIX = {
    "os": {
        "chown", "chroot", "ctermid", "fchmod", "fchown", "fork", "forkpty", "getegid", "geteuid", "getgid",
        "getgroups", "getloadavg", "getpgid", "getpgrp", "getpriority", "getresuid", "getsid", "getuid", "initgroups",
        "killpg", "lchown", "lockf", "major", "makedev", "memfd_create", "minor", "mkfifo", "mknod", "nice",
        "openpty", "pathconf", "posix_fadvise", "posix_fallocate", "posix_spawn", "pread", "preadv", "pwrite",
        "pwritev", "readv", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "sched_yield", "sendfile",
        "setpgid", "setpriority", "setsid", "setuid", "statvfs", "sync", "sysconf", "tcgetpgrp", "uname", "wait",
        "wait3", "wait4", "waitid", "writev", "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC",
        "WNOHANG",
    },
    "signal": {
        "SIGALRM", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGTSTP", "SIGUSR1",
        "SIGUSR2", "alarm", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "siginterrupt", "sigwait",
    },
    "socket": {"AF_UNIX", "socketpair"},
    "time": {"clock_gettime", "tzset"},
}  # fmt: skip
# Each asks before (hasattr, an import that may fail, the platform), or is of one system.
GUARDED = {
    "diffmem/system.py": {"os.getloadavg", "os.pread", "os.sched_getaffinity", "os.setpgid", "os.sysconf"},
    "diffmem/atomic_io.py": {"fcntl", "os.geteuid"},
    "diffmem/data/storage.py": {"os.posix_fallocate"},
    "diffmem/data/decode_forks.py": {"os.fork", "signal.SIGHUP", "signal.SIGKILL"},  # can_fork: Linux
    "diffmem/indexes/planning.py": {"os.sysconf"},  # of /proc
    "benchmarks/load.py": {"os.sched_getaffinity", "os.sysconf"},  # of /proc
    "benchmarks/gpu/build.py": {"os.sched_getaffinity"},
    "benchmarks/gpu/runner.py": {"os.sched_getaffinity"},
}


def posix_only(source: str) -> set[str]:
    """Modules that are imported and attributes that are used which Windows lacks; those asked for by name are not."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & POSIX_MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} & POSIX_MODULES
            found |= {f"{node.module}.{alias.name}" for alias in node.names if alias.name in POSIX.get(node.module, ())}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in POSIX.get(node.value.id, ()):
                found.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg == "preexec_fn":
            found.add("preexec_fn")
    return found


def test_no_posix_call_without_its_twin():
    files = [path for room in ("diffmem", "benchmarks") for path in (ROOT / room).rglob("*.py")] + [ROOT / "setup.py"]
    found = {path.relative_to(ROOT).as_posix(): posix_only(path.read_text("utf-8")) for path in files}
    assert {name: used for name, used in found.items() if used} == GUARDED
    source = "import fcntl\nfrom os import fork\nos.pread\ngetattr(os, 'nice')"
    assert posix_only(source) == {"fcntl", "os.fork", "os.pread"}


def test_reading_without_pread(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(range(200)))
    wanted = {(5, 190): bytes(range(190, 195)), (50, 190): bytes(range(190, 200)), (3, 0): b"\0\1\2", (1, 300): b""}
    with open(tmp_path / "file", "rb", buffering=0) as file:
        file.seek(7)
        assert {place: system.read_at(file.fileno(), *place) for place in wanted} == wanted
        monkeypatch.delattr(os, "pread", raising=False)
        assert {place: system.read_at(file.fileno(), *place) for place in wanted} == wanted
        assert file.tell() == 7


def test_memory_of_windows(monkeypatch):
    def status(pointer):
        assert pointer._obj.length == 64  # what Windows expects
        pointer._obj.total = 3 * 2**30
        return answers

    assert system.physical_memory() > 2**28
    answers = 1
    monkeypatch.delattr(os, "sysconf", raising=False)
    kernel = types.SimpleNamespace(kernel32=types.SimpleNamespace(GlobalMemoryStatusEx=status))
    monkeypatch.setattr(ctypes, "windll", kernel, raising=False)
    assert system.physical_memory() == 3 * 2**30
    answers = 0
    with pytest.raises(OSError, match="size of the memory"):
        system.physical_memory()
