"""The command line: `diffmem …`. Thin: it parses, calls the public functions and prints."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import traceback
from typing import Any

import click

import diffmem
from diffmem.cli.audit import audit_command
from diffmem.cli.dataset import dataset_command
from diffmem.cli.demo import demo_command
from diffmem.cli.distributed import is_first_rank
from diffmem.cli.emm import emm_command
from diffmem.cli.index import index_command
from diffmem.cli.info import info_command
from diffmem.cli.measure import measure_command
from diffmem.cli.optimum import optimum_command
from diffmem.cli.options import debug_option, debugging, in_options, running_command
from diffmem.cli.sample import import_edm_command, sample_command
from diffmem.cli.study import study_command
from diffmem.cli.terminal import Ending, output, signals
from diffmem.cli.train import train_command
from diffmem.cli.trajectory import trajectory_command
from diffmem.errors import InputError, MissingExtraError
from diffmem.text import printable

FAILURE, USAGE, INTERRUPTED = 1, 2, 130


class _Commands(click.Group):
    """Translates the library's errors into the command line's terms."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except InputError as error:
            error.args = (in_options(str(error), running_command(context)),)
            raise


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(diffmem.__version__, prog_name="diffmem")
@debug_option
def cli() -> None:
    """Measure, reproduce and study memorization in diffusion models.

    \b
    Start here:
      diffmem audit samples/ training.zip --out report   which of these images are copies?
      diffmem measure samples/ training.zip              what every measure of copying says of them
      diffmem sample model/ --out samples.npz            images from a checkpoint
      diffmem demo                                       see it work on real digits
    """


for command in (
    audit_command,
    measure_command,
    dataset_command,
    train_command,
    trajectory_command,
    emm_command,
    study_command,
    sample_command,
    optimum_command,
    import_edm_command,
    demo_command,
    index_command,
    info_command,
):
    cli.add_command(command)


def main(args: list[str] | None = None) -> None:
    """Entry point: runs a command and turns every error into one line and an exit status.

    0 success, 1 failure, 2 wrong usage, 3 a gate closed, 4 a gate is undecided, 130 interrupted, 143 ended by SIGTERM
    (129 by SIGHUP; `diffmem train`, which then finishes its step and saves, gives 130).
    """
    with output(), signals() as ending:
        status = _run(args, ending)
        if status == INTERRUPTED and ending.number is not None:
            status = 128 + ending.number
    if status >= 128:
        # CPython ends a process by SIGINT, whatever its exit status, when an interrupt once passed through an exec()
        # (as those of dataclasses during an import). So it is ended here, after what is owed at exit is done.
        atexit._run_exitfuncs()
        _flush()
        os._exit(status)
    if args is None and "triton" not in sys.modules:  # whose bindings would report all that is not collected as a leak
        gc.freeze()  # at exit the collector would look at every object of PyTorch's modules once more
    sys.exit(status)


def _run(args: list[str] | None, ending: Ending) -> int:
    try:
        status = cli.main(args=args, prog_name="diffmem", standalone_mode=False) or 0
        _flush()
        return status
    except (click.Abort, KeyboardInterrupt) as interrupt:
        return _interrupted(str(interrupt.__cause__ or interrupt))  # what click made an Abort of
    except click.UsageError as error:
        error.show()
        return USAGE
    except click.ClickException as error:
        error.show()
        return FAILURE
    except (InputError, MissingExtraError) as error:
        return _fail(str(error), FAILURE)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", FAILURE)
    except MemoryError:
        return _fail(
            "not enough memory: lower --limit, or store the images as .npy, which is read from disk as needed", FAILURE
        )
    except Exception as error:  # a mistake of ours; still one line, and the way to say more
        if ending.number is not None:  # or what an import made of the interrupt
            return _interrupted()
        return _fail(f"unexpected {type(error).__name__}: {error} (run again with --debug to see where)", FAILURE)


def _interrupted(left: str = "") -> int:
    """left: what the command says of what it leaves behind."""
    return _fail(f"interrupted; {left or 'no partial output was left behind'}", INTERRUPTED)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed (>&-)
            stream.flush()


def _fail(message: str, status: int) -> int:
    if debugging():
        traceback.print_exc()
    if is_first_rank():
        click.echo(f"diffmem: {printable(' '.join(message.split()))}", err=True)
    return status
