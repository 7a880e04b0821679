"""Options that several commands share."""

from __future__ import annotations

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
