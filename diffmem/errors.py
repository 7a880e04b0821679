"""Errors whose message is meant for the person at the keyboard: one line that names the culprit and the way out."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: what is wrong, in which file or argument, and what to do about it, in one line. A `ValueError`."""


class OutputInUseError(InputError):
    """Another process writes to this output."""


class MissingExtraError(ImportError):
    """An optional package is needed; the message names the extra that brings it. An `ImportError`.

    Args:
        package: The package's name.
        extra: The extra of diffmem that brings it.
        purpose: What needs it, as the beginning of the message.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install 'diffmem[{extra}]'")
