"""`diffmem info`."""

from __future__ import annotations

import json

import click

from diffmem.cli.options import debug_option


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
@debug_option
def info_command(as_json: bool) -> None:
    """What is installed, what this machine offers, and which implementation each op uses here and why."""
    from diffmem.environment import FAISS, describe

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
    found = ", ".join(f"{name} {version}" for name, version in faiss["packages"].items())
    where = f"on {faiss['gpus']} GPU(s)" if faiss["gpus"] else "on the CPU"
    problem = f"; {faiss['problem']}" if faiss["problem"] else ""
    click.echo(f"FAISS: {f'{found}, {where}' if found else 'none'}{problem}")
    click.echo("optional packages")
    for name, found in facts["optional"].items():
        state = found["version"] or f"not installed (pip install 'diffmem[{found['extra']}]')"
        if name in faiss["packages"] or not (name in FAISS and faiss["packages"]):
            click.echo(f"  {name} {state}: {found['purpose']}")
