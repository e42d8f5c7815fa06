"""The funnel of a search: how many plans were left after each of its steps."""

from __future__ import annotations

import math
from collections import Counter
from typing import Final

from markupsafe import Markup
from matplotlib.ticker import NullLocator

from rushhour.plan import Certificate
from rushhour.report.charts.axes import NARROW, WIDE, canvas
from rushhour.report.charts.palette import INK, PLAN, SOFT, style
from rushhour.report.charts.svg import chart_id, svg

_STEPS: Final = {
    "shape": "smaller networks timed",
    "train": "networks trained",
    "make": "int8 made",
    "time": "engines timed",
    "simulate": "batch bounds simulated",
    "accuracy": "accuracy judged",
    "predict": "capacities predicted",
    "race": "put under load",
}
"""What was done at each step of a `Cut`, in order."""
_WIDE_ROW, _NARROW_ROW = 0.44, 0.66


def plans_left(certificate: Certificate, narrow: bool = False) -> Markup | None:
    """A bar for all plans, and one after each step that removed some, with how many; the lengths are logarithmic.

    Returns:
        None where no plan was removed.
    """
    if not certificate.cuts:
        return None
    rows = _rows(certificate)
    with style("funnel"):
        height = _NARROW_ROW if narrow else _WIDE_ROW
        figure, axes = canvas(NARROW if narrow else WIDE, 0.2 + height * len(rows))
        for place, (name, left, removed) in enumerate(rows):
            length = math.log1p(left) / math.log1p(certificate.plans)
            is_last = place == len(rows) - 1
            colour = PLAN if is_last else SOFT
            axes.barh(place, length, left=-length / 2, height=0.5, color=colour, alpha=1.0 if is_last else 0.35)
            number = {"va": "center", "fontweight": "bold", "color": INK, "textcoords": "offset points"}
            axes.annotate(f"{left:,}", (length / 2, place), (6, 0), ha="left", **number)
            if narrow:
                text = f"{name}: {removed}" if removed else name
                colour = INK if is_last else SOFT
                axes.annotate(text, (-0.5, place - 0.44), color=colour, fontsize=9, ha="left", va="center")
            else:
                axes.annotate(removed, (0.72, place), color=SOFT, ha="left", va="center")
        axes.set_yticks(range(len(rows)), [""] * len(rows) if narrow else [name for name, _, _ in rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xlim(-0.52, 0.72 if narrow else 1.3)
        axes.set_ylim(len(rows) - 0.5, -0.8 if narrow else -0.5)
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(NullLocator())
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        numbers = ", ".join(f"{name} {left:,}" for name, left, _ in rows)
        return svg(figure, chart_id("funnel", narrow), f"Plans left: {numbers}")


def _rows(certificate: Certificate) -> list[tuple[str, int, str]]:
    """What was done, the plans left after it, and those removed by it in words."""
    rows, left = [("all plans", certificate.plans, "")], certificate.plans
    for step, name in _STEPS.items():
        removed: Counter[str] = Counter()
        for cut in certificate.cuts:
            if cut.step == step:
                removed[cut.fate] += cut.plans
        if removed:
            left -= removed.total()
            rows.append((name, left, ", ".join(f"−{count:,} {fate}" for fate, count in removed.items())))
    return rows
