"""The charts of the reports: drawn by matplotlib, returned as inline SVG in the page's own colours and font, or as PNG.

Drawings use colours by name. In SVG they are marker colours, each of which becomes a CSS variable of the page, so that
one file serves light and dark; in PNG they are the page's light ones. Shape and line style always say the same as
colour does.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import textwrap
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib.colors
import matplotlib.style
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from rushhour.goal import SLO
from rushhour.measurement import Interval, Measurement, Outcome, latency_curve
from rushhour.plan import EngineName, Plan, Precision, Trial
from rushhour.records.compression import Compression, Stage
from rushhour.records.curves import Epoch, best_of
from rushhour.report import wording
from rushhour.report.findings import Capacity, Findings, baseline_of, evidence_of, holds, winner_of

_INK, _SOFT, _GRID, _PAPER = "rushhour:ink", "rushhour:soft", "rushhour:grid", "rushhour:paper"
_PLAN, _BASELINE, _LIMIT = "rushhour:plan", "rushhour:baseline", "rushhour:limit"
_MARKERS = {
    _INK: "#010203",
    _SOFT: "#010204",
    _GRID: "#010205",
    _PAPER: "#010206",
    _PLAN: "#010207",
    _BASELINE: "#010208",
    _LIMIT: "#010209",
}
_LIGHT = {
    _INK: "#1d2126",
    _SOFT: "#5c6570",
    _GRID: "#e3e4e6",
    _PAPER: "#ffffff",
    _PLAN: "#0067a6",
    _BASELINE: "#b85300",
    _LIMIT: "#a5346f",
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.labelcolor": _SOFT,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
}
_LOG_FROM = 8.0  # rates that spread over more than this factor get a logarithmic axis
_ROUND_FROM = 6.0  # a logarithmic axis of less than this factor has too few round ticks
_NAME = 60  # characters of a name in a chart; the tables have all of it
_LINE = 36  # of them in one line beside a point
_CUT = 4  # times worse than a name that hides another is one that the edge cuts
_WIDE, _HALF, _NARROW = 9.4, 5.3, 3.6  # inches: of a whole page, of half of it, of a phone
_MOST_PREDICTED = 300  # points, the fastest; more would only hide each other and make the file heavy
_NO_TEST = (Outcome.VOID, Outcome.GENERATOR_LIMITED)
_DASHED, _DOTTED = (0, (5, 3)), (0, (1.5, 1.8))


class Side(NamedTuple):
    """Baseline or plan: its name for people, its windows of load, and its capacity where there is one."""

    name: str
    is_plan: bool
    windows: Sequence[Measurement]
    capacity: Capacity | None

    @property
    def colour(self) -> str:
        """One of the marker colours."""
        return _PLAN if self.is_plan else _BASELINE

    @property
    def marker(self) -> str:
        """The shape that goes with the colour."""
        return "o" if self.is_plan else "s"


Kind = Literal["proven", "estimated", "predicted"]
_EDGES: dict[Kind, float] = {"proven": 0.8, "estimated": 1.4, "predicted": 0.7}


class Point(NamedTuple):
    """A candidate in the plane of capacity and accuracy; `rps` of a proof is the rate of its window."""

    trial: Trial
    rps: float
    accuracy: float
    kind: Kind
    interval_rps: Interval | None


def in_both_widths(draw: Callable[[bool], Markup | None]) -> Markup | None:
    """A chart as a page holds it: drawn for a desk and, with the same letters, for a phone; the style sheet shows one.

    Args:
        draw: is told whether to draw for a phone.

    Returns:
        None where there is nothing to draw.
    """
    wide, narrow = draw(False), draw(True)
    if wide is None or narrow is None:
        return None
    return Markup('<div class="on-wide">{}</div><div class="on-narrow">{}</div>').format(wide, narrow)


def accuracy_against_capacity(run: Findings, narrow: bool = False) -> Markup | None:
    """Every candidate that has both: proven filled, estimated hollow, only predicted a small ring; with the Pareto
    front of those that were loaded.

    The accuracy is that of the validation part, which candidates were chosen on.

    Returns:
        None where no candidate has both.
    """
    plan = run.plan
    points, reference = _points(run)
    if not points:
        return None
    metric = evidence_of(plan).metric
    measured = [point for point in points if point.kind != "predicted"]
    all_predicted = sorted((point for point in points if point.kind == "predicted"), key=lambda point: -point.rps)
    predicted = all_predicted[:_MOST_PREDICTED]
    points = [*predicted, *measured]
    left_out = f", {len(predicted)} fastest of {len(all_predicted):,}" if len(predicted) < len(all_predicted) else ""
    least = None if reference is None else reference - plan.goal.budget.max_drop
    floor, ceiling = _accuracy_range([point.accuracy for point in points], reference, least)
    margin = 0.12 * (ceiling - floor)
    with _style("pareto"):
        figure, axes = _canvas(_NARROW if narrow else _WIDE, 4.6)
        bounds = [bound for point in points for bound in point.interval_rps or ()]
        _rate_axis(axes, [*(point.rps for point in points), *bounds], "capacity, requests per second")
        axes.set_ylim(floor - margin, ceiling + (2 if narrow else 3) * margin)  # names stand above their points
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _metric(value, metric)))
        axes.set_ylabel(f"{metric}, validation")
        if least is not None:
            _budget(axes, least, f"budget: {plan.goal.budget} below the reference")
        front = _front(measured)
        if len(front) > 1:
            rates, accuracies = [point.rps for point in front], [point.accuracy for point in front]
            axes.step(rates, accuracies, where="pre", color=_SOFT, linewidth=1.1)
        tips, roles, marks = {}, [], []
        for index, point in enumerate(points):
            name = f"point-{index}"
            kind = wording.ESTIMATED if point.kind == "estimated" else point.kind
            accuracy = wording.metric(point.accuracy, metric)
            called = run.name_of(point.trial.candidate)
            tips[name] = f"{called}: {wording.rate(point.rps)} {kind}, {metric} {accuracy}"
            at_edge = point.accuracy < floor
            place = max(point.accuracy, floor - margin / 2)
            _point(axes, point, plan, place, "v" if at_edge else None, name)
            interval, colour = point.trial.accuracy_drop_interval, _colour(point.trial, plan)
            if point.kind != "predicted" and interval is not None and reference is not None and not at_edge:
                low, high = reference - interval[1], reference - interval[0]
                axes.vlines(point.rps, low, high, color=colour, linewidth=1, alpha=0.6)
            if point.interval_rps is not None:
                axes.hlines(place, *point.interval_rps, color=colour, linewidth=1, alpha=0.6)
            if role := _role(point, plan):
                label = role if narrow else f"{role}: {_short(called, _NAME)}"
                roles.append(_Named(label, colour, point.kind, (point.rps, place)))
            elif point.kind != "predicted":
                marks.append((point.rps, place))
        _name_roles(axes, roles, marks)
        kinds = {point.kind for point in measured}
        _legend(
            axes,
            [
                *([_key("proven under load", marker="o")] if "proven" in kinds else []),
                *([_key(wording.ESTIMATED, marker="o", hollow=True)] if "estimated" in kinds else []),
                *([_key(f"predicted only{left_out}", marker="o", hollow=True, size=3.5)] if predicted else []),
                *([_key("Pareto front of the loaded", line="-")] if len(front) > 1 else []),
            ],
            columns=1 if narrow else 4,
        )
        label = (
            f"{metric.capitalize()} against capacity: {len(measured)} candidates measured under load, "
            f"{len(all_predicted)} predicted only. The numbers are in the table of candidates."
        )
        return _svg(figure, _named("pareto", narrow), label, tips)


def latency_against_rate(sides: Sequence[Side], slo: SLO, narrow: bool = False) -> Markup | None:
    """p50 and p99 of every window of load against its rate, with the limit.

    Lines join windows that held; all others are marks of their own. A star stands at the window that proves the
    plan's capacity; a capacity that is only estimated is a band, because nothing was measured there.

    Returns:
        None where no window has a latency.
    """
    values = _latencies(sides)
    if not values:
        return None
    with _style("latency"):
        label = f"Latency against offered rate for {' and '.join(side.name for side in sides)}, with the limit {slo}"
        label = f"{label}. The numbers are in the table of load windows."
        return _svg(_latency(sides, slo, values, narrow), _named("latency", narrow), label, _proofs(sides))


def latency_against_rate_png(sides: Sequence[Side], slo: SLO) -> bytes | None:
    """The same as a PNG, on white paper.

    Returns:
        None where no window has a latency.
    """
    values = _latencies(sides)
    if not values:
        return None
    with _style("latency", _LIGHT):
        drawn = io.BytesIO()
        _latency(sides, slo, values, narrow=False).savefig(
            drawn, format="png", dpi=160, facecolor=_PAPER, metadata={"Software": "rushhour"}
        )
        return drawn.getvalue()


def _latencies(sides: Sequence[Side]) -> list[float]:
    windows = [window for side in sides for window in side.windows]
    return [ms for window in windows if window.p99_ms for ms in (window.p50_ms, window.p99_ms) if ms]


def _latency(sides: Sequence[Side], slo: SLO, values: Sequence[float], narrow: bool) -> Any:
    windows = [window for side in sides for window in side.windows]
    estimates = [(side, side.capacity) for side in sides if side.capacity and side.capacity.rps]
    estimates = [(side, capacity) for side, capacity in estimates if not capacity.proven]
    shown = [rps for _, capacity in estimates for rps in (capacity.rps, *(capacity.interval_rps or ()))]
    figure, axes = _canvas(_NARROW if narrow else _HALF, 5.4 if narrow else 4.8)
    _rate_axis(axes, [*(window.rate_rps for window in windows), *shown], "offered rate, requests per second")
    _latency_axis(axes, values, slo, name_at=0.5)
    for side, capacity in estimates:
        axes.axvline(capacity.rps, color=side.colour, linestyle=_DASHED, linewidth=1, zorder=1)
        if capacity.interval_rps is not None:
            axes.axvspan(*capacity.interval_rps, color=side.colour, alpha=0.15, linewidth=0, zorder=1)
    for side in sides:
        held = [window for window in side.windows if holds(window)]
        for style, at in (
            (_DOTTED, [(w.rate_rps, w.p50_ms) for w in held if w.p50_ms]),
            ("-", [(w.rate_rps, w.p99_ms) for w in held if w.p99_ms]),
        ):
            refuted = [window.rate_rps for window in side.windows if window.outcome.refutes]
            for line in _unbroken(*_medians(at), refuted):
                axes.plot(*zip(*line, strict=True), color=side.colour, linestyle=style, linewidth=1.5)
        for window in side.windows:
            _window(axes, window, side)
        proof = side.capacity.proof if side.capacity else None
        if side.is_plan and proof is not None and proof.p99_ms:
            star = {"marker": "*", "markersize": 15, "color": side.colour, "markeredgecolor": _PAPER}
            axes.plot(proof.rate_rps, proof.p99_ms, zorder=6, gid="proof", **star)
    _legend(axes, _latency_keys(sides, windows), columns=1 if narrow else 2)
    return figure


def _proofs(sides: Sequence[Side]) -> dict[str, str]:
    """What the pointer shows over the star."""
    proofs = (side.capacity.proof for side in sides if side.is_plan and side.capacity is not None)
    proof = next(proofs, None)
    return {} if proof is None else {"proof": f"the proof: {wording.rate(proof.rate_rps)}, p99 {wording.p99(proof)}"}


def _latency_keys(sides: Sequence[Side], windows: Sequence[Measurement]) -> list[Line2D]:
    keys = [_key(f"{side.name} p99, held", side.colour, line="-", marker=side.marker) for side in sides]
    keys.append(_key("p50 of the same", line=_DOTTED))
    for side in sides:
        capacity = side.capacity
        if capacity is None or not capacity.rps:
            continue
        if not capacity.proven:
            keys.append(_key(f"{side.name}: {wording.ESTIMATED}", side.colour, line=_DASHED))
        elif side.is_plan and capacity.proof is not None and capacity.proof.p99_ms:
            keys.append(_key(f"{side.name}: the proof", side.colour, marker="*"))
    hollow = [window for window in windows if window.p99_ms and window.outcome is Outcome.INCONCLUSIVE]
    if hollow:
        keys.append(_key("inconclusive", marker="o", hollow=True))
    if any(window.p99_ms and window.outcome.refutes for window in windows):
        keys.append(_key("failed", marker="X", hollow=True))
    if any(window.p99_ms and window.outcome in _NO_TEST for window in windows):
        keys.append(_key("void, generator-limited", marker="d", hollow=True))
    if any(window.p99_ms is None for window in windows):
        keys.append(_key("no p99", marker="^", hollow=True))
    return keys


def latency_distribution(sides: Sequence[Side], slo: SLO, narrow: bool = False) -> Markup | None:
    """The latency at each percentile from the median into the tail, for the window that shows each side's capacity.

    Unanswered requests count as infinitely late, and a curve ends where its window has too few requests to bound
    the percentile at 95%.

    Returns:
        None where no side has such a window.
    """
    windows = [(side, side.capacity.window) for side in sides if side.capacity is not None]
    curves = [(side, window, _tail(window)) for side, window in windows if window is not None]
    curves = [(side, window, tail) for side, window, tail in curves if tail]
    if not curves:
        return None
    with _style("tail"):
        figure, axes = _canvas(_NARROW if narrow else _HALF, 4.8)
        _latency_axis(axes, [ms for *_, tail in curves for _, ms in tail], slo, name_at=0.25 if narrow else 0.15)
        axes.set_xscale("log")
        most = max(100.0, *(tail[-1][0] for *_, tail in curves))
        axes.set_xlim(2, most * 1.1)
        ticks = (50, 90, 99, 99.9, 99.99) if narrow else (50, 75, 90, 95, 99, 99.5, 99.9, 99.99)
        shown = [p for p in ticks if 100 / (100 - p) <= most * 1.001]
        axes.set_xticks([100 / (100 - p) for p in shown], [f"p{p:g}" for p in shown])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("percentile of all scheduled requests")
        axes.axvline(1 / slo.allowed_miss_rate, color=_LIMIT, linestyle=_DOTTED, linewidth=1)
        keys = []
        for side, window, tail in curves:
            axes.plot(*zip(*tail, strict=True), color=side.colour, linewidth=2)
            axes.plot(*tail[-1], marker=side.marker, color=side.colour, markersize=6)
            verdict = "" if window.outcome is Outcome.PASS else f", {window.outcome.value}"
            separator = ",\n" if narrow else ", "
            name = f"{side.name} at {wording.rate(window.rate_rps)}{verdict}{separator}n = {window.n:,}"
            keys.append(_key(name, side.colour, line="-", marker=side.marker))
        _legend(axes, keys, columns=1)
        numbers = "; ".join(
            f"{side.name} at {wording.rate(window.rate_rps)}: p99 {wording.p99(window)}" for side, window, _ in curves
        )
        return _svg(figure, _named("tail", narrow), f"Latency at each percentile: {numbers}")


def ladder(run: Findings, narrow: bool = False) -> Markup | None:
    """One bar for each step, with what it bought over the step before; estimates are hollow.

    Returns:
        None where there is no ladder.
    """
    rungs = run.evidence.ladder
    if not rungs:
        return None
    capacities = [run.capacity(rung.candidate, rung.capacity_rps, rung.p99_ms) for rung in rungs]
    with _style("ladder"):
        figure, axes = _canvas(_NARROW if narrow else _WIDE, 0.8 + (0.6 if narrow else 0.5) * len(rungs))
        places, rates = list(range(len(rungs))), [rung.capacity_rps for rung in rungs]
        colours = [_BASELINE, *[_SOFT] * (len(rungs) - 2), _PLAN][-len(rungs) :]
        faces = [colour if found.proven else "none" for colour, found in zip(colours, capacities, strict=True)]
        axes.barh(places, rates, height=0.6, color=faces, edgecolor=colours, linewidth=1.4)
        aside = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center", "color": _SOFT}
        if not narrow:
            axes.text(1.0, -0.72, "over the step before", fontsize=9, **aside)
        for place, found in enumerate(capacities):
            at = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
            said = [wording.rate(found.rps), *([wording.ESTIMATED] if found.rps and not found.proven else [])]
            gain = wording.gain(found, capacities[place - 1]) if place else ""
            if narrow and gain:
                said[0] += f", {gain}"
            axes.annotate(("\n" if narrow else ", ").join(said), (found.rps, place), fontweight="bold", **at)
            if not narrow:
                axes.text(1.0, place, gain, fontsize=10, **aside)
        axes.set_yticks(places, [_short(rung.step, 30) for rung in rungs])
        axes.tick_params(axis="y", labelcolor=_INK)
        room = 1.35 if all(found.proven for found in capacities) else 1.65
        axes.set_xlim(0, (3.2 if narrow else room) * max(*rates, 1e-9))
        axes.set_ylim(len(rungs) - 0.5, -0.95)
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(NullLocator())
        axes.spines["bottom"].set_visible(False)
        steps = ", ".join(
            f"{rung.step} {wording.capacity(found)}" for rung, found in zip(rungs, capacities, strict=True)
        )
        return _svg(figure, _named("ladder", narrow), f"Capacity after each step: {steps}")


def training_loss(epochs: Sequence[Epoch], narrow: bool = False) -> Markup:
    """The loss of training and validation part by epoch."""
    with _style("training-loss"):
        figure, axes = _canvas(_NARROW if narrow else _HALF, 4)
        at = [epoch.epoch for epoch in epochs]
        sides = (("training", _BASELINE, "s", _DOTTED), ("validation", _PLAN, "o", "-"))
        for name, colour, marker, line in sides:
            values = [epoch.loss if name == "training" else epoch.validation_loss for epoch in epochs]
            axes.plot(at, values, color=colour, linestyle=line, marker=marker, markersize=4)
        _epoch_axis(axes, "loss")
        _legend(axes, [_key(name, colour, line=line, marker=marker) for name, colour, marker, line in sides])
        return _svg(figure, _named("training-loss", narrow), "Loss by epoch. The numbers are in the table of epochs.")


def training_metric(epochs: Sequence[Epoch], narrow: bool = False) -> Markup:
    """The metric on the validation part by epoch, its best marked with a star."""
    with _style("training-metric"):
        figure, axes = _canvas(_NARROW if narrow else _HALF, 4)
        best = best_of(epochs)
        name = best.metric
        axes.plot([e.epoch for e in epochs], [e.value for e in epochs], color=_PLAN, marker="o", markersize=4)
        axes.plot([best.epoch], [best.value], color=_PLAN, marker="*", markersize=14)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _metric(value, name)))
        _epoch_axis(axes, name)
        _legend(axes, [_key(name, _PLAN, line="-", marker="o"), _key("best", _PLAN, marker="*")])
        label = f"{name.capitalize()} by epoch, at best {_metric(best.value, name)} after epoch {best.epoch}."
        return _svg(figure, _named("training-metric", narrow), f"{label} The numbers are in the table of epochs.")


def compression_trade(found: Compression, narrow: bool = False) -> Markup:
    """Accuracy against throughput: one line for each recipe, a point for each step, the answer marked with a star."""
    with _style("compression-trade"):
        figure, axes = _canvas(_NARROW if narrow else _WIDE, 4.2)
        name = found.reference.accuracy.metric
        axes.plot([1], [found.reference.accuracy.value], color=_BASELINE, marker="s", markersize=7, zorder=4)
        for attempt in found.attempts:
            at = [(_times(stage), stage.accuracy.value) for stage in attempt.stages]
            axes.plot(*zip((1.0, found.reference.accuracy.value), *at, strict=True), color=_SOFT, linewidth=1)
            for stage, (across, value) in zip(attempt.stages, at, strict=True):
                low, high = stage.accuracy.interval
                axes.plot([across] * 2, [low, high], color=_GRID, linewidth=2, zorder=1)
                axes.plot([across], [value], color=_SOFT, marker="o", markersize=5, zorder=4)
                axes.annotate(
                    _short(stage.step, 22), (across, value), xytext=(5, 4), textcoords="offset points", fontsize=8
                )
        answer = found.answer
        # behind the points: steps that came out alike would be hidden under it
        axes.plot([_times(answer)], [answer.accuracy.value], color=_PLAN, marker="*", markersize=17, zorder=3)
        _budget(axes, found.reference.accuracy.value - found.budget.max_drop, f"budget {found.budget}")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _metric(value, name)))
        stages = [stage for attempt in found.attempts for stage in attempt.stages]
        _rate_axis(axes, [1.0, *map(_times, stages)], "throughput over the reference's")
        axes.set_ylabel(f"{name} (validation)")
        keys = [_key("reference", _BASELINE, marker="s"), _key("step", _SOFT, marker="o")]
        _legend(axes, [*keys, _key("the answer", _PLAN, marker="*")], columns=1 if narrow else 3)
        label = f"{name.capitalize()} against throughput after each step. The numbers are in the table of steps."
        return _svg(figure, _named("compression-trade", narrow), label)


def compression_sizes(found: Compression, narrow: bool = False) -> Markup | None:
    """How many times smaller each step of the answer's recipe made it: parameters and bytes.

    Returns:
        None where the answer is the reference.
    """
    if found.best is None:
        return None
    stages = found.attempts[found.best[0]].stages[: found.best[1] + 1]
    with _style("compression-sizes"):
        figure, axes = _canvas(_NARROW if narrow else _WIDE, 0.9 + 0.62 * len(stages))
        reference = found.reference
        fewer = [reference.parameters / max(1, stage.parameters) for stage in stages]
        smaller = [reference.bytes / stage.bytes for stage in stages]
        for offset, values, colour in ((-0.19, fewer, _SOFT), (0.19, smaller, _PLAN)):
            places = [place + offset for place in range(len(stages))]
            axes.barh(places, values, height=0.34, color=colour)
            for place, value in zip(places, values, strict=True):
                at = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
                axes.annotate(f"{wording.number(value)}x", (value, place), fontsize=9, **at)
        axes.set_yticks(range(len(stages)), [_short(stage.step, 30) for stage in stages])
        axes.tick_params(axis="y", labelcolor=_INK)
        axes.set_ylim(len(stages) - 0.5, -0.5)
        axes.set_xlim(0, 1.15 * max(*fewer, *smaller))
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(NullLocator())
        axes.spines["bottom"].set_visible(False)
        keys = [_key("fewer parameters", _SOFT, marker="s"), _key("smaller on disk", _PLAN, marker="s")]
        _legend(axes, keys, columns=1 if narrow else 2)
        steps = ", ".join(
            f"{stage.step} {wording.number(size)} times smaller" for stage, size in zip(stages, smaller, strict=True)
        )
        return _svg(figure, _named("compression-sizes", narrow), f"Size after each step of the answer: {steps}")


def _times(stage: Stage) -> float:
    return 1.0 if stage.throughput is None else stage.throughput.value


def _epoch_axis(axes: Any, label: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)


def _points(run: Findings) -> tuple[list[Point], float | None]:
    """The candidates to draw, and the reference's accuracy on the part of the data that they were chosen on.

    A compiled artefact has one accuracy whatever its policy, so a candidate without its own takes its artefact's.
    """
    trials = run.evidence.trials
    known = {_artefact(trial): trial.accuracy for trial in trials if trial.accuracy is not None}
    references = (
        trial.accuracy + trial.accuracy_drop
        for trial in trials
        if trial.accuracy is not None and trial.accuracy_drop is not None
    )
    reference = next(references, None)
    baseline = baseline_of(run.plan)
    if reference is not None and baseline is not None:
        known.setdefault(_artefact(baseline), reference)
    points = []
    for trial in trials:
        accuracy = known.get(_artefact(trial))
        if accuracy is None:
            continue
        if trial.capacity_rps:
            found = run.capacity(trial.candidate, trial.capacity_rps, trial.p99_ms)
            rps = found.proof.rate_rps if found.proof is not None else found.rps
            points.append(Point(trial, rps, accuracy, "proven" if found.proven else "estimated", found.interval_rps))
        elif trial.predicted_rps:
            points.append(Point(trial, trial.predicted_rps, accuracy, "predicted", None))
    return points, reference


def _artefact(trial: Trial) -> tuple[str, EngineName, Precision]:
    return trial.bundle, trial.engine, trial.precision


def _accuracy_range(values: Sequence[float], reference: float | None, least: float | None) -> tuple[float, float]:
    """What the accuracy axis shows. A collapsed candidate must not squeeze all others into one line: the axis stops
    some way below the budget, and what lies lower is drawn at the edge."""
    low, high = min(values), max(values)
    if reference is not None and least is not None:
        low, high = min(low, least), max(high, reference)
        low = max(low, least - 2 * max(reference - least, 0.005))
    return (low, high) if high - low > 1e-4 else (low - 1e-3, high + 1e-3)


def _point(axes: Any, point: Point, plan: Plan, place: float, marker: str | None, name: str) -> None:
    """Draw one candidate; the plan's and the baseline's are larger and have a shape of their own, where they were
    loaded."""
    colour, is_filled = _colour(point.trial, plan), point.kind == "proven"
    shapes = {_PLAN: ("*", 15.0), _BASELINE: ("s", 8.5)}
    shape, size = ("o", 3.5) if point.kind == "predicted" else shapes.get(colour, ("o", 6.5))
    axes.plot(
        point.rps,
        place,
        marker=marker or shape,
        markersize=size,
        color=colour,
        markerfacecolor=colour if is_filled else _PAPER,
        markeredgecolor=_PAPER if is_filled else colour,
        markeredgewidth=_EDGES[point.kind],
        gid=name,
        zorder=5 if colour in shapes else 4 if is_filled else 3,
    )


def _role(point: Point, plan: Plan) -> str:
    """What the plan's and the baseline's points are; empty for all others."""
    roles = {_PLAN: "winner" if plan.feasible else "nearest miss", _BASELINE: "baseline"}
    return roles.get(_colour(point.trial, plan), "")


_Side = Literal["right", "left", "center"]


class _Named(NamedTuple):
    """A point that has its name written beside it; `at` is where it lies."""

    label: str
    colour: str
    kind: Kind
    at: tuple[float, float]


def _name_roles(axes: Any, named: Sequence[_Named], marks: Sequence[tuple[float, float]]) -> None:
    """Write names beside their points: each inside the chart, where it hides the least of the others and of `marks`."""
    axes.figure.draw_without_rendering()  # only now it is known where the axes lie
    inside = axes.get_window_extent()
    points = [axes.transData.transform(each.at) for each in named]
    drawn = [(9, point) for point in points] + [(6, axes.transData.transform(at)) for at in marks]
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for half, (x, y) in drawn]
    taken += [text.get_window_extent() for text in axes.texts]
    for each, (across, _) in zip(named, points, strict=True):
        said = {"estimated": [wording.ESTIMATED], "predicted": ["predicted only"]}.get(each.kind, [])
        sides: list[_Side] = ["left", "right", "center"]
        if across > inside.x0 + inside.width / 2:
            sides = ["right", "left", "center"]
        text = axes.annotate(
            "\n".join([*textwrap.wrap(each.label, _LINE, break_on_hyphens=False), *said]),
            each.at,
            xytext=(0, 0),
            textcoords="offset points",
            color=each.colour,
            fontweight="bold",
            zorder=6,
            in_layout=False,
        )

        def cost(place: tuple[_Side, bool, float], text: Any = text) -> float:
            box = _placed(text, *place)
            hidden = sum(_area(Bbox.intersection(box, other)) for other in taken)
            return hidden + _CUT * (_area(box) - _area(Bbox.intersection(box, inside)))

        places = [(side, above, away) for away in (11, 27, 43) for above in (True, False) for side in sides]
        taken.append(_placed(text, *min(places, key=cost)))


def _placed(text: Any, side: _Side, is_above: bool, away: float) -> Bbox:
    """Put a name `away` points above or below its point, with this side of it there; the room that it takes."""
    text.set_position(({"right": 4, "left": -4, "center": 0}[side], away if is_above else -away))
    text.set_horizontalalignment(side)
    text.set_verticalalignment("bottom" if is_above else "top")
    box: Bbox = text.get_window_extent().padded(2)
    return box


def _area(box: Bbox | None) -> float:
    return 0.0 if box is None else float(box.width * box.height)


def _colour(trial: Trial, plan: Plan) -> str:
    return _PLAN if trial is winner_of(plan) else _BASELINE if trial is baseline_of(plan) else _SOFT


def _front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both, slowest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.rps, -point.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front[::-1]


def _window(axes: Any, window: Measurement, side: Side) -> None:
    """Draw one window of load: its p99 with its interval, crossed where it failed, hollow where nothing is
    proven, a diamond where the server was not tested, at the top without a p99."""
    if window.p99_ms is None:
        top = axes.get_xaxis_transform()
        marks = {"marker": "^", "markersize": 7, "color": side.colour, "markerfacecolor": "none"}
        axes.plot(window.rate_rps, 0.975, transform=top, **marks)
        return
    if window.p99_interval_ms is not None:
        axes.vlines(window.rate_rps, *window.p99_interval_ms, color=side.colour, linewidth=1, alpha=0.6)
    passed, failed = window.outcome is Outcome.PASS, window.outcome.refutes
    axes.plot(
        window.rate_rps,
        window.p99_ms,
        marker="X" if failed else "d" if window.outcome in _NO_TEST else side.marker,
        markersize=8 if failed else 6,
        markerfacecolor=side.colour if passed else _PAPER,
        markeredgecolor=_PAPER if passed else side.colour,
        markeredgewidth=0.6 if passed else 1.2,
        zorder=4,
    )


def _medians(at: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """One value for each rate, ascending: the median over the windows of that rate."""
    rates = sorted({rate for rate, _ in at})
    return rates, [statistics.median(ms for rate, ms in at if rate == wanted) for wanted in rates]


def _unbroken(
    rates: Sequence[float], values: Sequence[float], refuted: Sequence[float]
) -> list[list[tuple[float, float]]]:
    """The lines through these points, ended where a rate was refuted: the next point is no continuation."""
    lines: list[list[tuple[float, float]]] = []
    for rate, value in zip(rates, values, strict=True):
        if not lines or any(lines[-1][-1][0] <= bad <= rate for bad in refuted):
            lines.append([])
        lines[-1].append((rate, value))
    return lines


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


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _rate_axis(axes: Any, rates: Sequence[float], label: str) -> None:
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


def _latency_axis(axes: Any, values: Sequence[float], slo: SLO, name_at: float) -> None:
    """The y axis for latencies, logarithmic, with the limit drawn, and named at this share of the width."""
    low, high = min(*values, slo.limit_ms), max(*values, slo.limit_ms)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.4, high * 1.9)
    _log_ticks(axes.yaxis, high / low)
    axes.set_ylabel("latency, ms")
    axes.axhline(slo.limit_ms, color=_LIMIT, linestyle=_DASHED, linewidth=1.4)
    _beside_line(axes, name_at, slo.limit_ms, f"limit {slo}", ha="center", va="bottom", xytext=(0, 4))


def _budget(axes: Any, least: float, text: str) -> None:
    axes.axhline(least, color=_LIMIT, linestyle=_DASHED, linewidth=1.4)
    _beside_line(axes, 0.995, least, text, ha="right", va="top", xytext=(0, -4))


def _beside_line(axes: Any, across: float, value: float, text: str, **place: Any) -> None:
    """Name a horizontal line: `across` is a share of the axes' width, `xytext` an offset in points."""
    across_and_value = axes.get_yaxis_transform()
    axes.annotate(
        text,
        (across, value),
        xycoords=across_and_value,
        textcoords="offset points",
        color=_LIMIT,
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
    return bool(axes.figure.get_figwidth() < _HALF)


def _named(chart: str, narrow: bool) -> str:
    """Unique in a page that holds the chart in both widths."""
    return f"{chart}-narrow" if narrow else chart


def _key(
    label: str,
    colour: str = _SOFT,
    *,
    line: Any = "none",
    marker: str | None = None,
    hollow: bool = False,
    size: float = 6,
) -> Line2D:
    face = "none" if hollow else colour
    return Line2D(
        [], [], color=colour, linestyle=line, marker=marker, markersize=size, markerfacecolor=face, label=label
    )


def _legend(axes: Any, keys: Sequence[Line2D], columns: int = 3) -> None:
    if keys:
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


def _metric(value: float, name: str) -> str:
    return f"{value * 100:.4g}%" if name == "accuracy" else f"{value:.4g}"


def _short(name: str, most: int) -> str:
    """A name that fits in a chart, without control characters, which SVG cannot hold."""
    clean = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    return clean if len(clean) <= most else f"{clean[: most - 1]}…"


@contextlib.contextmanager
def _style(name: str, palette: Mapping[str, str] = _MARKERS) -> Iterator[None]:
    """Draw in the report's style whatever the user's matplotlibrc says, with ids that are the same every time.

    A glyph that matplotlib's own font lacks is no concern: the reader's browser sets the text.
    """
    matplotlib.colors.get_named_colors_mapping().update(palette)
    with matplotlib.style.context(["default", _STYLE | {"svg.hashsalt": name}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _svg(figure: Any, name: str, label: str, tips: Mapping[str, str] | None = None) -> Markup:
    """The drawing as an `<svg>` that stands in a page.

    Args:
        figure: the drawing.
        name: unique in the page; starts every id, because ids of a page share one name space.
        label: what a reader who cannot see it is told.
        tips: gid of an artist -> what the pointer shows over it.
    """
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    root = ET.fromstring(drawn.getvalue())
    referenced = {value for element in root.iter() for value in _references(element)}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text, element.tail = (element.text or "").strip(), None
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        tip = (tips or {}).get(element.get("id", ""))
        if element.get("id") in referenced:
            element.set("id", f"{name}-{element.get('id')}")
        else:
            element.attrib.pop("id", None)
        for key in ("href", "clip-path"):
            if key in element.attrib:
                element.set(key, element.attrib[key].replace("#", f"#{name}-"))
        if "d" in element.attrib:
            element.set("d", " ".join(element.attrib["d"].split()))
        if "style" in element.attrib:
            element.set("style", _themed(element.attrib["style"]))
        if tip is not None:
            title = ET.Element("title")
            title.text = _short(tip, 300)
            element.insert(0, title)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    del root.attrib["width"], root.attrib["height"], root.attrib["version"]
    root.set("role", "img")
    root.set("aria-label", _short(label, 2000))
    return Markup(ET.tostring(root, encoding="unicode"))  # ElementTree has escaped every text in it


def _references(element: ET.Element) -> list[str]:
    values = (value for key, value in element.attrib.items() if key.endswith(("href", "clip-path")))
    return [value.removeprefix("url(").removesuffix(")").removeprefix("#") for value in values]


def _themed(style: str) -> str:
    """A style with the page's colours, and without a font, which the page decides."""
    rules = [rule for rule in style.split("; ") if not rule.startswith("font-family:")]
    themed = "; ".join(rules)
    for name, marker in _MARKERS.items():
        themed = themed.replace(marker, f"var(--{name.removeprefix('rushhour:')})")
    return themed
