"""Files and folders that appear under their names only when they are whole."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffmem.errors import InputError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, renamed to `path` (replacing it) at the end, removed on any exception."""
    with _beside(path) as partial:
        yield partial


def atomic_write(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 to `path`, replacing it, so that it is there whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to fill, renamed to `path` at the end, removed on any exception.

    Raises `InputError` where `path` exists already and is not an empty folder.
    """
    check_new_folder(path)
    with _beside(path) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def atomic_replacement(path: Path) -> Iterator[Path]:
    """A new folder to fill that takes the place of `path`, of which nothing is lost before; parents are made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    with _beside(path) as partial:
        partial.mkdir()
        yield partial


def check_output_folder(folder: str | os.PathLike) -> Path:
    """Make `folder` and see that files can be written there, before long work is done for it."""
    folder = Path(folder)
    probe = folder / ".diffmem-write-test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot write there ({error.strerror}): choose another output folder") from error
    return folder


def check_new_folder(path: Path) -> None:
    """Raises `InputError` where `path` exists already and is not an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path}: exists already: choose another name, or empty it first")


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    partial = path.parent / f".{path.name[:100]}.{secrets.token_hex(4)}.partial"
    try:
        yield partial
        _put_in_place(partial, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _put_in_place(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`; a folder that is there, which no rename replaces, is moved aside and then removed."""
    if not path.is_dir():
        os.replace(partial, path)
        return
    aside = partial.with_suffix(".old")
    os.replace(path, aside)
    try:
        os.replace(partial, path)
    except OSError:
        os.replace(aside, path)
        raise
    if aside.is_symlink():
        aside.unlink()
    else:
        shutil.rmtree(aside, ignore_errors=True)
