"""Capacity after each step from the untouched model to the plan."""

from __future__ import annotations

from markupsafe import Markup
from matplotlib.ticker import NullLocator

from rushhour.report import wording
from rushhour.report.charts.axes import NARROW, WIDE, canvas, short
from rushhour.report.charts.palette import BASELINE, INK, PLAN, SOFT, style
from rushhour.report.charts.svg import chart_id, svg
from rushhour.report.findings import Findings


def capacity_by_step(run: Findings, narrow: bool = False) -> Markup | None:
    """One bar for each step, with its gain over the step before; estimates are hollow.

    Returns:
        None where the plan names no steps.
    """
    steps = run.evidence.ladder
    if not steps:
        return None
    capacities = [run.capacity(step.candidate, step.capacity_rps, step.p99_ms) for step in steps]
    with style("ladder"):
        figure, axes = canvas(NARROW if narrow else WIDE, 0.8 + (0.6 if narrow else 0.5) * len(steps))
        places, rates = list(range(len(steps))), [step.capacity_rps for step in steps]
        colours = [BASELINE, *[SOFT] * (len(steps) - 2), PLAN][-len(steps) :]
        faces = [colour if found.proven else "none" for colour, found in zip(colours, capacities, strict=True)]
        axes.barh(places, rates, height=0.6, color=faces, edgecolor=colours, linewidth=1.4)
        aside = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center", "color": SOFT}
        if not narrow:
            axes.text(1.0, -0.72, "over the step before", fontsize=9, **aside)
        for place, found in enumerate(capacities):
            beside = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
            texts = [wording.rate(found.rps), *([wording.ESTIMATED] if found.rps and not found.proven else [])]
            gain = wording.gain(found, capacities[place - 1]) if place else ""
            if narrow and gain:
                texts[0] += f", {gain}"
            axes.annotate(("\n" if narrow else ", ").join(texts), (found.rps, place), fontweight="bold", **beside)
            if not narrow:
                axes.text(1.0, place, gain, fontsize=10, **aside)
        axes.set_yticks(places, [short(step.step, 16 if narrow else 30) for step in steps])
        axes.tick_params(axis="y", labelcolor=INK)
        # Beside the longest bar stands its capacity, and at the right the gains.
        room = (3.2, 1.35) if all(found.proven for found in capacities) else (8.0, 2.2)
        axes.set_xlim(0, room[0 if narrow else 1] * max(*rates, 1e-9))
        axes.set_ylim(len(steps) - 0.5, -0.95)
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(NullLocator())
        axes.spines["bottom"].set_visible(False)
        numbers = ", ".join(
            f"{step.step} {wording.capacity(found)}" for step, found in zip(steps, capacities, strict=True)
        )
        return svg(figure, chart_id("ladder", narrow), f"Capacity after each step: {numbers}")
