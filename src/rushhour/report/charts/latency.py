"""Latency against the offered rate: p50 and p99 of every window of load, with the limit."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.lines import Line2D

from rushhour.goal import SLO
from rushhour.measurement import Measurement, Outcome
from rushhour.report import wording
from rushhour.report.charts.axes import HALF, NARROW, canvas, key, latency_axis, legend, rate_axis
from rushhour.report.charts.palette import BASELINE, DASHED, DOTTED, LIGHT, PAPER, PLAN, style
from rushhour.report.charts.svg import chart_id, svg
from rushhour.report.findings import Capacity, is_within_slo

_NO_VERDICT = (Outcome.VOID, Outcome.GENERATOR_LIMITED)


class Series(NamedTuple):
    """What was measured of one server, the baseline or the plan's.

    Attributes:
        name: for people.
        is_plan: whether it is the plan's; decides colour and marker.
        windows: its windows of load.
        capacity: None where none was searched.
    """

    name: str
    is_plan: bool
    windows: Sequence[Measurement]
    capacity: Capacity | None

    @property
    def colour(self) -> str:
        """One of the marker colours."""
        return PLAN if self.is_plan else BASELINE

    @property
    def marker(self) -> str:
        """The shape that goes with the colour."""
        return "o" if self.is_plan else "s"


def latency_against_rate(series: Sequence[Series], slo: SLO, narrow: bool = False) -> Markup | None:
    """p50 and p99 of every window of load against its rate, with the limit.

    Lines join windows within the SLO; all others are marks of their own. A star marks the window that proves the
    plan's capacity; a capacity that is only estimated is a band, because nothing was measured there.

    Returns:
        None where no window has a latency.
    """
    if not _latencies(series):
        return None
    with style("latency"):
        figure = draw_latency(series, slo, narrow)
        names = " and ".join(each.name for each in series)
        description = f"Latency against offered rate for {names}, with the limit {slo}"
        description = f"{description}. The numbers are in the table of load windows."
        return svg(figure, chart_id("latency", narrow), description, _proof_tips(series))


def latency_against_rate_png(series: Sequence[Series], slo: SLO) -> bytes | None:
    """The same as a PNG, on white paper.

    Returns:
        None where no window has a latency.
    """
    if not _latencies(series):
        return None
    with style("latency", LIGHT):
        drawn = io.BytesIO()
        figure = draw_latency(series, slo)
        figure.savefig(drawn, format="png", dpi=160, facecolor=PAPER, metadata={"Software": "rushhour"})
        return drawn.getvalue()


def draw_latency(series: Sequence[Series], slo: SLO, narrow: bool = False) -> Any:
    """The figure, in the style that is in force. At least one window needs a latency."""
    windows = [window for each in series for window in each.windows]
    estimates = [(each, each.capacity) for each in series if each.capacity and each.capacity.rps]
    estimates = [(each, capacity) for each, capacity in estimates if not capacity.proven]
    shown = [rps for _, capacity in estimates for rps in (capacity.rps, *(capacity.interval_rps or ()))]
    figure, axes = canvas(NARROW if narrow else HALF, 5.4 if narrow else 5)
    rate_axis(axes, [*(window.rate_rps for window in windows), *shown], "offered rate, requests per second")
    latency_axis(axes, _latencies(series), slo, name_at=0.5)
    for each, capacity in estimates:
        axes.axvline(capacity.rps, color=each.colour, linestyle=DASHED, linewidth=1, zorder=1)
        if capacity.interval_rps is not None:
            axes.axvspan(*capacity.interval_rps, color=each.colour, alpha=0.15, linewidth=0, zorder=1)
    for each in series:
        within = [window for window in each.windows if is_within_slo(window)]
        for line_style, points in (
            (DOTTED, [(w.rate_rps, w.p50_ms) for w in within if w.p50_ms]),
            ("-", [(w.rate_rps, w.p99_ms) for w in within if w.p99_ms]),
        ):
            refuted = [window.rate_rps for window in each.windows if window.outcome.refutes]
            for line in _unbroken(*_medians(points), refuted):
                axes.plot(*zip(*line, strict=True), color=each.colour, linestyle=line_style, linewidth=1.5)
        for window in each.windows:
            _draw_window(axes, window, each)
        proof = each.capacity.proof if each.capacity else None
        if each.is_plan and proof is not None and proof.p99_ms:
            star = {"marker": "*", "markersize": 15, "color": each.colour, "markeredgecolor": PAPER}
            axes.plot(proof.rate_rps, proof.p99_ms, zorder=6, gid="proof", **star)
    legend(axes, _keys(series, windows), columns=1 if narrow else 2)
    return figure


def _latencies(series: Sequence[Series]) -> list[float]:
    windows = [window for each in series for window in each.windows]
    return [ms for window in windows if window.p99_ms for ms in (window.p50_ms, window.p99_ms) if ms]


def _proof_tips(series: Sequence[Series]) -> dict[str, str]:
    """What the pointer shows over the star."""
    proofs = (each.capacity.proof for each in series if each.is_plan and each.capacity is not None)
    proof = next(proofs, None)
    return {} if proof is None else {"proof": f"the proof: {wording.rate(proof.rate_rps)}, p99 {wording.p99(proof)}"}


def _keys(series: Sequence[Series], windows: Sequence[Measurement]) -> list[Line2D]:
    keys = [key(f"{each.name} p99, within SLO", each.colour, line="-", marker=each.marker) for each in series]
    keys.append(key("p50 of the same", line=DOTTED))
    for each in series:
        capacity = each.capacity
        if capacity is None or not capacity.rps:
            continue
        if not capacity.proven:
            keys.append(key(f"{each.name}: estimate", each.colour, line=DASHED))
        elif each.is_plan and capacity.proof is not None and capacity.proof.p99_ms:
            keys.append(key(f"{each.name}: the proof", each.colour, marker="*"))
    if any(window.p99_ms and window.outcome is Outcome.INCONCLUSIVE for window in windows):
        keys.append(key("inconclusive", marker="o", hollow=True))
    if any(window.p99_ms and window.outcome.refutes for window in windows):
        keys.append(key("failed", marker="X", hollow=True))
    if any(window.p99_ms and window.outcome in _NO_VERDICT for window in windows):
        keys.append(key("void, generator-limited", marker="d", hollow=True))
    if any(window.p99_ms is None for window in windows):
        keys.append(key("no p99", marker="^", hollow=True))
    return keys


def _draw_window(axes: Any, window: Measurement, series: Series) -> None:
    """Draw one window of load: its p99 with its interval, crossed where it failed, hollow where it is inconclusive,
    a diamond where the server was not tested, at the top without a p99."""
    if window.p99_ms is None:
        top = axes.get_xaxis_transform()
        marks = {"marker": "^", "markersize": 7, "color": series.colour, "markerfacecolor": "none"}
        axes.plot(window.rate_rps, 0.975, transform=top, **marks)
        return
    if window.p99_interval_ms is not None:
        axes.vlines(window.rate_rps, *window.p99_interval_ms, color=series.colour, linewidth=1, alpha=0.6)
    passed, failed = window.outcome is Outcome.PASS, window.outcome.refutes
    axes.plot(
        window.rate_rps,
        window.p99_ms,
        marker="X" if failed else "d" if window.outcome in _NO_VERDICT else series.marker,
        markersize=8 if failed else 6,
        markerfacecolor=series.colour if passed else PAPER,
        markeredgecolor=PAPER if passed else series.colour,
        markeredgewidth=0.6 if passed else 1.2,
        zorder=4,
    )


def _medians(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """One value for each rate, ascending: the median over the windows of that rate."""
    rates = sorted({rate for rate, _ in points})
    return rates, [statistics.median(ms for rate, ms in points if rate == wanted) for wanted in rates]


def _unbroken(
    rates: Sequence[float], values: Sequence[float], refuted: Sequence[float]
) -> list[list[tuple[float, float]]]:
    """The lines through these points; a line ends where a rate was refuted, and the next point begins another."""
    lines: list[list[tuple[float, float]]] = []
    for rate, value in zip(rates, values, strict=True):
        if not lines or any(lines[-1][-1][0] <= bad <= rate for bad in refuted):
            lines.append([])
        lines[-1].append((rate, value))
    return lines
