"""Loggers under the name "diffmem", whose records hold no bytes that are not text, and nothing that a terminal obeys:
file names come from elsewhere."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from diffmem.text import printable

if TYPE_CHECKING:
    Adapter = logging.LoggerAdapter[logging.Logger]
else:
    Adapter = logging.LoggerAdapter  # no generic before Python 3.11


class _Logger(Adapter):
    def log(self, level: int, msg: object, *args: object, **options: Any) -> None:
        if self.isEnabledFor(level):
            shown = (arg if isinstance(arg, int) else printable(str(arg)) for arg in args)
            self.logger.log(level, msg, *shown, **{**options, "stacklevel": options.get("stacklevel", 1) + 1})


def logger(name: str) -> Adapter:
    """The logger of a module."""
    return _Logger(logging.getLogger(name), {})
