"""Options and kinds of arguments that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

_debug = False


def debugging() -> bool:
    """Whether --debug was given."""
    return _debug


def _set_debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    global _debug
    _debug = value or _debug


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_set_debug, is_eager=True, help="Show tracebacks of errors."
)


class Source(click.ParamType):
    """A path that exists, or a built-in set."""

    name = "source"

    def convert(self, value, parameter, context) -> str:
        if not str(value).startswith("builtin:") and not Path(value).exists():
            self.fail(f"{value} does not exist", parameter, context)
        return value
