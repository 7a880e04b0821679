"""The boundary around a parser: whatever goes wrong inside becomes one line that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffmem.errors import InputError


@contextmanager
def parsing(where: object, wanted: str, advice: str = "") -> Iterator[None]:
    """Turns any exception of the block into an InputError: "{where}: not {wanted} (…): {advice}".

    A parser of a damaged or forged file may fail in any way, so that no list of exceptions is complete. An InputError
    gets the file's name where it lacks it; KeyboardInterrupt and the like are no failures of a parser and pass.

    Args:
        where: The file, and what of it.
        wanted: What the block reads, with its article: "a complete .npy array".
        advice: What to do about it.
    """
    way_out = f": {advice}" if advice else ""
    try:
        yield
    except InputError as error:
        if str(where) in str(error):
            raise
        raise InputError(f"{where}: {error}") from error
    except MemoryError as error:
        raise InputError(f"{where}: does not fit in this machine's memory{way_out}") from error
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror or one_line(error)}){way_out}") from error
    except Exception as error:
        raise InputError(f"{where}: not {wanted} ({one_line(error)}){way_out}") from error


def one_line(error: BaseException) -> str:
    """An exception's own words, on one line of at most 200 characters."""
    try:
        text = " ".join(str(error)[:2000].split())
    except Exception:  # an exception whose words cannot be formatted, such as an integer of 5000 digits
        text = ""
    text = text or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def short(value: Any, length: int = 80) -> str:
    """A value of a foreign file for an error message: text and numbers as such, anything that nests by its type.

    Formatting a container would follow every reference in it: 150 bytes of a pickle can name 2^100 of them.
    """
    if isinstance(value, str | bytes):
        text = repr(value[:length])
    elif value is None or isinstance(value, bool | float):
        text = repr(value)
    elif isinstance(value, int):
        text = repr(value) if value.bit_length() <= 200 else f"a whole number of {value.bit_length()} bits"
    elif isinstance(value, list | tuple) and len(value) <= 16 and all(type(each) in _PLAIN for each in value):
        text = "[" + ", ".join(short(each, length // 4) for each in value) + "]"
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= length else text[: length - 1] + "…"


_PLAIN = (str, int, float, bool, type(None))
