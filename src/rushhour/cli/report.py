"""`rushhour report`: a run, a training or a compression becomes an HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from rushhour.cli.command import Command, option
from rushhour.cli.places import Place
from rushhour.cli.results import json_option, write_json
from rushhour.cli.terminal import result_console
from rushhour.system.storage import try_file


@click.command("report", cls=Command, short_help="Write the HTML report of a run.")
@click.argument("run", type=Place())
@option("--out", type=Place(try_file), metavar="FILE", help="The file to write. RUN/report.html by default.")
@json_option
def command(run: Path, out: Path | None, json_file: Path | None) -> None:
    """Write the report of RUN: one HTML file that works offline.

    RUN is the folder of a tuning run, or a file in it such as RUN/plan.json. It may also be a bundle that was trained
    or compressed, or the folder beside it (BUNDLE-training, BUNDLE-steps): the report then shows the curves of the
    training, or what each step of the compression cost and gained.

    \b
    Examples:
      rushhour report runs/demo
      rushhour report runs/photos-training --out curves.html
    """
    from rushhour.api import report
    from rushhour.plan import SO_FAR

    result = report(run, out=out)
    if result.plan is not None:
        from rushhour.report import SummaryTable

        result_console().print(SummaryTable(result.plan, run if run.is_dir() else run.parent))
    click.echo(result.file)
    if not result.finished:
        click.echo(f"the run was interrupted, or is not finished yet: this is its best plan so far, {SO_FAR}", err=True)
    write_json(json_file, result.as_dict())
