"""The distribution of latency at capacity: the latency at each percentile, from the median into the tail."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.ticker import NullLocator

from rushhour.goal import SLO
from rushhour.measurement import Measurement, Outcome, latency_curve
from rushhour.report import wording
from rushhour.report.charts.axes import HALF, NARROW, canvas, key, latency_axis, legend
from rushhour.report.charts.latency import Series
from rushhour.report.charts.palette import DOTTED, LIMIT, style
from rushhour.report.charts.svg import chart_id, svg


def latency_distribution(series: Sequence[Series], slo: SLO, narrow: bool = False) -> Markup | None:
    """The latency at each percentile from the median into the tail, for the window that shows each capacity.

    Unanswered requests count as infinitely late, and a curve ends where its window has too few requests to bound
    the percentile at 95%.

    Returns:
        None where no series has such a window.
    """
    windows = [(each, each.capacity.window) for each in series if each.capacity is not None]
    curves = [(each, window, _tail(window)) for each, window in windows if window is not None]
    curves = [(each, window, tail) for each, window, tail in curves if tail]
    if not curves:
        return None
    with style("tail"):
        figure, axes = canvas(NARROW if narrow else HALF, 5)
        latency_axis(axes, [ms for *_, tail in curves for _, ms in tail], slo, name_at=0.25 if narrow else 0.15)
        axes.set_xscale("log")
        most = max(100.0, *(tail[-1][0] for *_, tail in curves))
        axes.set_xlim(2, most * 1.1)
        ticks = (50, 90, 99, 99.9, 99.99) if narrow else (50, 75, 90, 95, 99, 99.5, 99.9, 99.99)
        shown = [p for p in ticks if 100 / (100 - p) <= most * 1.001]
        axes.set_xticks([100 / (100 - p) for p in shown], [f"p{p:g}" for p in shown])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("percentile of all scheduled requests")
        axes.axvline(1 / slo.allowed_miss_rate, color=LIMIT, linestyle=DOTTED, linewidth=1)
        keys = []
        for each, window, tail in curves:
            axes.plot(*zip(*tail, strict=True), color=each.colour, linewidth=2)
            axes.plot(*tail[-1], marker=each.marker, color=each.colour, markersize=6)
            verdict = "" if window.outcome is Outcome.PASS else f", {window.outcome.value}"
            name = f"{each.name} at {wording.rate(window.rate_rps)}{verdict}, n = {window.n:,}"
            keys.append(key(name, each.colour, line="-", marker=each.marker))
        legend(axes, keys, columns=1)
        numbers = "; ".join(
            f"{each.name} at {wording.rate(window.rate_rps)}: p99 {wording.p99(window)}" for each, window, _ in curves
        )
        return svg(figure, chart_id("tail", narrow), f"Latency at each percentile: {numbers}")


def _tail(window: Measurement) -> list[tuple[float, float]]:
    """Latency in ms at 1 / (1 - percentile), from the median to the last percentile that n requests can bound."""
    answered = window.n - window.errors - window.shed
    if window.n < 2 or answered < 1:
        return []
    # With n samples the q-quantile has an upper 95% bound among them only where q^n <= 5%: 299 for p99.
    last = 100 * 0.05 ** (1 / window.n)
    steps = [100 - 50 * 0.96**step for step in range(250)]
    wanted = [p for p in [*steps, 95, 99, 99.9] if p <= last and p * window.n / answered <= 100]
    wanted.sort()
    values = latency_curve(window.latencies, tuple(min(100.0, p * window.n / answered) for p in wanted))
    return [(100 / (100 - p), ms) for p, ms in zip(wanted, values, strict=True) if ms > 0]
