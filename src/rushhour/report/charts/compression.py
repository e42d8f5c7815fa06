"""What the steps of a compression cost and gained: accuracy against throughput, and size."""

from __future__ import annotations

from markupsafe import Markup
from matplotlib.ticker import NullLocator

from rushhour.records.compression import Compression, Stage
from rushhour.report import wording
from rushhour.report.charts.axes import (
    NARROW,
    WIDE,
    budget_line,
    canvas,
    key,
    legend,
    metric_ticks,
    rate_axis,
    short,
)
from rushhour.report.charts.palette import BASELINE, GRID, INK, PLAN, SOFT, style
from rushhour.report.charts.svg import chart_id, svg


def compression_trade_off(found: Compression, narrow: bool = False) -> Markup:
    """Accuracy against throughput: one line for each recipe, a point for each step, the result marked with a star."""
    with style("compression-trade"):
        figure, axes = canvas(NARROW if narrow else WIDE, 4.2)
        name = found.reference.accuracy.metric
        axes.plot([1], [found.reference.accuracy.value], color=BASELINE, marker="s", markersize=7, zorder=4)
        for attempt in found.attempts:
            points = [(_speed_up(stage), stage.accuracy.value) for stage in attempt.stages]
            axes.plot(*zip((1.0, found.reference.accuracy.value), *points, strict=True), color=SOFT, linewidth=1)
            for stage, (across, value) in zip(attempt.stages, points, strict=True):
                low, high = stage.accuracy.interval
                axes.plot([across] * 2, [low, high], color=GRID, linewidth=2, zorder=1)
                axes.plot([across], [value], color=SOFT, marker="o", markersize=5, zorder=4)
                axes.annotate(
                    short(stage.step, 22), (across, value), xytext=(5, 4), textcoords="offset points", fontsize=8
                )
        answer = found.answer
        # behind the points: it would hide steps with the same values
        axes.plot([_speed_up(answer)], [answer.accuracy.value], color=PLAN, marker="*", markersize=17, zorder=3)
        budget_line(axes, found.reference.accuracy.value - found.budget.max_drop, f"budget {found.budget}")
        metric_ticks(axes, name)
        stages = [stage for attempt in found.attempts for stage in attempt.stages]
        rate_axis(axes, [1.0, *map(_speed_up, stages)], "throughput over the reference's")
        axes.set_ylabel(f"{name}, validation")
        keys = [key("reference", BASELINE, marker="s"), key("step", SOFT, marker="o")]
        legend(axes, [*keys, key("result", PLAN, marker="*")], columns=1 if narrow else 3)
        label = f"{name.capitalize()} against throughput after each step. The numbers are in the table of steps."
        return svg(figure, chart_id("compression-trade", narrow), label)


def compression_sizes(found: Compression, narrow: bool = False) -> Markup | None:
    """How many times fewer parameters and bytes than the reference each step of the result's recipe has.

    Returns:
        None where the result is the reference.
    """
    if found.best is None:
        return None
    stages = found.attempts[found.best[0]].stages[: found.best[1] + 1]
    with style("compression-sizes"):
        figure, axes = canvas(NARROW if narrow else WIDE, (1.5 if narrow else 1.1) + 0.62 * len(stages))
        reference = found.reference
        fewer = [reference.parameters / max(1, stage.parameters) for stage in stages]
        smaller = [reference.bytes / stage.bytes for stage in stages]
        for offset, values, colour in ((-0.19, fewer, SOFT), (0.19, smaller, PLAN)):
            places = [place + offset for place in range(len(stages))]
            axes.barh(places, values, height=0.34, color=colour)
            for place, value in zip(places, values, strict=True):
                beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
                axes.annotate(f"{wording.number(value)}x", (value, place), fontsize=9, **beside)
        axes.set_yticks(range(len(stages)), [short(stage.step, 18 if narrow else 30) for stage in stages])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(stages) - 0.5, -0.5)
        axes.set_xlim(0, 1.15 * max(*fewer, *smaller))
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(NullLocator())
        axes.spines["bottom"].set_visible(False)
        keys = [key("fewer parameters", SOFT, marker="s"), key("smaller on disk", PLAN, marker="s")]
        legend(axes, keys, columns=1 if narrow else 2)
        numbers = ", ".join(
            f"{stage.step} {wording.number(size)} times smaller" for stage, size in zip(stages, smaller, strict=True)
        )
        return svg(figure, chart_id("compression-sizes", narrow), f"Size after each step of the result: {numbers}")


def _speed_up(stage: Stage) -> float:
    """The throughput over the reference's; 1 for the reference itself."""
    return 1.0 if stage.throughput is None else stage.throughput.value
