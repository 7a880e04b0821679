"""Options and kinds of arguments that several commands share, and the names of options in messages.

The library's messages name its parameters ("pass resize=16"). `in_options` puts the flag of the command that runs in
their place ("pass --resize 16"), or, where this command has none, that of `diffmem dataset`, which brings any set into
the form that is asked for. So a message cannot name an option that the command lacks.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffmem.cli.distributed import is_first_rank
from diffmem.errors import InputError
from diffmem.text import printable

if TYPE_CHECKING:
    from diffmem.data import ImageSet
    from diffmem.data.load import Loading
    from diffmem.memorization import Gate

SETS = ("generated", "training", "holdout")
SOLVER = click.Choice(["heun", "unipc", "dpm++"])

_debug = False
_COMMAND = "diffmem.command"
_JUNIT = "diffmem.junit"

# The parameters that messages of the library name, and what the commands' own parameters for them are called.
NAMED_PARAMETERS = {
    "alarms": ("alarms",),
    "alpha": ("alpha",),
    "augment": ("augment",),
    "batch": ("batch",),
    "cells": ("cells",),
    "center_crop": ("center_crop",),
    "color": ("color",),
    "conditional": ("cond",),
    "criterion": ("criterion",),
    "data": ("data", "source"),
    "duplicate_radius": ("duplicate_radius",),
    "dimension": ("dimension",),
    "dtype": ("dtype",),
    "duration": ("duration",),
    "epochs": ("epochs",),
    "features": ("features",),
    "flip": ("flip",),
    "halflife_images": ("ema_halflife",),
    "holdout": ("holdout",),
    "images": ("images",),
    "images_per_second": ("images_per_second",),
    "index": ("index",),
    "key": ("key",),
    "labels": ("labels",),
    "layout": ("layout",),
    "limit": ("limit",),
    "measures": ("measures",),
    "memory": ("memory",),
    "metric": ("metric",),
    "precision": ("precision",),
    "preprocessing": ("preprocessing",),
    "protocol": ("ema_protocol",),
    "recall": ("recall",),
    "resize": ("resize", "resolution"),
    "resolution": ("resize", "resolution"),
    "restart": ("restart",),
    "retrain": ("retrain",),
    "resume": ("resume",),
    "rule": ("rule", "ema_rule"),
    "second": ("second",),
    "second_look": ("no_second_look",),
    "size": ("size",),
    "skip_bad": ("skip_bad",),
    "snapshot_images": ("snapshot_images",),
    "split_grid": ("split_grid",),
    "target": ("ema_target",),
    "threshold": ("threshold",),
    "value_range": ("value_range",),
    "verify": ("verify",),
    "weights": ("weights",),
    "workers": ("workers",),
}
_NAMED = re.compile(rf"\b({'|'.join(NAMED_PARAMETERS)})=('[^']*'|\"[^\"]*\"|…|\([^()]*\)|\{{[^{{}}]*\}}|[\w.]*)")

# "lr is nan, but must be …"
_REFUSED = re.compile(r"(?<![\w.`'/=-])([a-z][a-z_]*) is (?=[^:;]{1,200}?, but must\b)")


def in_options(message: str, command: click.Command | None) -> str:
    """`message` with the flags of `command` in place of the library's parameters."""

    def flag(match: re.Match) -> str:
        name, value = match[1], match[2].strip("'\"")
        if name == "labels" and value == "true" and _flag(command, "conditional") is not None:
            name = "conditional"  # that is how the command asks for them
        own, of = _flag(command, name), ""
        if own is None:
            from diffmem.cli.dataset import dataset_command

            own = _flag(dataset_command, name)
            if own is None:
                return match[0]
            of = " of `diffmem dataset`"
        option, metavar = own
        if metavar is None:
            return option + of
        by_set = re.findall(r"'(\w+)': \(([^()]*)\)", value)  # {'generated': (0, 1)}
        values = [f"{which}={pair}" for which, pair in by_set] or [metavar if value == "…" else value.strip("()")]
        return " ".join(f"{option} {each.replace(', ', ',')}".rstrip() for each in values) + of

    def refused(match: re.Match) -> str:
        own = _flag(command, match[1])
        return match[0] if own is None else f"{own[0]} is "

    return _NAMED.sub(flag, _REFUSED.sub(refused, message))


def _flag(command: click.Command | None, name: str) -> tuple[str, str | None] | None:
    """The option of `command` for the library's parameter `name`, and the word for its value where it takes one."""
    for parameter in () if command is None else command.params:
        if isinstance(parameter, click.Option) and parameter.name in NAMED_PARAMETERS.get(name, (name,)):
            option = next((text for text in parameter.opts if text == f"--{name}"), parameter.opts[0])
            number = isinstance(parameter.type, (click.types.IntParamType, click.types.FloatParamType))
            metavar = (parameter.metavar or ("N" if number else parameter.type.name)).split("|")[0].upper()
            return option, None if parameter.is_flag else metavar
    return None


def running_command(context: click.Context) -> click.Command | None:
    """The command that runs, or ran last, in `context` or below it."""
    return context.meta.get(_COMMAND)


def in_own_options(message: str) -> str:
    """`message` with the flags of the command that runs."""
    context = click.get_current_context(silent=True)
    return in_options(message, None if context is None else running_command(context))


@contextmanager
def without_collector() -> Iterator[None]:
    """No garbage collection within the block: imports and lists of files make objects by the hundred thousand that all
    stay, and the collector would look at them again and again (a tenth of the time of importing PyTorch)."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def decoded_meanwhile(
    sources: Mapping[str, str | None], given: Callable[[str], dict[str, Any]]
) -> Iterator[dict[str, Loading]]:
    """The sources of a command, which are decoded, or their cached copies checked, while the block imports PyTorch;
    `result` then gives the images.

    sources: by their names; None where there is none. given: a source's options of `load_images`.
    """
    from diffmem.data import decode_forks
    from diffmem.data.load import Loading

    with ExitStack() as cleanup:
        with decode_forks.allowed(), without_collector():
            loading = {
                name: cleanup.enter_context(closing(Loading(source, **given(name))))
                for name, source in sources.items()
                if source is not None
            }
        for each in loading.values():
            each.check_meanwhile()
        yield loading


def say_notes(sets: Iterable[ImageSet | None], first_rank: bool = True) -> None:
    """Prints the notes of image sets, each once, on standard error."""
    for note in dict.fromkeys(note for images in sets if images is not None for note in images.notes):
        if first_rank:
            click.echo(f"note: {printable(in_own_options(note))}", err=True)


def debugging() -> bool:
    """Whether --debug was given."""
    return _debug


def _set_debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    global _debug
    _debug = value or (
        _debug and context.parent is not None
    )  # the outermost command is parsed first: a new command line
    context.meta[_COMMAND] = context.command  # the innermost one parses last


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_set_debug,
    is_eager=True,
    help="Show the tracebacks of errors.",
)


class CommandWithJson(click.Command):
    """A command whose --json may be followed by "full" or by nothing: `--json`, `--json full`, `--json=full`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        joined: list[str] = []
        waiting = list(args)
        while waiting:
            word = waiting.pop(0)
            if word == "--":
                joined += [word, *waiting]
                break
            if word == "--json":
                asked = waiting.pop(0) if waiting and waiting[0] in JSON_KINDS else JSON_KINDS[0]
                word = f"--json={asked}"
            joined.append(word)
        return super().parse_args(ctx, joined)


JSON_KINDS = ("summary", "full")


def json_option(of: str, full: str = "") -> Callable[[Callable], Callable]:
    """--json of a `CommandWithJson`.

    of: what is printed. full: what `--json full` adds, where it adds something.
    """
    return click.option(
        "--json", "as_json", type=click.Choice(JSON_KINDS), metavar="[full]" if full else "",
        help=f"Print only JSON on standard output: {of}" + (f"; full: {full}." if full else "."),
    )  # fmt: skip


def moved_option(name: str, line: str, flag: bool = False) -> Callable[[Callable], Callable]:
    """An option that was renamed or removed: giving it is an error with this line."""

    def refuse(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value:
            raise click.UsageError(f"{name}: {line}")

    kind = {"is_flag": True} if flag else {"metavar": "…"}
    variable = f"moved_{name.strip('-').replace('-', '_')}"
    return click.option(
        name, variable, hidden=True, expose_value=False, is_eager=True, callback=refuse, **kind
    )  # fmt: skip


class AutoOnOff(click.Choice):
    """auto, on or off; "yes" and "no" are understood too."""

    def __init__(self) -> None:
        super().__init__(["auto", "on", "off"])

    def convert(self, value, parameter, context) -> str:
        return super().convert({"yes": "on", "no": "off"}.get(value, value), parameter, context)


class Share(click.FloatRange):
    """A number from 0 to 1."""

    name = "share"

    def __init__(self) -> None:
        super().__init__(0, 1)

    def convert(self, value, parameter, context) -> float:
        share = super().convert(value, parameter, context)
        if share != share:
            self.fail(f"{value} is not a share", parameter, context)
        return share


_GATE_OPTIONS = [
    click.option(
        "--fail-above", type=Share(), metavar="SHARE",
        help="Gate: closed (status 3) if the lower end of the 95 % interval is above SHARE, otherwise passed (0), even "
        "if there are too few images to tell.",
    ),
    click.option(
        "--require-below", type=Share(), metavar="SHARE",
        help="Gate: passed (status 0) if the upper end of the 95 % interval is below SHARE, closed (3) if the lower "
        "end is not, undecided (4) in between.",
    ),
    click.option(
        "--max-copies", type=click.IntRange(min=0), metavar="N",
        help="Gate: closed (status 3) if more than N images are copies.",
    ),
    click.option(
        "--junit", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", expose_value=False,
        callback=lambda context, parameter, path: context.meta.__setitem__(_JUNIT, path),
        help="Write the gate's decision as JUnit XML, which CI systems show among test results.",
    ),
]  # fmt: skip


criterion_option = click.option(
    "--criterion", metavar="NAME",
    help="By which images are copies: ratio, calibrated_l2, tile_max, authenticity, m3 or three_phases "
    "(diffmem measure --list).  [default: ratio]",
)  # fmt: skip


def gate_options(command: Callable) -> Callable:
    """Gives a command --fail-above, --require-below, --max-copies and --junit; see `limits_of` and `tell_gate`."""
    for option in reversed(_GATE_OPTIONS):
        command = option(command)
    return command


def limits_of(fail_above: float | None, require_below: float | None, max_copies: int | None) -> dict[str, Any]:
    """The limits that were given, as `Audit.gate` takes them; empty where there is no gate."""
    given = {"fail_above": fail_above, "require_below": require_below, "max_copies": max_copies}
    limits = {name: limit for name, limit in given.items() if limit is not None}
    if (path := _junit_file()) is not None:
        from diffmem.atomic_io import check_output_file

        if not limits:
            raise click.UsageError("--junit writes a gate's decision: also give --require-below or another limit")
        if is_first_rank():
            check_output_file(path)
    return limits


def _junit_file() -> Path | None:
    return click.get_current_context().meta.get(_JUNIT)


def flag_of(name: str) -> str:
    """The command line's name of a parameter."""
    return f"--{name.replace('_', '-')}"


def tell_gate(gate: Gate | None) -> int:
    """Prints a gate's decision on standard error unless it passed, writes the file of --junit in any case, and returns
    the exit status."""
    if gate is None:
        return 0
    if (path := _junit_file()) is not None:
        gate.save_junit(path, f"diffmem {click.get_current_context().info_name}")
    if not gate.passed:
        click.echo(printable(in_own_options(str(gate))), err=True)
    return gate.status


def reserve_output(path: Path) -> None:
    """Locks an output, for the first rank, until the command ends."""
    from diffmem.atomic_io import output_lock

    if is_first_rank():
        click.get_current_context().with_resource(output_lock(path))


def reserve_report(folder: Path | None) -> None:
    """Locks the folder of a report, if there is to be one, and checks before long work that it can be written to."""
    from diffmem.atomic_io import check_output_folder

    if folder is not None and is_first_rank():
        check_output_folder(folder)
        reserve_output(folder)


class Source(click.ParamType):
    """A path that exists, or a built-in set. as_given: a home folder (~) that the shell has left stays what it is, so
    that names of runs do not depend on whose it is; it is looked up where images are read."""

    name = "source"

    def __init__(self, as_given: bool = False) -> None:
        self.as_given = as_given

    def convert(self, value, parameter, context) -> str:
        # What the reader looks for itself: a built-in set, a dataset of Hugging Face's library, a range of shards.
        named = str(value).startswith(("builtin:", "hf:")) or "{" in str(value)
        if named:
            return value
        path = os.path.expanduser(value)
        if not os.path.exists(path):
            self.fail(f"{value} does not exist", parameter, context)
        return value if self.as_given else path


class StreamedSource(Source):
    """The same, or a URL, or a glob: what an index is built from."""

    def convert(self, value, parameter, context) -> str:
        if "://" in str(value) or any(sign in str(value) for sign in "*["):
            return str(value)
        return super().convert(value, parameter, context)


class Checkpoint(click.ParamType):
    """What `diffmem.models.load` reads: a path that exists, alone or behind "diffusers:"."""

    name = "path"

    def convert(self, value, parameter, context) -> Path:
        if not Path(str(value).removeprefix("diffusers:")).exists():
            self.fail(f"{str(value)!r} does not exist", parameter, context)
        return Path(value)


holdout_option = click.option(
    "--holdout", type=Source(), help="Real images that the model has not seen; they give the rule's false-alarm rate."
)


def size_option(more: str = "") -> Callable[[Callable], Callable]:
    """--size. more: for the help."""
    help = f"A class-balanced subset of N images{more}."
    return click.option("--size", type=click.IntRange(min=1), metavar="N", help=help)


def resize_option(*names: str, more: str = "") -> Callable[[Callable], Callable]:
    """--resize, also under other names. more: for the help."""
    help = "Resize all images to R x R, with antialiasing." + more
    return click.option("--resize", *names, type=click.IntRange(min=1), metavar="R", help=help)


def confidence_option(more: str) -> Callable[[Callable], Callable]:
    """--confidence. more: which answer it is of, for the help."""
    return click.option(
        "--confidence", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.95, show_default=True,
        help=f"Confidence of the answer: {more}.",
    )  # fmt: skip


center_crop_option = click.option(
    "--center-crop", is_flag=True, help="Crop the central square first, as ADM and EDM do.",
)  # fmt: skip


class ValueRange(click.ParamType):
    """LOW,HIGH as a pair of floats; unless there is only one set, with the name of the set, or None: generated=-1,1."""

    name = "low,high"

    def __init__(self, one_set: bool = False) -> None:
        self.one_set = one_set

    def convert(self, value, parameter, context):
        from diffmem.data.value_range import check_value_range

        if not isinstance(value, str):
            return value
        which, equals, pair = value.rpartition("=")
        if equals and (self.one_set or which not in SETS):
            self.fail(f"{value!r}: must be SET=LOW,HIGH, where SET is one of {', '.join(SETS)}", parameter, context)
        try:
            low_high = check_value_range(pair.split(","))
        except InputError:
            self.fail(f"{value!r} is not LOW,HIGH, the values of black and white: -1,1 or 0,255", parameter, context)
        return low_high if self.one_set else (which or None, low_high)


def value_range_option(more: str, **settings: Any) -> Callable[[Callable], Callable]:
    """--value-range; settings: `multiple`, or of one set. more: for the help."""
    several = settings.get("multiple", False)
    return click.option(
        "--value-range", type=ValueRange(one_set=not several), metavar="LOW,HIGH", **settings,
        help=f"The values of black and white in float images, such as -1,1 or 0,1: {more}.",
    )  # fmt: skip


def ranges_by_set(given: tuple[tuple[str | None, tuple[float, float]], ...]) -> dict[str, tuple[float, float]]:
    """What --value-range, given several times, says of each set; one for a single set goes before one for all."""
    everywhere = {which: pair for which, pair in given if which is None}
    by_set = dict.fromkeys(SETS, everywhere.get(None))
    by_set |= {which: pair for which, pair in given if which is not None}
    return {which: pair for which, pair in by_set.items() if pair is not None}


class Color(click.Choice):
    """gray or rgb; "grey" is understood too."""

    def __init__(self) -> None:
        super().__init__(["gray", "rgb"])

    def convert(self, value, parameter, context) -> str:
        chosen = super().convert("gray" if value == "grey" else value, parameter, context)
        return "grey" if chosen == "gray" else chosen  # as runs and studies have recorded it


class PerSource(click.ParamType):
    """A value for all sources of a command, or SOURCE=VALUE for one of them: (source or None, value)."""

    def __init__(self, sources: tuple[str, ...], choices: tuple[str, ...] = ()) -> None:
        self.sources, self.choices = sources, choices
        self.name = "|".join(choices) or "name"

    def convert(self, value, parameter, context) -> tuple[str | None, str]:
        if isinstance(value, tuple):
            return value
        source, equals, rest = value.partition("=")
        if not (equals and source in self.sources):
            source, rest = None, value
        if self.choices and rest.lower() not in self.choices:
            self.fail(f"{rest!r} is not one of {', '.join(self.choices)}", parameter, context)
        return source, rest


def reading_options(*sources: str, color: bool = True) -> Callable[[Callable], Callable]:
    """Gives a command the options that say how images are read; see `reading` for what they amount to.

    sources: what the sources are called, where there are several: --key and --layout can then differ between them.
    color: False where the command has --color already.
    """
    each = f" For one of several sources: {sources[0]}=…; may be repeated." if sources else ""
    options = [
        click.option("--color", type=Color(), help="Convert all images to gray or to RGB."),
        click.option(
            "--alpha", type=click.Choice(["drop", "white", "black"]),
            help="Transparent images: drop the alpha channel, or composite onto white or black.",
        ),
        click.option(
            "--key", type=PerSource(sources), multiple=True, metavar="NAME",
            help="The array with the images in an .npz, .pt or .safetensors file, the split of a saved data set, or "
            "train, test or all of CIFAR-10's archive." + each,
        ),
        click.option(
            "--layout", type=PerSource(sources, ("nchw", "nhwc")), multiple=True, metavar="nchw|nhwc",
            help="Axis order of an array, if its shape is ambiguous." + each,
        ),
        click.option("--skip-bad", is_flag=True, help="Skip files that cannot be read; they are counted and listed."),
    ]  # fmt: skip

    def decorate(command: Callable) -> Callable:
        for option in reversed(options if color else options[1:]):
            command = option(command)
        return command

    return decorate


def reading(source: str | None = None, *, color, alpha, key, layout, skip_bad, **_: Any) -> dict[str, Any]:
    """Arguments of `diffmem.load_images` from the options of `reading_options`, for the source of that name."""
    layout = _value(layout, source)
    return {
        "color": color,
        "alpha": alpha,
        "key": _value(key, source),
        "layout": None if layout is None else layout.upper(),
        "skip_bad": skip_bad,
    }


def _value(given: tuple[tuple[str | None, str], ...], source: str | None) -> str | None:
    """What was given for `source`, or else for all sources; the last of several."""
    for_all = [value for name, value in given if name is None]
    own = [value for name, value in given if name == source and name is not None] or for_all
    return own[-1] if own else None
