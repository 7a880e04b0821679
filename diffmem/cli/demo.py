"""`diffmem demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

if TYPE_CHECKING:
    from diffmem.memorization import Audit

from diffmem.cli.options import CommandWithJson, debug_option, json_option
from diffmem.cli.sampling_options import folder_option


@click.command("demo", cls=CommandWithJson)
@folder_option("a folder for report.html, models and samples.", default=Path("demo"), show_default=True)
@json_option("the results")
@debug_option
def demo_command(out: Path, as_json: bool) -> None:
    """Train one small model that memorizes real digits and one that does not, and show the difference.

    The same network is trained on 20 and on 1,000 digits; both are sampled, and audited against their training sets and
    against digits they never saw. Two to four minutes on two cores; if interrupted, run it again and it resumes.
    """
    import torch

    from diffmem.demo import run_demo
    from diffmem.html_report import percent, percent_range
    from diffmem.progress import progress_bars

    torch.set_flush_denormal(True)
    with progress_bars() as progress:
        demo = run_demo(out, progress=progress)
    if as_json:
        click.echo(json.dumps(demo.to_dict()))
        return
    for model in (demo.few, demo.many):
        interval, false_alarms = percent_range(model.audit.interval), cast("Audit", model.audit.holdout).ratio
        click.echo(
            f"trained on {len(model.training):,} digits, {model.epochs:,.0f} epochs: {model.audit.count} of "
            f"{model.audit.total} generated images are copies, {percent(model.audit.ratio)} (95 % interval "
            f"{interval}); compared with unseen digits {percent(model.control.ratio)}, false alarms "
            f"{percent(false_alarms)}"
        )
    click.echo(f"report: {demo.page}")
