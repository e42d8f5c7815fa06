"""What the charts share: the canvas, the axes of rates, latencies and epochs, lines with a name, the legend."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Final

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from rushhour.goal import SLO
from rushhour.report.charts.palette import DASHED, LIMIT, SOFT

WIDE, HALF, NARROW = 9.4, 5.3, 3.6
"""Widths of a chart in inches: the whole page, half of it, a phone."""
_LOG_FROM: Final = 8.0  # rates that spread over more than this factor get a logarithmic axis
_ROUND_FROM: Final = 6.0  # a logarithmic axis of less than this factor has too few round ticks
_LEGEND_WIDTH: Final = 0.97  # of the figure; a reader's font may be a little wider than matplotlib's
_LEGEND_LINE: Final = 34  # characters of a legend's entry in one line, where one column is too wide


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """A figure of this size in inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def rate_axis(axes: Any, rates: Sequence[float], label: str) -> None:
    """The x axis for rates: begins near them, and is logarithmic where they spread far."""
    low, high = min(rates), max(rates)
    if low > 0 and high / low > _LOG_FROM:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.5, high * 1.5)
        _log_ticks(axes.xaxis, high / low)
    else:
        margin = 0.08 * (high - low) or 0.1 * high or 1
        axes.set_xlim(max(0, low - margin), high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(5 if _is_narrow(axes) else 7))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.set_xlabel(label)


def latency_axis(axes: Any, values: Sequence[float], slo: SLO, name_at: float) -> None:
    """The y axis for latencies in ms, logarithmic, with the limit drawn, and named at this share of the width."""
    low, high = min(*values, slo.limit_ms), max(*values, slo.limit_ms)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.4, high * 1.9)
    _log_ticks(axes.yaxis, high / low)
    axes.set_ylabel("latency, ms")
    axes.axhline(slo.limit_ms, color=LIMIT, linestyle=DASHED, linewidth=1.4)
    _name_line(axes, name_at, slo.limit_ms, f"limit {slo}", ha="center", va="bottom", xytext=(0, 4))


def epoch_axis(axes: Any, label: str) -> None:
    """The x axis for epochs, and the name of the y axis."""
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)


def budget_line(axes: Any, least: float, text: str) -> None:
    """A line at the least accuracy that the budget allows, with its name below it."""
    axes.axhline(least, color=LIMIT, linestyle=DASHED, linewidth=1.4)
    _name_line(axes, 0.995, least, text, ha="right", va="top", xytext=(0, -4))


def metric_ticks(axes: Any, name: str) -> None:
    """Ticks of the y axis in the metric's own form: `90.5%` for accuracy, else a plain number."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: metric_tick(value, name)))


def metric_tick(value: float, name: str) -> str:
    """A value of the metric in few digits."""
    return f"{value * 100:.4g}%" if name == "accuracy" else f"{value:.4g}"


def key(
    label: str,
    colour: str = SOFT,
    *,
    line: Any = "none",
    marker: str | None = None,
    hollow: bool = False,
    size: float = 6,
) -> Line2D:
    """One entry of a legend."""
    face = "none" if hollow else colour
    return Line2D(
        [], [], color=colour, linestyle=line, marker=marker, markersize=size, markerfacecolor=face, label=label
    )


def legend(axes: Any, keys: Sequence[Line2D], columns: int = 3) -> None:
    """A legend above the axes, in as many columns as fit into the figure, `columns` at most.

    Where a single column is too wide, its entries are broken into lines.
    """
    if not keys:
        return
    for count in range(min(columns, len(keys)), 0, -1):
        _draw_legend(axes, keys, count)
        if _legend_fits(axes):
            return
    for each in keys:
        each.set_label("\n".join(textwrap.wrap(str(each.get_label()), _LEGEND_LINE)))
    _draw_legend(axes, keys, 1)


def _draw_legend(axes: Any, keys: Sequence[Line2D], columns: int) -> None:
    axes.legend(
        handles=keys,
        loc="lower left",
        bbox_to_anchor=(0, 1.01),
        ncols=columns,
        borderaxespad=0,
        borderpad=0.3,
        columnspacing=1.6,
        handlelength=2.2,
    )


def _legend_fits(axes: Any) -> bool:
    axes.figure.draw_without_rendering()  # constrained layout moves the axes, and the legend with them
    return bool(axes.get_legend().get_window_extent().x1 <= _LEGEND_WIDTH * axes.figure.bbox.x1)


def short(name: str, most: int) -> str:
    """A name of at most so many characters, without control characters, which SVG cannot hold."""
    clean = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    return clean if len(clean) <= most else f"{clean[: most - 1]}…"


def _name_line(axes: Any, across: float, value: float, text: str, **place: Any) -> None:
    """Name a horizontal line: `across` is a share of the axes' width, `xytext` an offset in points."""
    axes.annotate(
        text,
        (across, value),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        color=LIMIT,
        fontsize=9.5,
        **place,
    )


def _log_ticks(axis: Any, spread: float) -> None:
    """Ticks at 1, 2, 5 of each decade, at fewer where there are many, at round numbers where there is none; written
    as plain numbers."""
    many = 30 if _is_narrow(axis.axes) else 300
    subs = (1, 2, 5) if spread < many else (1, 3) if spread < 10 * many else (1,)
    axis.set_major_locator(MaxNLocator(6) if spread < _ROUND_FROM else LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_locator(NullLocator())


def _is_narrow(axes: Any) -> bool:
    return bool(axes.figure.get_figwidth() < HALF)
