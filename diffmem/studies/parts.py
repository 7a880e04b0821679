"""Parts of a setting that are stored as plain values (`Setting.watch`, `Setting.mixture`), as what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from diffmem.errors import InputError

Part = TypeVar("Part")


def part_of(kind: type[Part], values: Mapping[str, Any]) -> Part:
    """The part whose fields have these values; raises InputError for unknown and missing ones, and for wrong types."""
    name, known = kind.__name__.lower(), [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := [field for field in values if field not in known]:
        raise InputError(f"{name}: its fields are {', '.join(known)}, not {', '.join(unknown)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise InputError(f"{name}: a field is missing or of the wrong type ({error})") from None
