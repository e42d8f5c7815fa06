"""`rushhour tune`: a network or bundle, an SLO and an accuracy budget become a Plan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rushhour.cli.command import Command, option
from rushhour.cli.options import (
    accuracy_option,
    cluster_option,
    cold_option,
    data_options,
    force_option,
    name_option,
    slo_option,
    training_options,
    trust_option,
    with_columns,
)
from rushhour.cli.places import Named, Place
from rushhour.cli.results import json_option, write_json
from rushhour.cli.terminal import TerminalProgress, result_console
from rushhour.system.storage import try_folder

if TYPE_CHECKING:
    from rushhour.api import TuneResult


def how_to_continue(params: dict[str, Any]) -> str:
    """What to do after an interruption."""
    from rushhour.plan import SO_FAR

    out: Path = params["out"]
    best = f"; the best plan so far: rushhour serve {out}" if (out / SO_FAR).is_file() else ""
    return f"the same command continues where it was{best}"


def show(result: TuneResult, json_file: Path | None) -> None:
    """Print the plan beside the baseline. Ends the process with 1 where nothing met the goal."""
    from rushhour.ladder import in_words
    from rushhour.report import SummaryTable

    write_json(json_file, result.plan)
    console = result_console()
    console.print()
    console.print(SummaryTable(result.plan, result.run))
    if result.plan.ladder:
        console.print(f"\nThe ladder:  {in_words(result.plan.ladder)}", highlight=False)
    console.print(f"\nServe it:    [bold]rushhour serve {result.run}[/]\nThe report:  {result.report}", highlight=False)
    if not result.feasible:
        click.echo("nothing met the whole goal: this is the nearest miss", err=True)
        sys.exit(1)


@click.command("tune", cls=Command, short_help="Find the best way to serve a model.", how_to_continue=how_to_continue)
@click.argument("model", type=Named())
@option("--out", required=True, type=Place(try_folder), metavar="RUN", help="The run's folder.")
@slo_option
@accuracy_option
@option(
    "--budget",
    metavar="TIME",
    help="How long all of it may take, about, such as 8m. The least decisive measurements are left out, and training "
    "takes fewer than the default epochs on a slow machine. No limit by default.",
)
@option(
    "--stretch",
    metavar="TIME",
    help="With --budget: how much longer all may take where training takes more than its share, such as 3m.",
)
@option(
    "--recipes",
    type=click.Choice(["auto", "none"]),
    default="auto",
    show_default=True,
    help="auto: smaller networks are searched too: pruned, dense layers split, and trained by distillation. none: the "
    "network stays as it is; it is only quantised.",
)
@option(
    "--prefer",
    type=click.Choice(["capacity", "accuracy", "memory"]),
    default="capacity",
    show_default=True,
    help="What decides within the limits. capacity: the most requests per second. accuracy: the same, among those that "
    "are not measurably less accurate than the most accurate one. memory: the smallest model with at least half of the "
    "best capacity.",
)
@option(
    "--ladder",
    is_flag=True,
    help="Give the plan a ladder: variants from the most accurate to the fastest. Its server moves along it as the "
    "load changes, and spends the accuracy budget on average.",
)
@option(
    "--cascade",
    is_flag=True,
    help="After the search, pairs of its candidates are tried as a cascade: the small one answers what it is sure of, "
    "the rest goes on to the larger one. The plan is one where it carries more within the same limits.",
)
@cluster_option
@cold_option
@name_option
@force_option
@trust_option
@json_option
@data_options
@training_options
def command(model: str, data: str, json_file: Path | None, **options: Any) -> None:
    """Find how to serve MODEL so that it answers the most requests per second inside both limits.

    MODEL is a bundle, a model from elsewhere (ONNX, Keras and others: `rushhour import --help`), the name of a
    reference network (article, residual, signal, kernels, mlp, tabular, deepfm, unet, detector, tagger), or your own
    module:factory; a network is trained first. The answer is RUN/plan.json, the evidence RUN/measurements.jsonl and
    RUN/report.html. An interrupted run continues when the same command is run again. Exit code 1 if nothing meets the
    goal.

    \b
    Examples:
      rushhour tune runs/demo/bundles/reference --data fashion-mnist --slo 'p99<20ms' --out runs/strict
      rushhour tune article --data photos/ --budget 8m --out runs/quick
    """
    from rushhour.api import tune

    with TerminalProgress() as progress:
        result = tune(model, data, progress=progress, **with_columns(options))
    show(result, json_file)
