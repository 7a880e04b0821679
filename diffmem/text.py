"""Names of files and other text from elsewhere, as terminals, pages and spreadsheets may show them."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# Format characters that change nothing but how letters join; the others reorder text or hide in it.
_JOINERS = "\u200c\u200d"
_FORMULA = "=+-@\t\r\n\u2212\uff1d\uff0b\uff0d\uff20"


def printable(text: str, keep: str = "") -> str:
    """`text` with everything escaped that would not be seen, or would change how the rest is seen.

    Control characters, those that set the direction of writing, invisible ones, separators of lines and bytes that are
    no UTF-8 (`os.fsdecode` gives lone surrogates for them) become `\\n`, `\\x1b`, `\\u202e`, `\\xff`. keep: characters
    to leave as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if letter in keep else _shown(letter) for letter in text)


def _shown(letter: str) -> str:
    kind = unicodedata.category(letter)
    if kind not in ("Cc", "Cf", "Cs", "Zl", "Zp") or letter in _JOINERS:
        return letter
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"  # a byte of a file's name
    if letter in _ESCAPES:
        return _ESCAPES[letter]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 run", "2,000 runs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def cell(value: Any) -> Any:
    """A value for a CSV file: text is made printable, and text that spreadsheets would take for a formula begins with
    an apostrophe; numbers, and text that is one, stay as they are."""
    if not isinstance(value, str):
        return value
    shown = printable(value)
    if not value or (value[0] not in _FORMULA and value.lstrip()[:1] not in tuple("=+-@")) or _is_number(value):
        return shown
    return f"'{shown}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and "_" not in text and text == text.strip()


def write_table(file: TextIO, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Writes a CSV table; see `cell`. Open files with newline=""."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(cell, columns))
    writer.writerows(map(cell, row) for row in rows)


def write_columns(file: TextIO, columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes a CSV table that is given by its columns, by their names; text in them as it is: apply `cell` to what is
    not a number. Open files with newline=""."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(cell, columns))
    writer.writerows(zip(*columns.values(), strict=True))


def table(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A CSV table as text; see `cell`."""
    file = io.StringIO()
    write_table(file, columns, rows)
    return file.getvalue()
