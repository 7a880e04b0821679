"""Options and kinds of arguments that several commands share."""

from __future__ import annotations

import re
from pathlib import Path

import click

from diffmem.errors import InputError

SETS = ("generated", "training", "holdout")

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


center_crop_option = click.option(
    "--center-crop", is_flag=True, help="Cut out the central square first, as ADM and EDM prepare images.",
)  # fmt: skip


class ValueRange(click.ParamType):
    """LOW,HIGH as a pair of floats; unless there is only one set, with the name of the set, or None: generated=-1,1."""

    name = "low,high"

    def __init__(self, one_set: bool = False):
        self.one_set = one_set

    def convert(self, value, parameter, context):
        from diffmem.data.value_range import check_value_range

        if not isinstance(value, str):
            return value
        which, equals, pair = value.rpartition("=")
        if equals and (self.one_set or which not in SETS):
            self.fail(f"{value!r}: before = stands one of {', '.join(SETS)}", parameter, context)
        try:
            low_high = check_value_range(pair.split(","))
        except InputError:
            self.fail(f"{value!r} is not LOW,HIGH, the values of black and white: -1,1 or 0,255", parameter, context)
        return low_high if self.one_set else (which or None, low_high)


def ranges_by_set(given: tuple[tuple[str | None, tuple[float, float]], ...]) -> dict[str, tuple[float, float]]:
    """What --value-range, given several times, says of each set; one for a single set goes before one for all."""
    everywhere = {which: pair for which, pair in given if which is None}
    by_set = dict.fromkeys(SETS, everywhere.get(None))
    by_set |= {which: pair for which, pair in given if which is not None}
    return {which: pair for which, pair in by_set.items() if pair is not None}


def with_options(message: str) -> str:
    """A library's message with the names of options in place of parameters: `resize=32` becomes `--resize 32`."""

    def by_set(match: re.Match) -> str:
        pairs = re.findall(r"'(\w+)': \(([^()]*)\)", match[1])
        return " ".join(f"--value-range {which}={pair.replace(' ', '')}" for which, pair in pairs)

    message = re.sub(r"\bvalue_range=\{([^{}]*)\}", by_set, message)
    message = re.sub(r"\bvalue_range=\(([^()]*)\)", lambda m: f"--value-range {m[1].replace(' ', '')}", message)
    message = re.sub(r"\b(center_crop|split_grid)=True", lambda m: f"--{m[1].replace('_', '-')}", message)
    return re.sub(
        r"\b(value_range|resize|color|duplicate_radius)=('?)([\w.]*)\2",
        lambda m: f"--{m[1].replace('_', '-')} {m[3]}".rstrip(),
        message,
    )
