"""`diffmem demo`."""

from __future__ import annotations

from pathlib import Path

import click

from diffmem.cli.options import debug_option


@click.command("demo")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder to write to."
)
@debug_option
def demo_command(out: Path) -> None:
    """Audit a mixture of disturbed training digits and unseen digits, where the answer is known."""
    from diffmem.cli.audit import print_verdict
    from diffmem.demo import run_demo
    from diffmem.progress import progress_bars
    from diffmem.whole import check_output_folder

    check_output_folder(out)
    with progress_bars() as progress:
        result, report = run_demo(out, progress)
    click.echo(
        "Real 8x8 digits. The 'generated' ones are disturbed training digits and digits never seen, named as such."
    )
    disturbed = [name.startswith("disturbed-") for name in result.generated.names]
    found = sum(bool(memorized) for memorized, copy in zip(result.memorized, disturbed, strict=True) if copy)
    click.echo(
        f"{sum(disturbed)} of {result.total} are disturbed training digits; the audit calls {found} of those copies,"
    )
    click.echo(f"and {result.count - found} of the {result.total - sum(disturbed)} unseen ones.")
    print_verdict(result)
    click.echo(f"report: {report}")
    click.echo(
        f"try it yourself: diffmem audit {out}/generated.zip {out}/training.zip --holdout {out}/unseen.zip --out {out}"
    )
