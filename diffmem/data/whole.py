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
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, renamed to `path` (replacing it) at the end, removed on any exception."""
    with _beside(path) as partial:
        yield partial


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to fill, renamed to `path` at the end, removed on any exception.

    Raises `InputError` where `path` exists already and is not an empty folder.
    """
    check_new_folder(path)
    with _beside(path) as partial:
        partial.mkdir()
        yield partial


def check_new_folder(path: Path) -> None:
    """Raises `InputError` where `path` exists already and is not an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path}: exists already: choose another name, or empty it first")


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    partial = path.parent / f".{path.name[:100]}.{secrets.token_hex(4)}.partial"
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
