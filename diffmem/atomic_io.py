"""Output that is complete or not there: files, folders and sets of files that appear in one step, and locks on output.

Everything is written beside its place, in a hidden folder `.<name>.<token>.partial` that its writer keeps locked, and
then renamed: a process may be killed at any moment. The next writer of the same name removes what dead ones left; a
lock tells a dead writer from a living one without clocks or process numbers, also across containers. Output through a
symbolic link goes where the link points. On file systems without locks nothing of others is removed or refused.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffmem import system
from diffmem.errors import InputError, OutputInUseError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LONGEST_NAME = 200  # bytes: file systems allow 255, and partial folders add some
_OLD, _COMMITTED = "old", "committed"


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """A path to write a file to that takes the place of `path` at the end, and is removed on any exception.

    durable: the file survives a power cut once this is over (fsync).
    """
    with _beside(Path(path)) as (partial, target):
        yield partial
        if target.exists() and not target.is_file():
            raise InputError(f"{path}: is {'a folder' if target.is_dir() else 'no file'}: choose another name")
        _keep_mode(partial, target)
        if durable:
            _sync(partial)
        os.replace(partial, target)
        if durable:
            _sync(target.parent)


def atomic_write(path: str | os.PathLike[str], text: str, *, durable: bool = True) -> None:
    """Writes `text` as UTF-8 to `path`, replacing it in one step; what UTF-8 cannot hold is written as an escape."""
    with atomic_file(path, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """A new folder to fill that becomes `path` at the end, and is removed on any exception.

    Raises `InputError` where `path` exists already and is not an empty folder.
    """
    check_new_folder(Path(path))
    with _new_folder(Path(path), durable) as partial:
        yield partial


@contextmanager
def atomic_replacement(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """A new folder to fill that takes the place of the folder `path`, of which nothing is lost before; parents are
    made."""
    target = output_path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    with _new_folder(Path(path), durable) as partial:
        yield partial


@contextmanager
def atomic_set(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder to write the files of a set into (a page and its tables), which then appear in `folder` together.

    `folder` is made if need be. A folder that holds nothing but an earlier set of these files is exchanged for the new
    one in one step (Linux, macOS), so that readers and killed writers see the old set or the new one. Where other
    things lie in it, or the system cannot exchange folders, the finished set is moved in file by file; what a killed
    writer had begun to move, the next one finishes first.
    """
    target = output_path(check_output_folder(folder))
    with output_lock(folder, wait=60.0), _errors_of(folder):
        _finish_move(target)
        with _staged(target) as stage:
            yield stage
            for file in os.listdir(stage):
                _keep_mode(stage / file, target / file)
            _sync_tree(stage)
            if not _exchanged_as_a_whole(stage, target):
                committed = target / f".{_COMMITTED}.{secrets.token_hex(4)}"
                if stage.parent.parent == target:
                    os.rename(stage, committed)
                else:
                    _move_into(stage, target, committed)
                _finish_move(target)
            _sync(target)


@contextmanager
def output_lock(path: str | os.PathLike[str], *, shared: bool = False, wait: float = 0.0) -> Iterator[None]:
    """Keeps other processes from writing to the file or folder `path` meanwhile. Locks of dead processes do not count.

    The folders above `path` are made. shared: others may hold it too, if all of them share it. wait: so many seconds
    for the other to end. The thread that holds a lock may take it again. Raises `OutputInUseError` where another
    process, or thread, holds it.
    """
    target = output_path(path)
    key, thread = str(target), threading.get_ident()
    if _held.get(key) == thread:
        yield
        return
    lock = _locked_file(Path(path), target, shared, time.monotonic() + wait)
    _held[key] = thread
    try:
        yield
    finally:
        _held.pop(key, None)
        if lock is not None:
            _unlock(*lock)


_held: dict[str, int] = {}  # outputs locked by this process, and by which of its threads


def output_path(path: str | os.PathLike[str]) -> Path:
    """Where output to `path` goes: the end of the symbolic links, which need not exist yet."""
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    return Path(os.path.realpath(path))


def check_output_folder(folder: str | os.PathLike[str]) -> Path:
    """Make `folder` and see that files can be written there, before long work is done for it."""
    folder, target = Path(folder), output_path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target).close()
    except OSError as error:
        raise InputError(f"{folder}: cannot write there ({error.strerror}): choose another output folder") from error
    return folder


def check_output_file(path: str | os.PathLike[str]) -> Path:
    """See that a file can be written at `path`, before long work is done for it; its folder is not made."""
    path, target = Path(path), output_path(path)
    if target.exists() and not target.is_file():
        raise InputError(f"{path}: is {'a folder' if target.is_dir() else 'no file'}: choose another name")
    if not target.parent.is_dir():
        raise InputError(f"{path}: cannot be written: there is no folder {target.parent}")
    try:
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror}): choose another output") from error
    return path


def check_new_folder(path: Path) -> None:
    """Raises `InputError` where `path` exists already and is not an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path}: exists already: choose another name, or empty the folder first")


def _keep_mode(partial: Path, target: Path) -> None:
    """A file that takes the place of another keeps its permissions; a new one has those of the umask."""
    with suppress(OSError):
        os.chmod(partial, stat.S_IMODE(os.stat(target).st_mode))


@contextmanager
def _errors_of(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


@contextmanager
def _beside(path: Path) -> Iterator[tuple[Path, Path]]:
    """(A path to write to, the path that it is to take)."""
    target = output_path(path)
    with _errors_of(path), _partial_folder(target.parent, target) as folder:
        yield folder / target.name, target


@contextmanager
def _new_folder(path: Path, durable: bool) -> Iterator[Path]:
    with _beside(path) as (partial, target):
        partial.mkdir()
        yield partial
        _keep_mode(partial, target)
        if durable:
            _sync_tree(partial)
        _put_folder_in_place(partial, target)
        if durable:
            _sync(target.parent)


@contextmanager
def _partial_folder(place: Path, target: Path) -> Iterator[Path]:
    """A new folder in `place` for what is to become `target`, locked as long as this lasts and then removed. Removes
    those that dead writers of `target` left."""
    _remove_dead(place, target)
    while True:
        folder = place / f".{_short(target.name)}.{secrets.token_hex(4)}.partial"
        folder.mkdir()
        handle = _opened(folder)
        # Between the two lines above another writer may have taken it for a dead one's.
        if handle is None or (_lock(handle) is not False and _is_at(handle, folder)):
            break
        os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def remove_dead(path: str | os.PathLike[str]) -> None:
    """Removes what writers of `path` that are no more left half-written beside it."""
    target = output_path(path)
    with _errors_of(path):
        _remove_dead(target.parent, target)


def _remove_dead(place: Path, target: Path) -> None:
    """Removes the partial folders (or files) in `place` of writers of `target` that are no more."""
    pattern = re.compile(rf"\.{re.escape(_short(target.name))}\.[0-9a-f]{{8}}\.partial", re.DOTALL)
    for name in os.listdir(place):
        if not pattern.fullmatch(name):
            continue
        partial = place / name
        handle = _opened(partial)
        if handle is None:
            continue
        with suppress(OSError):
            if _lock(handle):
                if (partial / _OLD).is_dir() and not target.exists():  # killed between two renames
                    os.rename(partial / _OLD, target)
                if partial.is_dir():
                    shutil.rmtree(partial, ignore_errors=True)
                else:
                    partial.unlink()
        os.close(handle)


def _put_folder_in_place(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; a folder that is there, which no rename replaces, is exchanged for it."""
    if not target.is_dir():
        if target.exists():
            raise InputError(f"{target}: exists already and is no folder: choose another name")
        os.rename(partial, target)
        return
    if _exchange(partial, target):
        return
    aside = partial.parent / _OLD
    os.replace(target, aside)
    try:
        os.replace(partial, target)
    except OSError:
        os.replace(aside, target)
        raise


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder to prepare a set for `target` in: beside it, or in it where nothing can be written beside it."""
    place = target.parent if os.access(target.parent, os.W_OK) and not os.path.ismount(target) else target
    with _partial_folder(place, target) as folder:
        stage = folder / target.name if target.name else folder / "set"
        stage.mkdir()
        yield stage


def _exchanged_as_a_whole(stage: Path, target: Path) -> bool:
    """Puts `stage` in the place of `target` where nothing else lies in there, and nobody stands in there."""
    there = os.stat(target)
    if stage.parent.parent == target or not set(os.listdir(target)) <= set(os.listdir(stage)):
        return False
    with suppress(OSError):
        here = Path.cwd()
        if target in (here, *here.parents):
            return False
    if hasattr(os, "geteuid") and there.st_uid != os.geteuid():
        return False  # the folder stays its owner's
    os.chmod(stage, stat.S_IMODE(there.st_mode))
    return _exchange(stage, target)


def _move_into(stage: Path, target: Path, committed: Path) -> None:
    """Brings `stage`, from beside `target` or another file system, into it under the name `committed`, in one step."""
    try:
        os.rename(stage, committed)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with _partial_folder(target, target) as inside:
            shutil.copytree(stage, inside / "set")
            _sync_tree(inside / "set")
            os.rename(inside / "set", committed)


def _finish_move(target: Path) -> None:
    """Moves complete sets that lie in the folder `target` to their places."""
    for name in sorted(os.listdir(target)):
        if re.fullmatch(rf"\.{_COMMITTED}\.[0-9a-f]{{8}}", name):
            for file in sorted(os.listdir(target / name)):
                os.replace(target / name / file, target / file)
            os.rmdir(target / name)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders in one step, where the system can."""
    names = (os.fsencode(one), os.fsencode(other))
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return library.renamex_np(*names, ctypes.c_uint(2)) == 0  # RENAME_SWAP
        return library.renameat2(-100, names[0], -100, names[1], ctypes.c_uint(2)) == 0  # AT_FDCWD, RENAME_EXCHANGE
    except (OSError, AttributeError, TypeError):
        return False


def _locked_file(path: Path, target: Path, shared: bool, until: float) -> tuple[int, Path] | None:
    """The lock file of an output, opened and locked; None where the file system has no locks."""
    while True:
        handle, file = _lock_file(path, target)
        held = _lock(handle, shared)
        if held and _is_at(handle, file):
            if not shared:
                with suppress(OSError):
                    os.truncate(handle, 0)
                    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return handle, file
        owner = ""
        with suppress(OSError):
            owner = system.read_at(handle, 200, 0).decode(errors="replace")
        os.close(handle)
        if held is None:
            with suppress(OSError):
                file.unlink()
            return None
        if held is False:
            if time.monotonic() > until:
                raise OutputInUseError(
                    f"{path}: {owner or 'another process'} is writing there: wait for it to end, or choose another "
                    "output"
                )
            time.sleep(0.05)


def _lock_file(path: Path, target: Path) -> tuple[int, Path]:
    failure: OSError | None = None
    with _errors_of(path):
        target.parent.mkdir(parents=True, exist_ok=True)
    # A mount point, or a folder in one that is read-only, may be all that can be written to.
    for file in (target.parent / f".{_short(target.name)}.lock", target / ".diffmem.lock"):
        for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):
            try:
                return os.open(file, flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0), 0o666), file
            except OSError as error:
                failure = failure or error
    reason = failure.strerror if failure is not None and failure.strerror else failure
    raise InputError(f"{path}: cannot be written: {reason}") from None


def _unlock(handle: int, file: Path) -> None:
    with suppress(OSError):
        # Of those who share a lock the last one removes its file.
        if _lock(handle) and _is_at(handle, file):
            file.unlink()
    os.close(handle)


def _lock(handle: int, shared: bool = False) -> bool | None:
    """Whether the open file or folder could be locked; None where that is not possible here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _opened(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _short(name: str) -> str:
    """A name that leaves room for what is added to it."""
    if len(os.fsencode(name)) <= _LONGEST_NAME:
        return name
    return f"{name[:30]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"


def _sync_tree(folder: Path) -> None:
    for place, _, files in os.walk(folder):
        for file in files:
            _sync(Path(place) / file)
        _sync(Path(place))


def _sync(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk."""
    handle = _opened(path)
    if handle is None:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        # Folders cannot be synchronized everywhere; a disk that is full or broken must be told of.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(handle)
