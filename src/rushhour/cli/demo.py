"""`rushhour demo`: the whole path on the reference network and real data."""

from __future__ import annotations

from pathlib import Path

import click

from rushhour.cli.command import Command, option
from rushhour.cli.options import accuracy_option, cold_option, slo_option
from rushhour.cli.places import Place
from rushhour.cli.results import json_option
from rushhour.cli.terminal import TerminalProgress
from rushhour.cli.tune import how_to_continue, show
from rushhour.system.storage import try_folder

_NAME = "article-fashion-mnist"
"""The demo's model, under which README and docs ask for it."""
_BUDGET, _STRETCH_S = "5m", 150.0


@click.command(
    "demo",
    cls=Command,
    short_help="Run the whole path on real data, in a few minutes.",
    how_to_continue=how_to_continue,
)
@option(
    "--out", default="runs/demo", show_default=True, type=Place(try_folder), metavar="RUN", help="The run's folder."
)
@slo_option
@accuracy_option
@option(
    "--budget",
    show_default=f"{_BUDGET}, and up to {_STRETCH_S / 60:g} minutes more where training is slow",
    metavar="TIME",
    help="How long all of it may take, about. Training and smaller networks get a share of it.",
)
@cold_option
@option("--force", is_flag=True, help="Replace the plan of a run there that had other options.")
@json_option
def command(
    out: Path, slo: str, max_accuracy_drop: str, budget: str | None, cold: bool, force: bool, json_file: Path | None
) -> None:
    """The whole path on real data: train, compress, serve, load, and find the Plan.

    Trains the reference network (VGG style, 28x28) on Fashion-MNIST, makes it smaller, serves it in every sensible way
    under load, and shows reference and winner side by side. An interrupted demo continues when it is run again.
    """
    from rushhour.api import tune

    with TerminalProgress() as progress:
        result = tune(
            "article",
            "fashion-mnist",
            out=out,
            slo=slo,
            max_accuracy_drop=max_accuracy_drop,
            budget=budget or _BUDGET,
            stretch=None if budget else _STRETCH_S,
            name=_NAME,
            cold=cold,
            force=force,
            progress=progress,
        )
    show(result, json_file)
