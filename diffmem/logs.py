"""Loggers under the name "diffmem", whose records hold no bytes that are no text, and nothing that a terminal obeys:
file names come from elsewhere."""

from __future__ import annotations

import logging
from typing import Any

from diffmem.text import printable


class _Logger(logging.LoggerAdapter):
    def log(self, level: int, msg: object, *args: object, **options: Any) -> None:
        if self.isEnabledFor(level):
            shown = (arg if isinstance(arg, int) else printable(str(arg)) for arg in args)
            self.logger.log(level, msg, *shown, **{**options, "stacklevel": options.get("stacklevel", 1) + 1})


def logger(name: str) -> logging.LoggerAdapter:
    """The logger of a module."""
    return _Logger(logging.getLogger(name), {})
