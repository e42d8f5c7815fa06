"""The curves of a training: loss and metric by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from markupsafe import Markup

from rushhour.records.classified import Bin
from rushhour.records.curves import Epoch, best_of
from rushhour.records.judged import Found, Residuals
from rushhour.report.charts.axes import HALF, NARROW, canvas, epoch_axis, key, legend, metric_tick, metric_ticks, short
from rushhour.report.charts.palette import BASELINE, DASHED, DOTTED, INK, LIMIT, PLAN, SOFT, style
from rushhour.report.charts.svg import chart_id, svg

_MARKED: Final[tuple[tuple[str, str, Any], ...]] = (
    (PLAN, "o", "-"), (BASELINE, "s", DASHED), (LIMIT, "^", DOTTED), (INK, "D", "-"),
)  # fmt: skip
"""Colour, mark and line of the classes that have their own."""
_NAME: Final = 30


def training_loss(epochs: Sequence[Epoch], narrow: bool = False) -> Markup:
    """The loss of training and validation part by epoch."""
    with style("training-loss"):
        figure, axes = canvas(NARROW if narrow else HALF, 4)
        at = [epoch.epoch for epoch in epochs]
        parts = (("training", BASELINE, "s", DOTTED), ("validation", PLAN, "o", "-"))
        for name, colour, marker, line in parts:
            values = [epoch.loss if name == "training" else epoch.validation_loss for epoch in epochs]
            axes.plot(at, values, color=colour, linestyle=line, marker=marker, markersize=4)
        epoch_axis(axes, "loss")
        legend(axes, [key(name, colour, line=line, marker=marker) for name, colour, marker, line in parts])
        return svg(figure, chart_id("training-loss", narrow), "Loss by epoch. The numbers are in the table of epochs.")


def reliability(bins: Sequence[Bin], narrow: bool = False, name: str = "reliability") -> Markup:
    """The share of right answers against the confidence that they were given with; on the diagonal both agree.

    Args:
        name: unique in a page.
    """
    with style(name):
        figure, axes = canvas(NARROW if narrow else HALF, 4)
        axes.plot([0, 1], [0, 1], color=BASELINE, linestyle=DOTTED)
        most = max(each.samples for each in bins)
        axes.plot([each.confidence for each in bins], [each.right for each in bins], color=PLAN, linestyle="-")
        for each in bins:  # a point's area is its number of samples
            size = 3 + 11 * (each.samples / most) ** 0.5
            axes.plot([each.confidence], [each.right], color=PLAN, marker="o", markersize=size)
        axes.set_xlim(0, 1.04)
        axes.set_ylim(0, 1.04)
        axes.set_xlabel("confidence")
        axes.set_ylabel("share of right answers")
        legend(axes, [key("answers", PLAN, line="-", marker="o"), key("calibrated", BASELINE, line=DOTTED)])
        label = "Share of right answers by confidence. The numbers are in the table beside it."
        return svg(figure, chart_id(name, narrow), label)


def precision_recall(curves: Sequence[Found], narrow: bool = False) -> Markup:
    """Precision against recall; the first few classes have marks of their own, the others are thin lines."""
    with style("precision-recall"):
        figure, axes = canvas(NARROW if narrow else HALF, 4)
        for curve in curves[len(_MARKED) :]:
            axes.plot(curve.recall, curve.precision, color=SOFT, linewidth=0.8)
        keys = []
        for (colour, marker, line), curve in zip(_MARKED, curves, strict=False):
            every = max(1, len(curve.recall) // 8)
            axes.plot(
                curve.recall,
                curve.precision,
                color=colour,
                linestyle=line,
                marker=marker,
                markevery=every,
                markersize=4,
            )
            keys.append(key(short(curve.name, _NAME), colour, line=line, marker=marker))
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.04)
        axes.set_xlabel("recall")
        axes.set_ylabel("precision")
        legend(axes, keys)
        label = "Precision against recall. The average precisions are in the table beside it."
        return svg(figure, chart_id("precision-recall", narrow), label)


def residuals(of: Residuals, narrow: bool = False, name: str = "residuals") -> Markup:
    """Targets minus answers by the size of the answer: the median, and where nine tenths are.

    Args:
        name: unique in a page.
    """
    with style(name):
        figure, axes = canvas(NARROW if narrow else HALF, 3.4)
        at = [group.answer for group in of.groups]
        axes.axhline(0, color=BASELINE, linestyle=DOTTED)
        low, high = [group.low for group in of.groups], [group.high for group in of.groups]
        axes.fill_between(at, low, high, color=PLAN, alpha=0.15, linewidth=0)
        axes.plot(at, [group.middle for group in of.groups], color=PLAN, marker="o", markersize=4)
        axes.set_xlabel(f"answer: {short(of.name, _NAME)}")
        axes.set_ylabel("target minus answer")
        legend(axes, [key("median, and 5% to 95%", PLAN, line="-", marker="o"), key("right", BASELINE, line=DOTTED)])
        label = "Targets minus answers by the size of the answer. The numbers are in training.json."
        return svg(figure, chart_id(name, narrow), label)


def training_metric(epochs: Sequence[Epoch], narrow: bool = False) -> Markup:
    """The metric on the validation part by epoch, its best marked with a star."""
    with style("training-metric"):
        figure, axes = canvas(NARROW if narrow else HALF, 4)
        best = best_of(epochs)
        name = best.metric
        axes.plot([e.epoch for e in epochs], [e.value for e in epochs], color=PLAN, marker="o", markersize=4)
        axes.plot([best.epoch], [best.value], color=PLAN, marker="*", markersize=14)
        metric_ticks(axes, name)
        epoch_axis(axes, name)
        legend(axes, [key(name, PLAN, line="-", marker="o"), key("best", PLAN, marker="*")])
        label = f"{name.capitalize()} by epoch, at best {metric_tick(best.value, name)} after epoch {best.epoch}."
        return svg(figure, chart_id("training-metric", narrow), f"{label} The numbers are in the table of epochs.")
