"""`rushhour compare`: servers under the same arrivals, and the ratios of their figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from rushhour.cli.command import Command, option
from rushhour.cli.options import slo_option
from rushhour.cli.results import json_option, write_json
from rushhour.cli.terminal import LoadView, result_console
from rushhour.cli.traffic import how_to_continue, stopping_early, traffic_options
from rushhour.goal import SLO

if TYPE_CHECKING:
    from rushhour.load import Comparison, Ratio

_FIGURES = {"p50_ms": "p50", "p99_ms": "p99", "answered_rps": "answered/s"}


@click.command(
    "compare", cls=Command, short_help="Compare servers under the same load.", how_to_continue=how_to_continue
)
@click.argument("urls", nargs=-1, required=True, metavar="URL URL...")
@slo_option
@option("--rate", multiple=True, required=True, metavar="RATE", help="Requests per second. May be repeated.")
@option(
    "--window",
    default="5s",
    show_default=True,
    metavar="TIME",
    help="Duration of a window; longer where the SLO needs more requests.",
)
@option(
    "--blocks",
    default=6,
    show_default=True,
    type=click.IntRange(1, 10_000),
    metavar="N",
    help="Windows of each server at each rate.",
)
@json_option
@traffic_options
def command(urls: tuple[str, ...], slo: str, json_file: Path | None, **options: Any) -> None:
    """Compare servers at the same rate: which is faster, and how sure is that?

    Windows of all servers are interleaved (A B, B A, ...) on the same arrivals. Each block gives ratios of p50, p99 and
    answers per second to the first server's, and all blocks together a 95% interval. Exit code 0 if there were enough
    undisturbed blocks.

    \b
    Examples:
      rushhour compare http://127.0.0.1:8000 http://127.0.0.1:9000 --rate 200 --rate 400
    """
    from rushhour.api import Stop, compare

    limit, stop = SLO.parse(slo), Stop("stopped by Ctrl-C")
    with LoadView(limit) as view, stopping_early(stop):
        result = compare(urls, slo=limit, progress=view, on_window=view.add, on_tick=view.tick, stop=stop, **options)
    console = result_console()
    print_comparison(console, result.comparison)
    if result.stopped:
        console.print(f"partial: {result.stopped}", style="bold", highlight=False, markup=False)
    write_json(json_file, result.as_dict())
    if result.error is not None:
        sys.exit(2)
    if result.stopped:
        raise KeyboardInterrupt
    if not result.is_complete:
        sys.exit(1)


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Each server's figures as ratios to the first one's."""
    first = comparison.servers[0]
    table = Table(title=f"Against {first}, {comparison.slo}", title_justify="left")
    for name in ("server", "rate/s", "figure", "ratio", "95% interval", "blocks", ""):
        table.add_column(name, justify="left" if name in ("server", "figure", "") else "right")
    for ratio in comparison.ratios:
        table.add_row(
            ratio.server,
            f"{ratio.rate_rps:,.6g}",
            _FIGURES[ratio.metric],
            "" if ratio.ratio is None else f"{ratio.ratio:.3f}",
            "" if ratio.interval is None else "{:.3f} to {:.3f}".format(*ratio.interval),
            f"{ratio.pairs} of {ratio.of_blocks}",
            _meaning(ratio),
        )
    console.print(table)


def _meaning(ratio: Ratio) -> str:
    if ratio.interval is None or ratio.ratio is None:
        return "too few undisturbed blocks"
    if not ratio.differs:
        return "no difference shown"
    words = ("more", "fewer") if ratio.metric == "answered_rps" else ("slower", "faster")
    return words[0] if ratio.ratio > 1 else words[1]
