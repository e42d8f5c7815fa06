"""`rushhour plan`: how many machines, processes, cores and watts a rate takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rushhour.cli.command import Command, option
from rushhour.cli.places import Place
from rushhour.cli.results import json_option, write_json

if TYPE_CHECKING:
    from rushhour.cluster import Sizing


@click.command("plan", cls=Command, short_help="Machines, cores and watts that a rate takes.")
@click.argument("run", type=Place(), metavar="RUN|PLAN")
@option("--rate", required=True, type=float, metavar="RPS", help="Requests per second, on average.")
@option(
    "--trace",
    type=Place(),
    metavar="FILE",
    help="Recorded arrivals, one time in seconds a line: the rate varies around its average as it does there.",
)
@option(
    "--machine",
    default="",
    metavar="SPEC",
    help="What differs from the Plan's machine: cores=16,speed=0.8,watts=250,processes=4. Speed is that of one core "
    "over one of the Plan's machine; watts are under load.",
)
@option(
    "--failures",
    default=1,
    show_default=True,
    type=click.IntRange(0, 1_000_000),
    metavar="N",
    help="Machines that may fail at the same time.",
)
@json_option
def command(run: Path, json_file: Path | None, rate: float, trace: Path | None, machine: str, failures: int) -> None:
    """How many machines carry --rate within the SLO of RUN's Plan.

    A machine like the Plan's carries what was measured there, with the load generator on it. For another machine, or
    other processes, the capacity is predicted by the simulator of the tuning run. The interval is that of the capacity,
    95%. Nothing is measured here.

    \b
    Examples:
      rushhour plan runs/demo --rate 100000
      rushhour plan runs/demo --rate 100000 --machine cores=16,watts=250 --failures 2
      rushhour plan runs/demo --rate 20000 --trace yesterday.csv
    """
    from rushhour.api import size

    found = size(run, rate=rate, trace=trace, machine=machine, failures=failures)
    for line in _lines(found):
        click.echo(line)
    write_json(json_file, found.as_dict())


def _lines(found: Sizing) -> list[str]:
    """The answer first, then where it comes from."""
    node, interval = found.node, found.machines_interval
    between = "" if interval is None or interval[0] == interval[1] else f" ({interval[0]:,} to {interval[1]:,})"
    peak = f", {found.peak_rps:,.0f}/s at its peak" if found.peak_rps > found.rate_rps else ""
    capacity = "" if found.machine_interval_rps is None else " ({:,.0f} to {:,.0f})".format(*found.machine_interval_rps)
    watts = "give the watts of one: --machine watts=..." if found.watts is None else f"{found.watts:,.0f} W"
    lines = [
        f"{found.rate_rps:,.0f}/s{peak} within {found.slo}: {found.machines:,} machines{between}",
        f"  {found.carrying:,} carry it, {found.spare:,} more may fail",
        f"  each with {node.cores} cores and {node.processes} processes carries {found.machine_rps:,.0f}/s{capacity}, "
        f"{found.kind}",
    ]
    if found.alone_rps is not None:
        lines.append(f"  without a load generator on it, one is predicted to carry {found.alone_rps:,.0f}/s")
    lines.append(f"  together {found.processes:,} processes, {found.cores:,} cores; power: {watts}")
    return [*lines, *(f"  assumed: {note}" for note in found.notes)]
