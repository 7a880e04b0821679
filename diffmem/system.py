"""What POSIX systems have and Windows does not, each with its twin (tests/test_portability.py finds uses elsewhere)."""

import ctypes
import os
import signal
import sys
import threading
from typing import Any

# For `subprocess.Popen`: Ctrl-C reaches the parent only.
OWN_SESSION: dict[str, Any] = (
    {"creationflags": 0x200} if sys.platform == "win32" else {"start_new_session": True}  # CREATE_NEW_PROCESS_GROUP
)
_moving = threading.Lock()


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def running_processes() -> float | None:
    """How many processes of the machine ran or waited for a core over the last minute, on average; None: unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes of an open file from `offset` on, fewer at its end; its position stays what it was."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _moving:
        before = os.lseek(descriptor, 0, os.SEEK_CUR)
        try:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.read(descriptor, size)
        finally:
            os.lseek(descriptor, before, os.SEEK_SET)


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of Windows."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        *((f"unused{number}", ctypes.c_uint64) for number in range(6)),
    )


def physical_memory() -> int:
    """Bytes of memory of the machine."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # type: ignore[attr-defined,unused-ignore]
        raise OSError("Windows does not tell the size of the memory")
    return int(status.total)


def leave_interrupts_to_parent() -> None:
    """From now on an interrupt from the keyboard reaches the parent of this process only."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def parent_lives(parent: int) -> bool:
    """Whether process `parent`, which started this one by `multiprocessing`, is still there."""
    if sys.platform != "win32":
        return os.getppid() == parent
    import multiprocessing

    process = multiprocessing.parent_process()  # Windows keeps the number of a parent that is gone
    return process is not None and process.is_alive()


def end_myself() -> None:
    """What SIGTERM from outside does; Windows would end the process at once, without its handler."""
    if sys.platform != "win32":
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        signal.raise_signal(signal.SIGTERM)
