"""`rushhour load`: a server under open-loop load, and the verdict on its SLO."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from rushhour.cli.command import Command, option
from rushhour.cli.options import slo_option
from rushhour.cli.places import Place
from rushhour.cli.results import json_option, write_json
from rushhour.cli.terminal import LoadView, result_console
from rushhour.cli.traffic import how_to_continue, stopping_early, traffic_options
from rushhour.goal import SLO
from rushhour.measurement import Measurement
from rushhour.system.storage import try_file

if TYPE_CHECKING:
    from rushhour.api import ClosedLoopResult, LoadResult
    from rushhour.load import ClosedResult


@click.command("load", cls=Command, short_help="Test whether a server keeps an SLO.", how_to_continue=how_to_continue)
@click.argument("url")
@slo_option
@option(
    "--rate",
    multiple=True,
    metavar="RATE",
    help="Requests per second: one window and verdict for each. `recorded` is a trace's own rate. May be repeated. "
    "Without it, the capacity is searched.",
)
@option(
    "--duration",
    metavar="TIME",
    help="Duration of a window, such as 10s or 2m; longer where the SLO needs more requests. 10s by default; a trace "
    "with --rate is replayed whole.",
)
@option(
    "--closed-loop",
    type=int,
    metavar="N",
    help="Instead of open-loop load: N users that wait for their answers. No verdict.",
)
@option("--plot", type=Place(try_file), metavar="FILE", help="Draw latency against rate: a .png or .html file.")
@json_option
@traffic_options
def command(
    url: str,
    slo: str,
    rate: tuple[str, ...],
    closed_loop: int | None,
    plot: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Test whether the server at URL keeps the SLO: with --rate at that rate, without it up to which rate.

    The load is open loop: requests are sent when they arrive, whether or not earlier ones are answered, and latency
    runs from the scheduled arrival. Exit code 0 only if the SLO holds; Ctrl-C keeps what was measured. URL is
    http://HOST:PORT or grpc://HOST:PORT of an Open Inference Protocol server; with --body, --path, --method or --header
    it is any HTTP endpoint.

    \b
    Examples:
      rushhour load http://127.0.0.1:8000 --slo 'p99<50ms' --rate 500 --duration 10s
      rushhour load http://127.0.0.1:8000 --slo 'p99<50ms' --plot load.html
      rushhour load http://127.0.0.1:8000 --arrivals trace.csv --rate 500
      rushhour load http://127.0.0.1:8080 --path /predict --body cat.jpg --header 'Accept: */*' --rate 50
    """
    from rushhour.api import ClosedLoopResult, Stop, load
    from rushhour.errors import GoalError

    limit = SLO.parse(slo)
    if plot is not None:
        from rushhour.report.load import check_plot_name

        check_plot_name(plot)
        if closed_loop is not None:
            raise GoalError("a closed loop has no plot", "it has no rate", "leave out --plot")
    stop = Stop("stopped by Ctrl-C")
    with LoadView(limit if closed_loop is None else None) as view, stopping_early(stop):
        result = load(
            url,
            slo=limit,
            rate=rate or None,
            closed_loop=closed_loop,
            progress=view,
            on_window=view.add,
            on_tick=view.tick,
            stop=stop,
            **options,
        )
    if isinstance(result, ClosedLoopResult):
        _show_closed(result, json_file)
    else:
        _show(result, plot, json_file)


def _show(result: LoadResult, plot: Path | None, json_file: Path | None) -> None:
    console = result_console()
    print_windows(console, result.slo, result.windows)
    console.print(result.headline, style="bold", highlight=False, markup=False)
    write_json(json_file, result.as_dict())
    if plot is not None and any(window.p99_ms is not None for window in result.windows):
        from rushhour.report import write_load_plot

        write_load_plot(plot, result.model or result.url, result.windows, result.slo, result.headline)
        click.echo(plot)
    elif plot is not None:
        click.echo(f"no window has a p99, so {plot} is not drawn", err=True)
    if result.error is not None:
        raise result.error
    if result.stopped:
        raise KeyboardInterrupt
    if not result.holds:
        sys.exit(1)


def _show_closed(result: ClosedLoopResult, json_file: Path | None) -> None:
    print_closed(result_console(), result.result)
    write_json(json_file, result.as_dict())
    if result.stopped:
        raise KeyboardInterrupt
    if result.result.errors or not result.result.throughput_rps:
        sys.exit(1)


def print_windows(console: Console, slo: SLO, windows: Sequence[Measurement]) -> None:
    """The windows as a table, and the number of errors of each kind. Numbers are whole in 80 columns."""
    table = Table(title=f"Open-loop load, {slo}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("rate/s", "n", "late", "p50 ms", "p99 ms", "95% interval", "generator", "verdict"):
        # rich narrows the columns that may wrap before it cuts any other.
        may_wrap = name in ("95% interval", "verdict")
        table.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=not may_wrap)
    for run in windows:
        interval = "" if run.p99_interval_ms is None else "{:.1f} to {:.1f}".format(*run.p99_interval_ms)
        table.add_row(
            f"{run.rate_rps:,.6g}",
            f"{run.n:,}",
            f"{run.late:,}",
            "" if run.p50_ms is None else f"{run.p50_ms:.1f}",
            "" if run.p99_ms is None else f"{run.p99_ms:.1f}",
            interval,
            f"{run.generator_cpu:.0%}",
            run.outcome.words,
        )
    console.print(table)
    last = windows[-1] if windows else None
    if last is not None and last.speed and last.slow_speed:  # of one rate: batches of other sizes differ otherwise
        slow = last.slow_speed / last.speed
        console.print(
            f"the last window: in its slowest 10% the host ran at {slow:.2f} of its usual speed", highlight=False
        )
    kinds: dict[str, int] = {}
    for run in windows:
        for kind, count in run.error_kinds.items():
            kinds[kind] = kinds.get(kind, 0) + count
    if kinds:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        console.print(f"errors: {counts}", highlight=False, markup=False)


def print_closed(console: Console, result: ClosedResult) -> None:
    """Throughput, latency and errors of a closed loop."""
    p99 = "fewer than 299 answers: no p99"
    if result.p99_ms is not None and result.p99_interval_ms is not None:
        low, high = result.p99_interval_ms
        p99 = f"p99 {result.p99_ms:.1f} ms ({low:.1f} to {high:.1f}, n = {result.n:,})"
    p50 = "" if result.p50_ms is None else f"p50 {result.p50_ms:.1f} ms, "
    console.print(
        f"{result.concurrency} users in a closed loop: {result.throughput_rps:,.0f} answers/s, {p50}{p99}; "
        f"{result.errors:,} errors, {result.shed:,} shed, generator {result.generator_cpu:.0%} of a core"
        + (f"; the first error: {result.first_error}" if result.first_error else ""),
        highlight=False,
        markup=False,
    )
    console.print(
        "In a closed loop no requests arrive while the server is slow, so the latency under independent arrivals is "
        "higher: measure it with --rate."
    )
