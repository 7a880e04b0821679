"""`diffmem info`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from diffmem.cli.options import CommandWithJson, debug_option, json_option


@click.command("info", cls=CommandWithJson)
@click.argument("path", metavar="[RUN]", required=False, type=click.Path(exists=True, path_type=Path))
@json_option("the same")
@debug_option
def info_command(path: Path | None, as_json: bool) -> None:
    """What is installed, what this machine offers, and which backend each op and the search use here and why.

    With RUN, a folder of diffmem train or a checkpoint: what was trained on what, and how the weights were averaged.
    """
    from diffmem.environment import FAISS, describe

    if path is not None:
        found = _about(path)
        if as_json:
            click.echo(json.dumps(found, indent=1))
        else:
            for name, value in found.items():
                click.echo(f"{name}: {value}")
        return
    facts = describe()
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    native, cuda = facts["native"], facts["cuda"]
    click.echo(f"diffmem {facts['diffmem']}, Python {facts['python']}, torch {facts['torch']}, numpy {facts['numpy']}")
    click.echo(f"{facts['platform']}, {facts['threads']} threads, GPUs: {', '.join(facts['gpus']) or 'none'}")
    if native["present"]:
        features = ", ".join(native["cpu_features"])
        click.echo(f"native core: yes ({native['why']}), using {native['cpu_level']}; found {features}")
    else:
        click.echo(f"native core: no ({native['why']})")
    click.echo(f"CUDA kernels: {'yes' if cuda['present'] else 'no'} ({cuda['why']})")
    click.echo("ops")
    for name, devices in facts["ops"].items():
        for device, why in devices.items():
            click.echo(f"  {name} on {device}: {why}")
    faiss = facts["faiss"]
    named = ", ".join(f"{name} {version}" for name, version in faiss["packages"].items())
    where = f"on {faiss['gpus']} GPU(s)" if faiss["gpus"] else "on the CPU"
    problem = f"; {faiss['problem']}" if faiss["problem"] else ""
    click.echo(f"FAISS: {f'{named}, {where}' if named else 'none'}{problem}")
    click.echo("optional packages")
    for name, found in facts["optional"].items():
        state = found["version"] or f"not installed (pip install 'diffmem[{found['extra']}]')"
        if name in faiss["packages"] or not (name in FAISS and faiss["packages"]):
            click.echo(f"  {name} {state}: {found['purpose']}")


def _about(path: Path) -> dict[str, str]:
    """What a run, or a checkpoint, is, in words by what they are of."""
    from diffmem.models import ModuleConfig, checkpoint_path, load
    from diffmem.recognize import is_run
    from diffmem.training import RunFolder

    run = RunFolder.open(path) if is_run(path) else RunFolder.around(path) if path.is_dir() else None
    if run is None:
        return {"network": load(path).summary()}
    config, snapshots = run.config, run.snapshots()
    own = config.denoiser.network
    if isinstance(own, ModuleConfig):
        network = f"{own.name}, your own network, {own.parameters:,} parameters"
    else:
        network = load(checkpoint_path(path)).summary() if snapshots else "no snapshot yet"
    seen = max((line.images for line in run.stats()), default=0)
    mirrored = ", and mirrored" if config.xflip else ""
    return {
        "run": str(run.path),
        "network": network,
        "training set": f"{run.data['images']:,} images of {run.data['source']}{mirrored}",
        "length": f"{seen:,} of {config.images:,} images, in batches of {config.batch}",
        "optimizer": f"{config.optimizer}, learning rate {config.lr:g}, weight decay {config.weight_decay:g}",
        "EMA weights": run.averaging(),
        "snapshots": ", ".join(f"{record.images:,}" for record in snapshots) or "none",
    }
