"""JSON documents, read with a limit on their size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffmem.errors import InputError
from diffmem.inert.boundary import parsing

LARGEST = 2**27  # bytes; EDM's dataset.json of a million images takes 40 MB


def read_json(path: Path, advice: str = "") -> Any:
    """The value in the JSON file `path`; raises InputError, naming it, where it cannot be read or is none.

    Args:
        path: The file.
        advice: What to do where it is damaged, for the message.
    """
    with parsing(path, "a JSON document", advice):
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise InputError(f"{path}: more than {LARGEST >> 20} MB, too large for a JSON document" + _tail(advice))
        try:
            return json.loads(content)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not JSON ({error})" + _tail(advice)) from error


def _tail(advice: str) -> str:
    return f": {advice}" if advice else ""
