"""The curves of a training: loss and metric by epoch."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from rushhour.records.classified import Bin
from rushhour.records.curves import Epoch, best_of
from rushhour.report.charts.axes import HALF, NARROW, canvas, epoch_axis, key, legend, metric_tick, metric_ticks
from rushhour.report.charts.palette import BASELINE, DOTTED, PLAN, style
from rushhour.report.charts.svg import chart_id, svg


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


def reliability(bins: Sequence[Bin], narrow: bool = False) -> Markup:
    """The share of right answers against the confidence that they were given with; on the diagonal both agree."""
    with style("reliability"):
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
        return svg(figure, chart_id("reliability", narrow), label)


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
