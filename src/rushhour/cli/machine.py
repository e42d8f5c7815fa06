"""`rushhour machine`: what this machine is, and what each engine can do on it."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from rushhour.cli.command import Command
from rushhour.cli.results import json_option, write_json


@click.command("machine", cls=Command, short_help="Show what this machine and its engines can do.")
@json_option
def command(json_file: Path | None) -> None:
    """Show what this machine is and what each engine can do on it, to be added to the report of an error.

    The class decides how int8 computes: amx and vnni add products of 8-bit numbers in 32 bits; avx2 adds pairs of them
    in 16 bits, which saturate where weights use all 8 bits.
    """
    from rushhour.engines import abilities
    from rushhour.system.machine import describe, limits

    here, (allowed, quota), engines = describe(), limits(), abilities()
    granted = "no CPU quota" if quota is None else f"a CPU quota of {quota:g}"
    rows: dict[str, str] = {
        "processor": f"{here.cpu}: class {here.isa} ({' '.join(here.features) or 'no vector extensions known'})",
        "cores": f"{here.cores}: {allowed} by affinity, {granted}",
        "memory": f"{here.memory_gb:g} GiB",
        "system": f"{here.system}, Python {here.python}, Rushhour {here.versions.get('rushhour', 'not installed')}",
        **{str(name): ability for name, ability in engines.items()},
    }
    for name, value in rows.items():
        click.echo(f"{name:<12} {value}")
    facts = {"class": here.isa, "affinity": allowed, "quota": quota, "engines": engines}
    write_json(json_file, {**msgspec.to_builtins(here), **facts})
