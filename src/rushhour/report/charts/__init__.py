"""The charts of the reports: drawn by matplotlib, returned as inline SVG in the page's colours and font, or as PNG.

One file for each kind of chart, above what all of them share: the palette, the axes, the labels of points, the SVG.
"""

from rushhour.report.charts.accuracy import accuracy_against_capacity
from rushhour.report.charts.compression import compression_sizes, compression_trade_off
from rushhour.report.charts.funnel import plans_left
from rushhour.report.charts.latency import Series, latency_against_rate, latency_against_rate_png
from rushhour.report.charts.percentiles import latency_distribution
from rushhour.report.charts.steps import capacity_by_step
from rushhour.report.charts.svg import standalone, wide_and_narrow
from rushhour.report.charts.training import precision_recall, reliability, residuals, training_loss, training_metric

__all__ = [
    "Series",
    "accuracy_against_capacity",
    "capacity_by_step",
    "compression_sizes",
    "compression_trade_off",
    "latency_against_rate",
    "latency_against_rate_png",
    "latency_distribution",
    "plans_left",
    "precision_recall",
    "reliability",
    "residuals",
    "standalone",
    "training_loss",
    "training_metric",
    "wide_and_narrow",
]
